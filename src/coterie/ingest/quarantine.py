"""The refused rows: quarantine.parquet, and what may be kept of each."""

from __future__ import annotations

from typing import Any

import orjson
import pyarrow as pa

from coterie.contracts import QUARANTINE
from coterie.ingest.validation import Refusal, Unreadable


class Quarantine:
    """Collects refused rows into the open quarantine table.

    Attributes:
        reasons: how many rows were refused for each reason.
        places: where each reason was met first.
    """

    def __init__(self, writer: pa.parquet.ParquetWriter) -> None:
        self._writer = writer
        self._pending: list[tuple[str, int, str, str]] = []
        self.reasons: dict[str, int] = {}
        self.places: dict[str, str] = {}

    @property
    def total(self) -> int:
        """How many rows were refused."""
        return sum(self.reasons.values())

    def add(self, refusal: Refusal, source: str, row: str) -> None:
        """Add one refused row; `row` is what may be kept of it."""
        self.reasons[refusal.reason] = self.reasons.get(refusal.reason, 0) + 1
        self.places.setdefault(refusal.reason, f"{source}, line {refusal.line}")
        self._pending.append((source, refusal.line, refusal.reason, row))
        if len(self._pending) >= 1000:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; without any row, an empty table."""
        columns = zip(*self._pending, strict=True) if self._pending else ([], [], [], [])
        arrays = [pa.array(column, field.type) for column, field in zip(columns, QUARANTINE.fields, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=QUARANTINE.schema()))
        self._pending = []


def kept_of(record: object, columns: tuple[str, ...], worker_column: str, pseudonym: str | None) -> str:
    """What quarantine keeps of a refused row: the columns that are read, as JSON, the worker id as its
    pseudonym.

    A line that could not be parsed is kept out: it may hold a worker id in the open. Cut at 10,000
    characters.
    """
    if isinstance(record, Unreadable) or not isinstance(record, dict):
        return ""
    row: dict[str, Any] = {name: record[name] for name in columns if name in record}
    if worker_column in row:
        row[worker_column] = pseudonym
    try:
        text = orjson.dumps(row, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except (orjson.JSONEncodeError, UnicodeError):
        text = ascii(row)  # holds half a surrogate pair, which no JSON in UTF-8 can
    return text[:10_000]
