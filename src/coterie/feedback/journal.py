"""Group commit: requests that come while a transaction is being synced share the next one."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

from coterie.errors import BackendUnavailable, BadData, Conflict, CoterieError, RunFailed
from coterie.feedback.database import Database
from coterie.feedback.intake import Row
from coterie.feedback.tables import FEEDBACK, OUTBOX

log = logging.getLogger("coterie.feedback")

_GROUP = 2000  # comparisons of a transaction
_SAME = ("ranking_id", "shown_first", "confidence")  # what the id does not say, and a retry repeats


class Overloaded(BackendUnavailable):
    """More votes wait to be committed than may."""


@dataclass(frozen=True)
class Outcome:
    """What became of one comparison.

    Attributes:
        comparison_id: under which it is stored.
        status: "stored" now, or "duplicate": it was there, and is one vote.
        counts: False where the worker had said more that day than counts.
    """

    comparison_id: str
    status: Literal["stored", "duplicate"]
    counts: bool


@dataclass(frozen=True)
class _Request:
    rows: list[Row]
    done: Future[list[Outcome]]


class Journal:
    """Commits comparisons in a thread of its own. Each request is stored whole or not at all.

    Args:
        database: where to.
        daily_cap: comparisons of a worker that count in a day (of UTC); more are stored.
        most_waiting: comparisons that may wait.
        committed: called after each transaction that stored something.
    """

    def __init__(
        self,
        database: Database,
        daily_cap: int,
        most_waiting: int = 20_000,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self._database, self._cap, self._most, self._committed = database, daily_cap, most_waiting, committed
        self._waiting: deque[_Request] = deque()
        self._rows, self._closed, self._wake = 0, False, threading.Condition()
        self._thread = threading.Thread(target=self._run, name="feedback-journal", daemon=True)
        self._thread.start()

    def submit(self, rows: list[Row]) -> Future[list[Outcome]]:
        """Hand rows over; the result is there when they are committed, in their order.

        The future raises Conflict: a row contradicts what is stored under its id. BackendUnavailable, StorageFull: not
        committed, or the answer was lost; sending again does no harm.

        Raises:
            Overloaded: too many wait.
        """
        request = _Request(rows, Future())
        with self._wake:
            if self._closed or self._rows + len(rows) > self._most:
                raise Overloaded(f"{self._rows} comparisons wait to be stored. Send these again in a second.")
            self._waiting.append(request)
            self._rows += len(rows)
            self._wake.notify()
        return request.done

    def close(self) -> None:
        """Commit what waits, and end."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next():
            try:
                self._commit(group)
            except CoterieError as error:
                if len(group) == 1 or isinstance(error, BackendUnavailable):
                    log.error("feedback was not stored: %s", error)
                    _fail(group, error)
                else:  # one of them is the culprit, and the others are not
                    for request in group:
                        self._alone(request)
            except Exception as error:
                log.exception("feedback was not stored")
                _fail(group, error)

    def _alone(self, request: _Request) -> None:
        try:
            self._commit([request])
        except Exception as error:
            log.exception("feedback was not stored")
            _fail([request], error)

    def _next(self) -> list[_Request]:
        """Requests for one transaction; none at the end."""
        group: list[_Request] = []
        size = 0
        with self._wake:
            while not group:
                while not self._waiting:
                    if self._closed:
                        return group
                    self._wake.wait()
                while self._waiting and (not group or size + len(self._waiting[0].rows) <= _GROUP):
                    request = self._waiting.popleft()
                    self._rows -= len(request.rows)
                    if request.done.set_running_or_notify_cancel():  # else its client has gone
                        group.append(request)
                        size += len(request.rows)
        return group

    def _commit(self, group: list[_Request]) -> None:
        answers: list[tuple[_Request, list[Outcome] | Conflict]] = []
        with self._database.writing() as connection:
            workers = {row["worker_id"] for request in group for row in request.rows}
            self._database.lock(connection, workers, "votes")
            now = self._database.now(connection)
            known = _known(connection, [row["comparison_id"] for request in group for row in request.rows])
            said = _said(connection, workers, now)
            new: list[Row] = []
            for request in group:
                answer, rows = self._answer(request.rows, known, said, now)
                answers.append((request, answer))
                new += rows
            if new:
                connection.execute(FEEDBACK.insert(), new)
                changed = sorted({row["worker_id"] for row in new if row["counts"]})
                if changed:
                    connection.execute(OUTBOX.insert(), [{"worker_id": name, "created_at": now} for name in changed])
        for request, answer in answers:
            if isinstance(answer, Conflict):
                request.done.set_exception(answer)
            else:
                request.done.set_result(answer)
        if new:
            self._committed()

    def _answer(
        self, rows: list[Row], known: dict[str, Row], said: dict[str, int], now: datetime
    ) -> tuple[list[Outcome] | Conflict, list[Row]]:
        """What becomes of a request's rows, and those to insert; `known` and `said` learn of these."""
        outcomes: list[Outcome] = []
        own: dict[str, Row] = {}
        more: Counter[str] = Counter()
        for number, row in enumerate(rows):
            name, worker = row["comparison_id"], row["worker_id"]
            there = known.get(name) or own.get(name)
            if there is not None and any(row[column] != there[column] for column in _SAME):
                return _conflict(number), []
            if there is None:
                own[name] = row | {"created_at": now, "counts": said.get(worker, 0) + more[worker] < self._cap}
                more[worker] += 1
            outcomes.append(Outcome(name, "stored" if there is None else "duplicate", (there or own[name])["counts"]))
        known |= own
        for worker, number in more.items():
            said[worker] = said.get(worker, 0) + number
        return outcomes, list(own.values())


def _known(connection: sa.Connection, ids: list[str]) -> dict[str, Row]:
    columns = [FEEDBACK.c[name] for name in ("comparison_id", "counts", *_SAME)]
    query = sa.select(*columns).where(FEEDBACK.c.comparison_id.in_(ids))
    return {row["comparison_id"]: dict(row) for row in connection.execute(query).mappings()}


def _said(connection: sa.Connection, workers: set[str], now: datetime) -> dict[str, int]:
    """How many comparisons of each worker count today."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    query = (
        sa.select(FEEDBACK.c.worker_id, sa.func.count())
        .where(FEEDBACK.c.worker_id.in_(workers), FEEDBACK.c.created_at >= midnight, FEEDBACK.c.counts)
        .group_by(FEEDBACK.c.worker_id)
    )
    return dict(connection.execute(query).all())


def _conflict(number: int) -> Conflict:
    return Conflict(
        f"comparisons[{number}]: this vote is stored already, with another {', '.join(_SAME[:-1])} or {_SAME[-1]}. Nothing "
        "of this request was stored; a retry repeats the vote as it was sent first."
    )


def _fail(group: list[_Request], error: Exception) -> None:
    if isinstance(error, BadData):  # the rows were checked: whoever sent them can do nothing about it, nor shall see it
        error = RunFailed("the database does not take a row that was checked; the log says why")
    for request in group:
        if not request.done.done():
            request.done.set_exception(error)
