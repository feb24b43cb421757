"""The tables of the feedback database, and their migrations."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from coterie.contracts import COMPARISON


class Moment(sa.TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To UTC."""
        if value is None or value.tzinfo is None:
            return value
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """With its zone."""
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


METADATA = sa.MetaData()
FOLDING = "folding"  # in the metadata of profiles.parquet: which votes they were made of
_TYPES: dict[pa.DataType, Any] = {pa.string(): sa.Text, pa.float32(): sa.Float}
_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up INTEGER keys alone

# The comparison's columns without the split, which each ingest makes anew. The key is made of the vote's content, so that a
# vote sent twice is one.
FEEDBACK = sa.Table(
    "feedback",
    METADATA,
    *(
        sa.Column(field.name, _TYPES[field.type], primary_key=field.name == "comparison_id", nullable=field.nullable)
        for field in COMPARISON.fields
        if field.name not in ("split", "created_at")
    ),
    sa.Column("created_at", Moment, nullable=False, default=lambda: datetime.now(UTC)),
    sa.Column("key_fingerprint", sa.Text, nullable=False),  # empty: the worker ids are as they came
    sa.Column("counts", sa.Boolean, nullable=False, default=True),  # no: over what a worker may say in a day
    sa.Column("request_id", sa.Text),  # of the prediction that the person saw before they voted
    sa.Column("arm", sa.Text),  # "own" or "holdout": whose reward that was
    sa.Column("propensity", sa.Float),  # probability of that arm
    sa.Column("agreed", sa.Float),  # 1: it ranked the chosen response above the rejected one; .5: alike
    sa.Index("feedback_in_order", "created_at", "comparison_id"),
    sa.Index("feedback_by_worker", "worker_id", "created_at"),
)
# "This worker changed": written with the vote, deleted when the worker's profile is online.
OUTBOX = sa.Table(
    "outbox",
    METADATA,
    sa.Column("sequence", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("worker_id", sa.Text, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("outbox_by_worker", "worker_id"),
)
# The last profile of each worker that was made of feedback: its time, and the publication that it was made on top of.
STAMP = sa.Table(
    "stamp",
    METADATA,
    sa.Column("worker_id", sa.Text, primary_key=True),
    sa.Column("stamped_at", Moment, nullable=False),
    sa.Column("publication", sa.Text, nullable=False),
)
# Votes that published profiles were made of (`FOLDING` in the table's metadata), and that count no second time.
FOLDED = sa.Table(
    "folded",
    METADATA,
    sa.Column("folding", sa.Text, primary_key=True),
    sa.Column("comparison_id", sa.Text, primary_key=True),
)


def create_schema(engine: sa.Engine) -> None:
    """Bring the database to the newest schema; several programs may do so at once."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtextextended('coterie.schema', 0))"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
