"""From the outbox to profiles: whoever has said something new gets a new profile, from all that they have said."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from prometheus_client import Gauge, Histogram

from coterie.contracts import PROFILE
from coterie.errors import BackendUnavailable, BadData
from coterie.feedback.database import Database
from coterie.feedback.evidence import Evidence, Infer, Place, Prior, Said, weights
from coterie.feedback.tables import FEEDBACK, FOLDED, FOLDING, OUTBOX, STAMP
from coterie.routing import Profile

log = logging.getLogger("coterie.feedback")

LAG = Histogram(
    "coterie_feedback_lag_seconds",
    "From a vote's commit to the worker's profile online",
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 600, 3600),
)
WAITING = Gauge("coterie_feedback_outbox", "Workers whose feedback is not in their profile yet")
UNPUBLISHED = Gauge(
    "coterie_feedback_unpublished",
    "1 while no profiles of the mixture that serves are published: feedback is kept, and waits",
)

_AT_ONCE, _MOST_NEWS = 256, 10_000  # workers of a round, rows of the outbox that it looks at
_REST, _LONGEST_REST = 3.0, 10.0  # pause after a round in times of what it took, and in seconds
_EVERY = 0.5  # seconds between two looks, for what other routers stored and did not finish
# Seconds between two replays: in a rollout, the router of the mixture before may have taken somebody's news.
_AGAIN = 300.0
_LONGEST_WAIT = 5.0  # seconds between two attempts
_ASIDE = 60.0  # seconds for which a worker who cannot be done is left aside
_TICK = timedelta(microseconds=1)

Push = Callable[[Sequence[Profile]], None]
"""Puts profiles online. Raises BackendUnavailable."""


class Published:
    """The profiles of a publish stage, in memory.

    Attributes:
        mixture_version: of all of them.
        folding: which feedback they were made of; empty: none.
        publication: tells this publication from any other.
    """

    def __init__(self, path: Path) -> None:
        """Read profiles.parquet. Raises BadData: not one, or empty."""
        self.mixture_version = mixture_of(path)
        self._table = PROFILE.read(path)
        self.folding = PROFILE.metadata(path).get(FOLDING, "")
        self._rows = {worker: row for row, worker in enumerate(self._table["worker_id"].to_pylist())}
        newest = max(self._table["event_timestamp"].to_pylist())
        self.publication = f"{self.mixture_version}@{newest.isoformat()}"

    def get(self, worker: str) -> Profile | None:
        """The published profile of a worker."""
        row = self._rows.get(worker)
        if row is None:
            return None
        [values] = self._table.slice(row, 1).to_pylist()
        return Profile(**values | {name: tuple(values[name]) for name in ("embedding", "posterior")})


def mixture_of(path: Path) -> str:
    """The mixture that the profiles of a publish stage belong to. Raises BadData: it is no profiles.parquet, or empty."""
    versions = PROFILE.read(path, ["mixture_version"])["mixture_version"]
    if not len(versions):
        raise BadData(f"{path}: no profile in it. Publish the run whose bundle serves.")
    return str(versions[0])


class Relay:
    """Makes the profiles of workers who changed, and puts them online, in a thread of its own.

    What is read is one moment of the database. A profile is then stamped and put online under a lock on its worker, and
    only where the news that it was made of are still in the outbox: if another router was quicker, it knew at least as much.
    The stamps increase, by the database's clock, because Redis drops what is not newer.

    Args:
        database: with the outbox.
        published: the profiles that feedback comes on top of; one without training votes starts as a stranger. None: there
            are none of the mixture that serves, and the outbox waits.
        infer: places by the mixture of `published`.
        push: puts profiles online.
    """

    def __init__(self, database: Database, published: Published | None, infer: Infer, push: Push) -> None:
        self._database, self._published, self._infer, self._push = database, published, infer, push
        self._next: deque[tuple[Published | None, Infer, Push]] = deque()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._aside: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with what was left undone, and with everybody whose profile is of another publication."""
        self._thread = threading.Thread(target=self._run, name="feedback-relay", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something was stored."""
        self._wake.set()

    def follow(self, published: Published | None, infer: Infer, push: Push) -> None:
        """Make profiles of another publication, after the round that is under way: everybody's who has said something."""
        self._next.append((published, infer, push))
        self._wake.set()

    def close(self) -> None:
        """End after the round that is under way; what is left stays in the outbox."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        replay, wait = 0.0, _EVERY  # when next, and seconds
        while not self._closed.is_set():
            self._wake.clear()
            started = time.monotonic()
            while self._next:
                (self._published, self._infer, self._push), replay = self._next.popleft(), 0.0
            UNPUBLISHED.set(self._published is None)
            try:
                if started >= replay:
                    self.replay()
                    replay = started + _AGAIN
                if self.round():
                    # Votes are acknowledged by the same processor: it is theirs for most of the time.
                    self._closed.wait(min(_REST * (time.monotonic() - started), _LONGEST_REST))
                else:
                    self._wake.wait(_EVERY)
                wait = _EVERY
            except Exception as error:
                known = isinstance(error, BackendUnavailable)
                log.warning("feedback waits in the outbox: %s", error, exc_info=not known)
                wait = min(2 * wait, _LONGEST_WAIT)
                self._closed.wait(wait)

    def replay(self) -> int:
        """Put everybody into the outbox whose profile was not made on top of this publication; return how many."""
        if self._published is None:
            return 0
        made = sa.select(STAMP.c.worker_id).where(STAMP.c.publication == self._base.publication)
        waiting = sa.select(OUTBOX.c.worker_id)
        with self._database.writing() as connection:
            query = sa.select(FEEDBACK.c.worker_id).distinct().where(*self._since(), FEEDBACK.c.worker_id.not_in(made))
            workers = connection.scalars(query.where(FEEDBACK.c.worker_id.not_in(waiting))).all()
            if workers:
                now = self._database.now(connection)
                connection.execute(
                    OUTBOX.insert(), [{"worker_id": name, "created_at": now} for name in sorted(workers)]
                )
        return len(workers)

    def round(self) -> int:
        """Renew the profiles of some workers; return how many were looked at: 0 where nobody has changed, or all must wait.

        Raises:
            BackendUnavailable: the database, the one who infers, or the online store does not answer. The outbox waits.
        """
        with self._database.reading() as connection:
            news = self._news(connection)
            WAITING.set(len(news))
            if self._published is None:
                return 0
            news = dict(list(news.items())[:_AT_ONCE])
            said = self._said(connection, list(news)) if news else {}
        if not news:
            return 0
        try:
            self._renew(news, said)
        except BackendUnavailable:
            raise
        except Exception:
            if len(news) > 1:
                log.exception("feedback of one of %d workers cannot be used; each is tried alone", len(news))
            for worker, changes in news.items():
                try:
                    self._renew({worker: changes}, {worker: said.get(worker, [])})
                except BackendUnavailable:
                    raise
                except Exception:
                    log.exception("the feedback of %s cannot be used, and is left aside for a while", worker)
                    self._aside[worker] = time.monotonic() + _ASIDE
        return len(news)

    @property
    def _base(self) -> Published:
        assert self._published is not None
        return self._published

    def _news(self, connection: sa.Connection) -> dict[str, list[Any]]:
        """The outbox's rows of each worker who is not left aside, who has waited longest first."""
        now = time.monotonic()
        self._aside = {worker: until for worker, until in self._aside.items() if until > now}
        news: dict[str, list[Any]] = {}
        query = sa.select(OUTBOX).where(OUTBOX.c.worker_id.not_in(self._aside)).order_by(OUTBOX.c.sequence)
        for row in connection.execute(query.limit(_MOST_NEWS)):
            news.setdefault(row.worker_id, []).append(row)
        return news

    def _since(self) -> list[sa.ColumnElement[bool]]:
        """Which votes count, and are not in the published profiles already."""
        folded = sa.select(FOLDED.c.comparison_id).where(FOLDED.c.folding == self._base.folding)
        return [FEEDBACK.c.counts, FEEDBACK.c.comparison_id.not_in(folded)]

    def _said(self, connection: sa.Connection, workers: list[str]) -> dict[str, list[Any]]:
        names = ("worker_id", "prompt", "chosen", "rejected", "label", "ranking_id")
        query = sa.select(*(FEEDBACK.c[name] for name in names)).where(
            FEEDBACK.c.worker_id.in_(workers), *self._since()
        )
        rows = connection.execute(query.order_by(FEEDBACK.c.worker_id, FEEDBACK.c.created_at, FEEDBACK.c.comparison_id))
        return {worker: list(own) for worker, own in groupby(rows, key=lambda row: str(row.worker_id))}

    def _renew(self, news: dict[str, list[Any]], said: dict[str, list[Any]]) -> None:
        priors = {worker: self._base.get(worker) for worker in news}
        spoken = [worker for worker in news if said.get(worker)]  # the others were forgotten, or folded in, since
        places = self._infer([_evidence(said[worker], priors[worker]) for worker in spoken]) if spoken else []
        of_worker = dict(zip(spoken, places, strict=True))
        with self._database.writing() as connection:
            self._database.lock(connection, news, "profiles")
            sequences = [row.sequence for rows in news.values() for row in rows]
            here = OUTBOX.c.sequence.in_(sequences)
            still = set(connection.scalars(sa.select(OUTBOX.c.worker_id).where(here)))
            stamps = self._stamps(connection, sorted(still & of_worker.keys()), priors)
            profiles = [
                self._profile(worker, of_worker[worker], len(said[worker]), priors[worker], stamp)
                for worker, stamp in stamps.items()
            ]
            if profiles:
                self._push(profiles)
            connection.execute(OUTBOX.delete().where(here))
        done = datetime.now(UTC)
        for worker in still:
            for row in news[worker]:
                LAG.observe(max(0.0, (done - row.created_at).total_seconds()))

    def _stamps(
        self, connection: sa.Connection, workers: list[str], priors: dict[str, Profile | None]
    ) -> dict[str, datetime]:
        """For each worker a time later than that of every profile of theirs; they are kept."""
        theirs, now = STAMP.c.worker_id.in_(workers), self._database.now(connection)
        last = dict(connection.execute(sa.select(STAMP.c.worker_id, STAMP.c.stamped_at).where(theirs)).all())
        stamps: dict[str, datetime] = {}
        for worker in workers:
            prior = priors[worker]
            known = [last.get(worker), None if prior is None else prior.event_timestamp]
            stamps[worker] = max([now, *(stamp + _TICK for stamp in known if stamp is not None)])
        connection.execute(STAMP.delete().where(theirs))
        rows = [{"worker_id": worker, "stamped_at": stamp} for worker, stamp in stamps.items()]
        if rows:
            connection.execute(STAMP.insert(), [row | {"publication": self._base.publication} for row in rows])
        return stamps

    def _profile(self, worker: str, place: Place, said: int, prior: Profile | None, stamp: datetime) -> Profile:
        return Profile(
            worker_id=worker,
            embedding=tuple(place.embedding),
            reliability=place.reliability,
            comparisons=said + (0 if prior is None else prior.comparisons),
            coterie=int(np.argmax(place.posterior)),
            posterior=tuple(place.posterior),
            mixture_version=self._base.mixture_version,
            event_timestamp=stamp,
        )


def _evidence(rows: list[Any], prior: Profile | None) -> Evidence:
    weight = weights([row.ranking_id for row in rows])
    said = [
        Said(prompt=row.prompt, chosen=row.chosen, rejected=row.rejected, tie=row.label == 0.5, weight=w)
        for row, w in zip(rows, weight, strict=True)
    ]
    if prior is None:
        return Evidence(said=said)
    names = Prior.model_fields
    return Evidence(said=said, prior=Prior(**{name: getattr(prior, name) for name in names}))
