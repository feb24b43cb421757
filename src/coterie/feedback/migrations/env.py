"""Runs the migrations on the connection that coterie.feedback.tables.create_schema hands over."""

from alembic import context

from coterie.feedback.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
