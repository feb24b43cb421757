"""Vectors that were computed before, by this run or another one, kept in a SQLite file for each encoder and revision."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coterie.contracts import content_id
from coterie.encoding.encoders import Encoder
from coterie.errors import BackendUnavailable

_ASKED_AT_ONCE = 500


def cache_folder() -> Path:
    """COTERIE_CACHE, or ~/.cache/coterie: what serves other runs is kept here."""
    return Path(os.environ.get("COTERIE_CACHE") or Path.home() / ".cache" / "coterie")


class VectorCache:
    """Vectors by the id of the text they encode. Several processes may read and write at once; a commit survives a kill.

    The file is named by encoder, revision and token limit, so that no vector of another model is ever read.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.dimension = encoder.dimension
        name = content_id(encoder.name, encoder.revision, str(encoder.max_tokens))
        self.path = folder / "vectors" / f"{name}.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (id BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise BackendUnavailable(
                f"the cache of vectors {self.path} cannot be opened ({error}). Delete it if it is damaged, or let "
                "COTERIE_CACHE name a folder that can be written."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def get(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors [dimension] that are there, by id."""
        found = {}
        for start in range(0, len(ids), _ASKED_AT_ONCE):
            part = [bytes.fromhex(i) for i in ids[start : start + _ASKED_AT_ONCE]]
            marks = ",".join("?" * len(part))
            with closing(self._connection.execute(f"SELECT id, vector FROM vectors WHERE id IN ({marks})", part)) as rows:
                for key, blob in rows:
                    found[key.hex()] = np.frombuffer(blob, dtype="<f4")
        return found

    def put(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep vectors [n, dimension]; all of them or, on a kill, none."""
        rows = [(bytes.fromhex(i), v.astype("<f4").tobytes()) for i, v in zip(ids, vectors, strict=True)]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")
