"""The feedback database as a router opens it: durable or not at all, and one writer of a worker at a time."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from coterie.errors import BackendUnavailable, BadConfiguration, BadData, StorageFull
from coterie.feedback.reader import engine_of, parse
from coterie.feedback.tables import create_schema

_BUSY = 10.0  # seconds that SQLite waits for another writer, and PostgreSQL for a connection or a lock
_FULL, _READ_ONLY = ("disk is full", "No space left", "could not extend"), ("readonly", "read-only", "Read-only")
_READING = "coterie_reading"


class Database:
    """A database whose schema is the newest and whose commits survive a crash.

    SQLite keeps a write-ahead log and syncs it at every commit (journal_mode=WAL, synchronous=FULL; sqlite.org/pragma),
    PostgreSQL does so with synchronous_commit and fsync. Both are asserted at every connection, the first of which is made
    here.

    Raises:
        BadConfiguration: not the URL of SQLite or PostgreSQL, or a server that does not sync.
        BackendUnavailable: the server does not answer, or the file cannot be written.
        BadData: not a database, or the driver is missing.
    """

    def __init__(self, url: str) -> None:
        address = parse(url)
        self.url, self.kind = url, address.get_backend_name()
        if self.kind not in ("sqlite", "postgresql") or (self.kind == "sqlite" and not address.database):
            raise BadConfiguration(f"{url}: feedback is kept in sqlite:///FILE or postgresql+psycopg://HOST/NAME.")
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": _BUSY}
        if self.kind == "sqlite":
            options["connect_args"] = {"timeout": _BUSY, "check_same_thread": False}
        else:
            options["connect_args"] = {
                "application_name": "coterie-feedback",
                "connect_timeout": int(_BUSY),
                "options": f"-c lock_timeout={int(1000 * _BUSY)}",
                # A server that is gone without a word, as behind a cut network, is known to be so within half a minute.
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,
            }
        self._engine = engine_of(address, **options)
        sa.event.listen(self._engine, "connect", _sqlite_settings if self.kind == "sqlite" else _postgresql_settings)
        if self.kind == "sqlite":
            sa.event.listen(self._engine, "begin", _begin)
        with self._in_words():
            create_schema(self._engine)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction, committed at the end. Raises BackendUnavailable, or StorageFull: nothing was written."""
        with self._in_words(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """What was committed at one moment. Raises BackendUnavailable."""
        with self._in_words(), self._engine.connect() as connection:
            if self.kind == "sqlite":
                yield connection.execution_options(**{_READING: True})
            else:
                yield connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    def lock(self, connection: sa.Connection, workers: Collection[str], what: Literal["votes", "profiles"]) -> None:
        """Hold others off these workers' votes, or profiles, until the transaction ends.

        A SQLite transaction that writes holds off everybody.
        """
        if self.kind == "postgresql":  # in one order for all, so that no two wait for each other
            query = (
                "SELECT pg_advisory_xact_lock(hashtextextended(w, :what)) FROM unnest(CAST(:workers AS text[])) AS w"
            )
            connection.execute(sa.text(query), {"workers": sorted(workers), "what": ("votes", "profiles").index(what)})

    def now(self, connection: sa.Connection) -> datetime:
        """The database's clock; of SQLite, which has none, the machine's."""
        if self.kind == "sqlite":
            return datetime.now(UTC)
        moment: datetime = connection.scalars(sa.select(sa.func.clock_timestamp())).one()
        return moment.astimezone(UTC)

    def compact(self) -> None:
        """Leave nothing of what was deleted in SQLite's write-ahead log; PostgreSQL's vacuum sees to its own."""
        if self.kind == "sqlite":
            with self._in_words(), closing(self._engine.raw_connection()) as connection:  # in no transaction
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            # What is open may be of before: a file that was read-only, a server that was restarted.
            self._engine.dispose()
            reason = str(getattr(error, "orig", None) or error).strip()
            if any(word in reason for word in _FULL):
                raise StorageFull(f"{self.url}: no space left ({reason}). Free some; no restart is needed.") from error
            remedy = "Make it writable" if any(word in reason for word in _READ_ONLY) else "See to the database"
            raise BackendUnavailable(f"{self.url}: {reason}. {remedy}; no restart is needed.") from error
        except DBAPIError as error:
            raise BadData(
                f"{self.url}: cannot be used ({error.orig}). Check that it is a feedback database."
            ) from error
        except SQLAlchemyError as error:
            raise BadData(f"{self.url}: cannot be used ({error}). Check that it is a feedback database.") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StorageFull(f"{self.url}: no space left. Free some; no restart is needed.") from error
            raise BackendUnavailable(f"{self.url}: {error}") from error


def _sqlite_settings(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin` says
    for setting, wanted in (("journal_mode=WAL", "wal"), ("synchronous=FULL", 2), ("secure_delete=ON", 1)):
        name = setting.partition("=")[0]
        connection.execute(f"PRAGMA {setting}").close()
        [found] = connection.execute(f"PRAGMA {name}").fetchone()
        if found != wanted:
            raise BadConfiguration(
                f"the feedback database has {name}={found}, not {wanted}: acknowledged votes could be lost. Put it on a "
                "local disk whose file system can lock and sync."
            )


def _postgresql_settings(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = on")
        for name in ("fsync", "synchronous_commit"):
            [found] = cursor.execute(f"SHOW {name}").fetchone()
            if found != "on":
                raise BadConfiguration(
                    f"the feedback database has {name}={found}: acknowledged votes could be lost. Set {name} = on."
                )
    connection.commit()


def _begin(connection: sa.Connection) -> None:
    """Take SQLite's write lock at once: a transaction that asks for it later may find that what it read is stale."""
    reading = connection.get_execution_options().get(_READING)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
