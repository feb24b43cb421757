"""Vectors that were computed before, by this run or another one, kept in a SQLite file for each encoder."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from coterie.contracts import content_id
from coterie.encoding.encoders import Encoder
from coterie.errors import BackendUnavailable

_ASKED_AT_ONCE = 500  # SQLite's oldest limit on parameters is 999
_PATIENCE = 60.0  # seconds that one process waits for another's commit


class Cached(NamedTuple):
    """A vector [dimension], and whether its text was cut at the encoder's limit."""

    vector: NDArray[np.float32]
    cut: bool


class VectorCache:
    """Vectors by the id of the text that they encode.

    Several processes may read and write at once; what is committed survives a kill. The file is named by all that a
    vector depends on besides the text, so that no vector of another model is ever read. The journal is SQLite's
    default and not WAL, which does not work on network file systems.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        """Open the encoder's file in `folder`, or begin it. Raises BackendUnavailable."""
        name = content_id(encoder.name, encoder.revision, str(encoder.max_tokens), encoder.precision)
        self.path = folder / "vectors" / f"{name}.sqlite"
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_PATIENCE)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS vectors "
                    "(id BLOB PRIMARY KEY, vector BLOB NOT NULL, cut INTEGER NOT NULL)"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, ids: Sequence[str]) -> dict[str, Cached]:
        """What is there of the ids, by id. Raises BackendUnavailable."""
        found = {}
        with self._explained():
            for start in range(0, len(ids), _ASKED_AT_ONCE):
                part = [bytes.fromhex(name) for name in ids[start : start + _ASKED_AT_ONCE]]
                marks = ",".join("?" * len(part))
                query = f"SELECT id, vector, cut FROM vectors WHERE id IN ({marks})"
                for key, blob, cut in self._connection.execute(query, part).fetchall():
                    found[key.hex()] = Cached(np.frombuffer(blob, dtype="<f4"), bool(cut))
        return found

    def put(self, new: dict[str, Cached]) -> None:
        """Keep vectors by id; all of them or, on a kill, none. Raises BackendUnavailable."""
        rows = [(bytes.fromhex(name), item.vector.astype("<f4").tobytes(), item.cut) for name, item in new.items()]
        with self._explained(), self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise BackendUnavailable(
                f"the cache of vectors {self.path} cannot be used: {error}. Free some space if the disk is full, "
                "delete the file if it is damaged, or let COTERIE_CACHE name a folder that can be written."
            ) from error
