"""From raw preferences to comparisons: readers, validation, quarantine, pseudonyms, splits, data report."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.ingest.data_report import data_report_markdown
    from coterie.ingest.run import ingest

__all__ = ["data_report_markdown", "ingest"]

_HOME = {"data_report_markdown": "coterie.ingest.data_report", "ingest": "coterie.ingest.run"}


def __getattr__(name: str) -> object:
    """Import on first use: the serving router needs `coterie.ingest.pseudonyms` without pyarrow."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
