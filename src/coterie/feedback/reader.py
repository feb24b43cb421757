"""What ingest reads of the feedback database."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from coterie.contracts import COMPARISON
from coterie.errors import BackendUnavailable, BadConfiguration, BadData
from coterie.feedback.tables import FEEDBACK

_ROWS = 1000  # fetched at a time
_ORDER = (FEEDBACK.c.created_at, FEEDBACK.c.comparison_id)
_COLUMNS = [FEEDBACK.c[field.name] for field in COMPARISON.fields if field.name != "split"]


def parse(url: str) -> sa.URL:
    """The URL of a database. Raises BadConfiguration: it cannot be one, or holds a password."""
    try:
        address = sa.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise BadConfiguration(f"{url}: not the URL of a database ({error}).") from error
    if address.password or "password" in address.query:
        raise BadConfiguration(
            f"{address.set(query={}).render_as_string()}: the URL holds a password, which the results would show. "
            "Leave it out and set PGPASSWORD, or PGPASSFILE."
        )
    return address


def engine_of(address: sa.URL, **options: Any) -> sa.Engine:
    """An engine. Raises BadData: the driver is missing. BadConfiguration: there is none of this name."""
    url = address.render_as_string()
    try:
        return sa.create_engine(address, **options)
    except ModuleNotFoundError as error:
        raise BadData(f"{url}: {error}. Install the database's driver, for PostgreSQL psycopg[binary].") from error
    except (ArgumentError, ValueError) as error:
        raise BadConfiguration(f"{url}: not the URL of a database ({error}).") from error


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A connection to the database at `url`, whose table is the one above.

    Raises:
        BadConfiguration: the URL cannot be one, or holds a password.
        BadData: no such file, not a database, no such table, or one of other columns; the driver is missing.
        BackendUnavailable: the server does not answer or refuses.
    """
    address = parse(url)
    if address.get_backend_name() == "sqlite" and not Path(address.database or "").is_file():
        raise BadData(f"{url}: no such file. Write sqlite:///relative/path.db or sqlite:////absolute/path.db.")
    engine = engine_of(address, poolclass=sa.NullPool)
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
    """The comparisons that count, in the order of their time, in bounded memory."""
    with connected(url) as connection:
        query = sa.select(*_COLUMNS).where(FEEDBACK.c.counts).order_by(*_ORDER).execution_options(yield_per=_ROWS)
        for row in connection.execute(query).mappings():
            yield dict(row)


def state(url: str) -> str:
    """What `votes` yields, in a few words: the number of votes, and SHA-256 of their ids in the order of their time."""
    digest, number = hashlib.sha256(), 0
    with connected(url) as connection:
        query = sa.select(FEEDBACK.c.comparison_id).where(FEEDBACK.c.counts).order_by(*_ORDER)
        query = query.execution_options(yield_per=_ROWS)
        for vote in connection.scalars(query):
            digest.update(vote.encode())
            number += 1
    return f"{number} votes, {digest.hexdigest()}"
