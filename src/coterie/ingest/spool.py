"""What lies between the two passes of ingest.

The first pass reads the sources once and writes the votes, with their ids, to a temporary file beside the
result; of each row only two 64-bit hashes stay in memory. Then it is known which rows are duplicates and
which prompts there are, and the second pass copies the file into comparisons.parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from coterie.contracts import COMPARISON, QUARANTINE, SPLITS
from coterie.ingest import splits
from coterie.ingest.identifiers import combine_votes, first_64_bits, hash_texts, hex_column
from coterie.ingest.validation import Refusal, Unreadable, Vote

BATCH_ROWS, BATCH_CHARACTERS = 20_000, 4_000_000  # small: memory touched for the first time is slow
_SCHEMA = pa.schema([field for field in COMPARISON.fields if field.name != "split"])
_GIVEN = {None: splits.UNKNOWN} | {name: code for code, name in enumerate(SPLITS)}


class Spool:
    """Writes votes to a temporary Arrow file, batch by batch; afterwards the hashes of all rows are
    attributes.

    Attributes:
        votes: after `close`, the first 64 bits of each row's comparison_id, in file order.
        prompts: after `close`, each row's prompt hash.
        given: after `close`, the split that the source gave each row (splits.UNKNOWN where none).
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed
        self._sink = pa.OSFile(str(path), "wb")
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_stream(self._sink, _SCHEMA, options=options)
        self._pending: list[Vote] = []
        self._sources: list[str] = []
        self._characters = 0
        self._hashes: list[tuple[splits.Hashes, splits.Hashes, splits.Codes]] = []

    def extend(self, votes: list[Vote], source: str) -> None:
        """Add votes of one source."""
        self._pending += votes
        self._sources += [source] * len(votes)
        self._characters += sum([len(vote[1]) + len(vote[2]) + len(vote[3]) for vote in votes])
        if len(self._pending) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        (
            workers,
            prompts,
            chosen,
            rejected,
            labels,
            prompt_ids,
            rankings,
            shown,
            confidences,
            given,
            times,
        ) = zip(*self._pending, strict=True)
        prompt_digests, first, second = hash_texts(zip(prompts, chosen, rejected, strict=True))
        ids = combine_votes(workers, labels, first, second)
        prompt_column = hex_column(prompt_digests)
        if any(prompt_ids):
            prompt_column = pa.compute.coalesce(pa.array(prompt_ids, pa.string()), prompt_column)
        columns = {
            "comparison_id": hex_column(ids),
            "worker_id": workers,
            "prompt": prompts,
            "prompt_id": prompt_column,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_id": hex_column(first),
            "rejected_id": hex_column(second),
            "pair_id": hex_column(first ^ second),
            "label": labels,
            "ranking_id": rankings,
            "shown_first": shown,
            "confidence": confidences,
            "source": self._sources,
            "created_at": times,
        }
        arrays = [
            columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type)
            for f in _SCHEMA
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
        codes = np.fromiter(map(_GIVEN.__getitem__, given), dtype=np.int8, count=len(given))
        self._hashes.append((first_64_bits(ids), splits.prompt_hashes(prompt_column, self._seed), codes))
        self._pending, self._sources, self._characters = [], [], 0

    def close(self) -> None:
        """Write what is left and gather the hashes."""
        self._flush()
        self._writer.close()
        self._sink.close()
        parts = self._hashes or [(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int8))]
        self.votes, self.prompts, self.given = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._hashes = []

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Read back what was written, in order."""
        with pa.OSFile(str(self._path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader

    def discard(self) -> None:
        """Remove the temporary file."""
        self._sink.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def spooling(path: Path, seed: int) -> Iterator[Spool]:
    """A spool whose file is gone afterwards, whatever happens."""
    spool = Spool(path, seed)
    try:
        yield spool
    finally:
        spool.discard()


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
