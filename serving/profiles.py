"""Worker profiles from Feast's online store, within a deadline."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.errors import BackendUnavailable
from coterie.routing import Profile
from feature_repo.store import lookup, open_store

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger("coterie.serving")

DEADLINE = 0.25
"""Seconds that a lookup may take before the global reward serves."""


class FeastProfiles:
    """A routing.ProfileSource over a Feast store.

    A lookup that misses the deadline goes on in its thread: when all threads hang, further lookups miss theirs at once
    without a new thread each, and all is well again when the store answers or its socket times out.
    """

    def __init__(self, store: FeatureStore, deadline: float = DEADLINE, threads: int = 4) -> None:
        self.store, self.deadline = store, deadline
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="feast")

    @classmethod
    def open(cls, folder: Path, environ: Mapping[str, str] | None = None, deadline: float = DEADLINE) -> FeastProfiles:
        """Open a published folder and connect. A store that does not answer yet is no error: its workers fall back.

        Raises:
            BadData, BadConfiguration: as feature_repo.store.open_store.
        """
        store = open_store(folder, environ)
        try:
            lookup(store, ["nobody"])  # the first lookup connects and imports, which takes longer than any deadline
        except Exception as error:
            log.warning("the profile store does not answer yet: %s: %s", type(error).__name__, error)
        return cls(store, deadline)

    def get(self, worker_ids: Sequence[str]) -> list[Profile | None]:
        """The profile of each worker, None for one who has none. Raises BackendUnavailable after the deadline."""
        waiting = self._threads.submit(lookup, self.store, worker_ids)
        try:
            return waiting.result(self.deadline)
        except TimeoutError as error:
            waiting.cancel()
            raise BackendUnavailable(f"Feast did not answer within {1000 * self.deadline:.0f} ms") from error
        except Exception as error:  # whatever the store's backend raises
            raise BackendUnavailable(f"Feast failed: {type(error).__name__}: {error}") from error
