"""How many votes the feedback database holds."""

import os

import sqlalchemy as sa

with sa.create_engine(os.environ["COTERIE_FEEDBACK_DATABASE"]).connect() as connection:
    print(connection.execute(sa.text("SELECT count(*) FROM feedback")).scalar_one())
