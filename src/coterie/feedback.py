"""The platform's feedback database: comparisons that the serving router commits, and that ingest reads.

One table in any database that SQLAlchemy speaks; SQLite and PostgreSQL are meant. Its columns are the comparison's, without
the split, which is made anew by each ingest, and with the fingerprint of the key that made the pseudonyms. The primary
key is made of the vote's content, so that a vote sent twice is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from coterie.contracts import COMPARISON
from coterie.errors import BackendUnavailable, BadConfiguration, BadData

_ROWS = 1000  # fetched at a time


class _Moment(sa.TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None or value.tzinfo is None:
            return value
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


_TYPES: dict[pa.DataType, Any] = {pa.string(): sa.Text, pa.float32(): sa.Float}

FEEDBACK = sa.Table(
    "feedback",
    sa.MetaData(),
    *(
        sa.Column(field.name, _TYPES[field.type], primary_key=field.name == "comparison_id", nullable=field.nullable)
        for field in COMPARISON.fields
        if field.name not in ("split", "created_at")
    ),
    sa.Column("created_at", _Moment, nullable=False, default=lambda: datetime.now(UTC)),
    sa.Column("key_fingerprint", sa.Text, nullable=False),  # empty: the worker ids are as they came
    sa.Index("feedback_in_order", "created_at", "comparison_id"),
)
_ORDER = (FEEDBACK.c.created_at, FEEDBACK.c.comparison_id)


def create_schema(engine: sa.Engine) -> None:
    """Create the table where it is not there yet."""
    FEEDBACK.metadata.create_all(engine)


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A connection to the database at `url`, whose table is the one above.

    Raises:
        BadConfiguration: the URL cannot be one, or holds a password.
        BadData: no such file, not a database, no such table, or one of other columns; the driver is missing.
        BackendUnavailable: the server does not answer or refuses.
    """
    try:
        address = sa.make_url(url)
        if address.password or "password" in address.query:
            raise BadConfiguration(
                f"{address.set(query={}).render_as_string()}: the URL holds a password, which the results would show. "
                "Leave it out and set PGPASSWORD, or PGPASSFILE."
            )
        if address.get_backend_name() == "sqlite" and not Path(address.database or "").is_file():
            raise BadData(f"{url}: no such file. Write sqlite:///relative/path.db or sqlite:////absolute/path.db.")
        engine = sa.create_engine(address, poolclass=sa.NullPool)
    except ModuleNotFoundError as error:
        raise BadData(f"{url}: {error}. Install the database's driver, for PostgreSQL psycopg[binary].") from error
    except (ArgumentError, ValueError) as error:
        raise BadConfiguration(f"{url}: not the URL of a database ({error}).") from error
    try:
        with engine.connect() as connection:
            if not sa.inspect(connection).has_table(FEEDBACK.name):
                raise BadData(f"{url}: no table {FEEDBACK.name}. Give the database that the router writes feedback to.")
            there = {column["name"] for column in sa.inspect(connection).get_columns(FEEDBACK.name)}
            if missing := set(FEEDBACK.c.keys()) - there:
                raise BadData(
                    f"{url}: the table {FEEDBACK.name} has no {', '.join(sorted(missing))}: another version of coterie "
                    "made it. Read it with that version."
                )
            yield connection
    except OperationalError as error:
        raise BackendUnavailable(f"{url}: {error.orig}. Check server and credentials, and try again.") from error
    except SQLAlchemyError as error:
        reason = getattr(error, "orig", error)
        raise BadData(f"{url}: cannot be read ({reason}). Check that it is the router's feedback database.") from error
    finally:
        engine.dispose()


def key_fingerprint(url: str) -> str:
    """The fingerprint of the key that made the pseudonyms. Raises BadData where there is none, or several."""
    with connected(url) as connection:
        found: list[str] = sorted(connection.scalars(sa.select(FEEDBACK.c.key_fingerprint).distinct()))
    if not found:
        raise BadData(f"{url}: no feedback yet. Ingest it when there are votes.")
    if len(found) > 1:
        raise BadData(
            f"{url}: pseudonyms of several keys (fingerprints {', '.join(found)}), so that nobody can tell who is the "
            "same person. Keep the votes of each key in a database of its own."
        )
    return found[0]


def votes(url: str) -> Iterator[dict[str, Any]]:
    """The comparisons in the order of their time, in bounded memory."""
    with connected(url) as connection:
        query = sa.select(FEEDBACK).order_by(*_ORDER).execution_options(yield_per=_ROWS)
        for row in connection.execute(query).mappings():
            yield dict(row)


def state(url: str) -> str:
    """What the table holds, in a few words: the number of votes, and SHA-256 of their ids in the order of their time."""
    digest, number = hashlib.sha256(), 0
    with connected(url) as connection:
        query = sa.select(FEEDBACK.c.comparison_id).order_by(*_ORDER).execution_options(yield_per=_ROWS)
        for vote in connection.scalars(query):
            digest.update(vote.encode())
            number += 1
    return f"{number} votes, {digest.hexdigest()}"
