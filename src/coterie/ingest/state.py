"""What the sources hold now, in a few bytes: whether a run would read the same again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec

from coterie.ingest.simulated import SCHEME
from coterie.ingest.sources import _expand, _is_database, _is_dataset, remote


def source_state(patterns: list[str]) -> dict[str, str]:
    """Every source and the state of its content: SHA-256 of a local file, an object's version tag, a simulation's name,
    a feedback database's votes.

    A data set of the hub is known by its address: name a revision in it (`?revision=`) where it may change.

    Raises:
        BadData: no such file. BackendUnavailable: an object store that does not answer.
    """
    state = {}
    for pattern in patterns:
        if pattern.startswith(SCHEME) or _is_dataset(pattern):
            state[pattern] = "by name"
            continue
        if _is_database(pattern):
            with remote(pattern):
                from coterie.feedback import reader
            state[pattern] = reader.state(pattern)
            continue
        for name in _expand(pattern):
            with remote(name):
                if "://" in name:
                    system, path = fsspec.core.url_to_fs(name)
                    state[name] = str(system.ukey(path))
                else:
                    with Path(name).open("rb") as file:
                        state[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return state
