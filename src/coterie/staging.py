"""What all stages share: whole results or none, no work twice, errors in words.

A stage writes into a temporary folder that takes the place of its result only when everything is there, beside a
stage.json with the key of what made it: settings, the content of the inputs, the source that ran. A stage whose result
already has that key does no work; with COTERIE_STAGE_CACHE set, neither does one that any run has done before.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coterie.config import Settings
from coterie.contracts import write_text
from coterie.errors import BadData, CoterieError, RunFailed

log = logging.getLogger("coterie")

STAGE_FILE, METRICS_FILE = "stage.json", "metrics.json"

Work = Callable[[Path], dict[str, Any]]


def stage(
    name: str,
    settings: Settings,
    inputs: Mapping[str, Path],
    out: Path,
    work: Work,
    identity: Callable[[], Mapping[str, Any]] = dict,
    reuse: bool = True,
) -> dict[str, Any]:
    """Do `work` into a temporary folder that becomes `out`, unless `out` or the cache holds the result already."""
    with leaving_word(name), _disk_in_words(name, out):
        for label, path in inputs.items():
            if not path.exists():
                raise BadData(f"{name}: {label} {path} does not exist; run the stage that writes it first")
        key = _key(name, settings, inputs, identity())
        if reuse and record_of(out).get("key") == key:
            log.info("%s: up to date", name)
            return read_metrics(out)
        kept = _cached(name, key) if reuse else None
        if kept is not None and record_of(kept).get("key") == key:
            log.info("%s: done before, taken from the cache", name)
            _place(out, lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True))
            return read_metrics(out)
        log.info("%s: started", name)
        _place(out, lambda folder: _perform(name, key, settings, work, folder))
        if kept is not None:
            _place(kept, lambda folder: shutil.copytree(out, folder, dirs_exist_ok=True))
        log.info("%s: done in %.1f s", name, record_of(out)["seconds"])
        return read_metrics(out)


@contextmanager
def _disk_in_words(name: str, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RunFailed(
            f"{name}: the disk below {out.parent} is full. Free some space; nothing half-written was left."
            if full
            else f"{name}: {out} cannot be written: {error}. Check the folder and its rights."
        ) from error


def _perform(name: str, key: str, settings: Settings, work: Work, folder: Path) -> None:
    started = time.monotonic()
    metrics = work(folder)
    record = {
        "schema_version": 1,
        "stage": name,
        "key": key,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "volatile": metrics.pop("volatile", {}),
    }
    write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False))
    write_text(folder / STAGE_FILE, json.dumps(record, indent=1, sort_keys=True))


def _place(out: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a temporary folder beside `out`, then put it in the place of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_away_killed(out)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{part}") for part in ("part", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_away_killed(out: Path) -> None:
    """Remove what processes that were killed left beside `out`."""
    for folder in (*out.parent.glob(f".{out.name}.*.part"), *out.parent.glob(f".{out.name}.*.old")):
        try:
            os.kill(int(folder.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError, IndexError):
            continue  # somebody else's, who may be at work


def _key(name: str, settings: Settings, inputs: Mapping[str, Path], identity: Mapping[str, Any]) -> str:
    parts = {
        "stage": name,
        "settings": settings.model_dump(mode="json"),
        "source": source_digest(),
        "inputs": {label: content_digest(path) for label, path in inputs.items()},
        "identity": identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names; stage.json, which holds times, does not count."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        if part.name != STAGE_FILE and part.suffix != ".pyc":
            digest.update(f"{part.relative_to(path)}\0{content_digest(part)}\0".encode())
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """SHA-256 of the library's own source: another version of the code is another result."""
    return content_digest(Path(__file__).parent)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what shapes a result, for stage.json and metrics.json."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        "coterie",
        "numpy",
        "scipy",
        "scikit-learn",
        "pyarrow",
        "torch",
        "transformers",
        "sentence-transformers",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a stage's folder. Raises BadData where it is missing or damaged."""
    try:
        metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadData(f"{folder}: no readable {METRICS_FILE}; it is not the folder of a finished stage") from error
    return metrics


def record_of(folder: Path) -> dict[str, Any]:
    """stage.json of a stage's folder; empty where there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


def _cached(name: str, key: str) -> Path | None:
    root = os.environ.get("COTERIE_STAGE_CACHE")
    return Path(root) / name / key if root else None


@contextmanager
def leaving_word(name: str) -> Iterator[None]:
    """Tell a waiting `coterie run`, which sees the exit of a component's process only, what goes wrong within."""
    try:
        yield
    except CoterieError as error:
        folder = os.environ.get("COTERIE_RUN_FOLDER")
        if folder:
            word = {"stage": name, "type": type(error).__name__, "message": str(error)}
            write_text(Path(folder) / "failure.json", json.dumps(word, indent=1))
        raise
