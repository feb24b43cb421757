"""Real preferences as votes, split by prompts: what the stages ingest, encode and embed make of them before anything is learned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.real import DATA, SOURCES
from benchmarks.settings import together
from coterie import stages
from coterie.config import EmbedSettings, EncodeSettings, IngestSettings
from coterie.contracts import TEST, TRAIN, VALIDATION
from coterie.discovery import Votes, load_votes
from coterie.discovery.differences import differences
from coterie.discovery.features import fit_features

FILES = {name: tuple(DATA / source for source in sources) for name, sources in SOURCES.items()}


def available() -> list[str]:
    """The real data sets that are there: ukpconvarg1 and tldr."""
    return [name for name, files in FILES.items() if all(file.is_file() for file in files)]


def ready(name: str, seeds: Iterable[int]) -> None:
    """Ingest under these seeds of the split, and encode; what the stages made before is not made again."""
    source = [str(file) for file in FILES[name]]
    for seed in {0, *seeds}:
        settings = IngestSettings(source=source, pseudonyms="none", seed=seed)
        stages.ingest(_folder(name) / f"ingest-{seed}", settings)
    stages.encode(
        _folder(name) / "ingest-0", _folder(name) / "encode", EncodeSettings()
    )  # a vector depends on no split


def _folder(name: str) -> Path:
    return Path(tempfile.gettempdir()) / "coterie-benchmarks" / "study" / name


def real(name: str, seed: int) -> tuple[Votes, Votes]:
    """Training votes, and the votes of the same people on other prompts (those of the splits validation and test).

    Features are standardised and reduced on training responses alone, as the stages do under default settings. Call `ready`
    before several processes call this.

    Args:
        name: of `available`.
        seed: of the split into prompts.
    """
    ready(name, [seed])
    comparisons = _folder(name) / f"ingest-{seed}" / stages.COMPARISONS
    vectors = _folder(name) / "encode" / stages.VECTORS
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / stages.DIFFERENCES
        differences(comparisons, vectors, fit_features(comparisons, vectors, EmbedSettings()), path)
        train, *others = (load_votes(path, split) for split in (TRAIN, VALIDATION, TEST))
    return train, together(others)
