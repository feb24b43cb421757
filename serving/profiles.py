"""Worker profiles from Feast's online stores: cached, within a deadline, and left alone while they fail."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.config import ServeSettings
from coterie.errors import BadData
from coterie.routing import Profile
from feature_repo.store import lookup, open_store
from serving.metrics import LOOKUP_SECONDS, LOOKUPS, PAUSED, PROFILES

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger("coterie.serving")

Lookup = Callable[[Sequence[str]], list[tuple[Profile, ...]]]
_THREADS = 4  # lookups at once; when all of them hang, the others miss their deadline without a thread of their own
_TOGETHER = 256  # workers of a lookup


class FeastProfiles:
    """Published folders opened as Feast stores: one, or a folder with one a mixture that is online.

    Profiles of two mixtures of the same worker need a store each: another file, or another Feast project in Redis.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self.folder, self._environ = folder, environ
        self._stores: dict[Path, FeatureStore] = {}

    def open(self) -> None:
        """Open what is not open yet, and connect. A store that does not answer is no error: its workers fall back.

        Raises:
            BadData, BadConfiguration: as feature_repo.store.open_store.
        """
        inside = sorted(file.parent for file in self.folder.glob("*/feature_store.yaml"))
        folders = inside if inside and not (self.folder / "feature_store.yaml").is_file() else [self.folder]
        stores = {
            path: self._stores[path] if path in self._stores else open_store(path, self._environ) for path in folders
        }
        for path in stores.keys() - self._stores.keys():
            try:
                lookup(stores[path], ["nobody"])  # the first connects and imports, which takes longer than any deadline
            except Exception as error:
                log.warning("the profile store does not answer yet: %s: %s", type(error).__name__, error)
        self._stores = stores

    def opened(self) -> Mapping[Path, FeatureStore]:
        """The stores by folder."""
        return self._stores

    def lookup(self, worker_ids: Sequence[str]) -> list[tuple[Profile, ...]]:
        """Each worker's profiles, one a store that has any. Raises whatever the stores' backends raise."""
        if not self._stores:
            raise BadData(f"{self.folder}: not opened yet")
        found = [lookup(store, worker_ids) for store in self._stores.values()]
        return [tuple(profile for profile in of if profile is not None) for of in zip(*found, strict=True)]


class Profiles:
    """A routing.ProfileSource before `lookup`: cached, within a deadline, with a circuit breaker.

    What is younger than `cache_seconds` is served without a lookup; what is older while the store fails, for as long as
    the profile itself is not stale, which the route decides. Lookups that wait while others are on their way are made
    together. After `profile_failures` of them failed in a row the store is left alone for `profile_pause_seconds`; then
    one lookup tries it.

    Args:
        lookup: blocks; runs in threads.
        settings: deadline, size and age of the cache, the breaker's.
        clock: monotonic seconds.
    """

    def __init__(self, lookup: Lookup, settings: ServeSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup, self._settings, self._clock = lookup, settings, clock
        self._cache: OrderedDict[str, tuple[float, tuple[Profile, ...]]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[tuple[Profile, ...]]] = {}
        self._waiting: list[str] = []
        self._flights: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="profiles")
        self._failures, self._closed_until = 0, 0.0

    async def get(self, worker_ids: Sequence[str]) -> list[tuple[Profile, ...] | None]:
        """Each worker's profiles, none for a stranger; None where the store fails and nothing is cached."""
        now, fresh = self._clock(), self._settings.cache_seconds
        found: dict[str, tuple[Profile, ...] | None] = {}
        missing: dict[str, asyncio.Future[tuple[Profile, ...]]] = {}
        for worker in worker_ids:
            since, cached = self._cache.get(worker, (-float("inf"), ()))
            if now - since < fresh:
                found[worker] = cached
                with suppress(KeyError):  # another thread may have forgotten it meanwhile
                    self._cache.move_to_end(worker)
                PROFILES.labels("cache").inc()
            elif (asked := self._ask(worker, now)) is not None:
                missing[worker] = asked
        if missing:
            await asyncio.wait(missing.values(), timeout=self._settings.profile_deadline_ms / 1000)
        for worker in worker_ids:
            if worker in found:
                continue
            asked = missing.get(worker)
            if asked is not None and asked.done() and asked.exception() is None:
                found[worker] = asked.result()
                PROFILES.labels("store").inc()
                continue
            # A stranger who is cached may have a profile by now: only what is known of somebody serves on.
            found[worker] = self._cache.get(worker, (0.0, ()))[1] or None
            PROFILES.labels("old-cache" if found[worker] else "nowhere").inc()
        if any(not asked.done() for asked in missing.values()):
            LOOKUPS.labels("too-late").inc()
            self._failed(f"no answer within {self._settings.profile_deadline_ms:g} ms")
        return [found[worker] for worker in worker_ids]

    def forget(self, worker_id: str) -> None:
        """Drop what is cached of a worker; may be called in any thread."""
        self._cache.pop(worker_id, None)

    def _ask(self, worker: str, now: float) -> asyncio.Future[tuple[Profile, ...]] | None:
        """The lookup that will tell of `worker`; None while the store is left alone."""
        if now < self._closed_until:
            return None
        if worker in self._asked:
            return self._asked[worker]
        if self._failures >= self._settings.profile_failures:  # the pause is over: this one lookup tries the store
            self._closed_until = now + self._settings.profile_pause_seconds
        loop = asyncio.get_running_loop()
        asked = self._asked[worker] = loop.create_future()
        self._waiting.append(worker)
        if len(self._flights) < _THREADS:
            flight = loop.create_task(self._fly())
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)
        return asked

    async def _fly(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            workers, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
            asked = [self._asked[worker] for worker in workers]
            started = self._clock()
            try:
                found = await loop.run_in_executor(self._threads, self._lookup, workers)
            except Exception as error:  # whatever the store's backend raises
                LOOKUPS.labels("failed").inc()
                self._failed(f"{type(error).__name__}: {error}")
                for one in asked:
                    one.set_exception(error)
                    one.exception()  # nobody may be waiting any more
            else:
                took = self._clock() - started
                LOOKUP_SECONDS.observe(took)
                if 1000 * took <= self._settings.profile_deadline_ms:
                    LOOKUPS.labels("answered").inc()
                    self._answered()
                for worker, one, profiles in zip(workers, asked, found, strict=True):
                    one.set_result(profiles)
                    self._keep(worker, profiles)
            finally:
                for worker in workers:
                    self._asked.pop(worker, None)

    def _keep(self, worker: str, profiles: tuple[Profile, ...]) -> None:
        self._cache.pop(worker, None)
        self._cache[worker] = (self._clock(), profiles)  # at the end
        while len(self._cache) > self._settings.cache_workers:
            self._cache.popitem(last=False)

    def _failed(self, why: str) -> None:
        self._failures += 1
        if self._failures < self._settings.profile_failures:
            log.warning("no profiles: %s", why)
            return
        if self._failures == self._settings.profile_failures:
            log.error("no profiles, the store is left alone for a while: %s", why)
        PAUSED.set(1)
        self._closed_until = self._clock() + self._settings.profile_pause_seconds

    def _answered(self) -> None:
        if self._failures >= self._settings.profile_failures:
            log.warning("the profile store answers again")
        self._failures, self._closed_until = 0, 0.0
        PAUSED.set(0)
