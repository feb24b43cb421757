"""comparisons.parquet, written while the sources are read, and put right afterwards where that is needed.

Every vote that was not there before is written at once, with the split that its prompt has where there are many prompts.
When all are read, it is known whether a prompt's split is another: there are few prompts, or the source brings splits of
its own, and not one for each. Mostly there is none, and the draft is the result. Otherwise the result is a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coterie.config import IngestSettings
from coterie.contracts import COMPARISON, SPLITS
from coterie.ingest import splits
from coterie.ingest.data_report import DataReport
from coterie.ingest.duplicates import Flags, Seen
from coterie.ingest.identifiers import Voters, first_64_bits, hash_texts, hex_column
from coterie.ingest.splits import Codes, Hashes
from coterie.ingest.validation import Votes
from coterie.progress import progress

GROUP_ROWS, GROUP_BYTES = 20_000, 32_000_000  # of a row group, whichever comes first
_GIVEN = {None: splits.UNKNOWN} | {name: code for code, name in enumerate(SPLITS)}
_SCHEMA, _SPLITS = COMPARISON.schema(), pa.array(SPLITS)
_SPLIT = _SCHEMA.get_field_index("split")


class Draft:
    """The votes of the sources as they come; `finish` makes the result of them.

    Attributes:
        rows: how many votes came.
    """

    def __init__(self, path: Path, settings: IngestSettings, metadata: dict[str, str]) -> None:
        self.rows = 0
        self._path, self._seed, self._metadata = path, settings.seed, metadata
        self._shares = settings.validation_share, settings.test_share
        self._voters, self._seen, self._report = Voters(), Seen(), DataReport()
        self._rows: list[tuple[Hashes, Codes, Codes, Flags]] = []  # prompt, split, the source's own split, whether new
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the draft for writing."""
        with COMPARISON.writer(self._path, self._metadata) as self._writer:
            yield
            self._flush()

    def write(self, votes: Votes, source: str) -> None:
        """Add votes of one source."""
        size = len(votes.worker)
        prompts, chosen, rejected = hash_texts(votes.prompt, votes.chosen, votes.rejected)
        workers = self._voters.numbers(votes.worker)
        ids = self._voters.combine(workers, np.array(votes.label), chosen, rejected)
        prompt_ids = hex_column(prompts)
        if votes.prompt_id is not None:
            prompt_ids = pc.coalesce(pa.array(votes.prompt_id, pa.string()), prompt_ids)
        hashes = splits.prompt_hashes(prompt_ids, self._seed)
        given = np.full(size, splits.UNKNOWN, np.int8)
        if votes.split is not None:
            given[:] = [_GIVEN[split] for split in votes.split]
        codes = np.where(given == splits.UNKNOWN, splits.by_hash(hashes, *self._shares), given)
        columns = {
            "comparison_id": hex_column(ids),
            "worker_id": votes.worker,
            "prompt": votes.prompt,
            "prompt_id": prompt_ids,
            "chosen": votes.chosen,
            "rejected": votes.rejected,
            "chosen_id": hex_column(chosen),
            "rejected_id": hex_column(rejected),
            "pair_id": hex_column(chosen ^ rejected),
            "label": votes.label,
            "ranking_id": votes.ranking_id,
            "shown_first": votes.shown_first,
            "split": _split_column(codes),
            "confidence": votes.confidence,
            "source": pa.repeat(source, size),
            "created_at": votes.created_at,
        }
        arrays = [_array(columns[field.name], field.type, size) for field in _SCHEMA]
        batch, new = pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA), self._seen.add(first_64_bits(ids))
        if not new.all():
            batch, workers, chosen, rejected = batch.filter(pa.array(new)), workers[new], chosen[new], rejected[new]
        self._report.update(batch, workers, chosen, rejected)
        self._rows.append((hashes, codes, given, new))
        self.rows += size
        self._pending.append(batch)
        self._pending_rows, self._pending_bytes = self._pending_rows + len(batch), self._pending_bytes + batch.nbytes
        if self._pending_rows >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write what is pending as a row group."""
        if self._pending_rows:
            self._writer.write_table(pa.Table.from_batches(self._pending))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def finish(self, path: Path) -> dict[str, Any]:
        """Put the comparisons, each prompt in one split, at `path`; return the report on them."""
        hashes, drafted, given, new = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        del self._rows, self._seen, self._voters
        prompts, position = np.unique(hashes, return_inverse=True)
        codes = splits.assign_splits(prompts, *self._shares)
        in_several = splits.honour_given(codes, position, given)
        split = codes[position][new]
        if np.array_equal(split, drafted[new]):
            self._path.replace(path)
        else:
            self._copy(path, split)
        report = self._report.result(*(np.bincount(held, minlength=len(SPLITS)) for held in (codes, split)))
        report["duplicates"] = len(new) - int(new.sum())
        if in_several:
            report["warnings"].append(
                f"{in_several} prompts stood in several of the source's splits; each is now in the most held-out"
            )
        return report

    def _copy(self, path: Path, split: Codes) -> None:
        """Copy the draft to `path`, with the given splits."""
        start = 0
        with (
            pq.ParquetFile(self._path) as draft,  # not mapped into memory, where the pages read would count as used
            COMPARISON.writer(path, self._metadata) as writer,
            progress(total=len(split), desc="write", unit="rows") as bar,
        ):
            for group in range(draft.num_row_groups):
                table = draft.read_row_group(group)
                column = _split_column(split[start : start + len(table)])
                writer.write_table(table.set_column(_SPLIT, _SCHEMA.field(_SPLIT), column))
                start += len(table)
                bar.update(len(table))


@contextmanager
def drafting(path: Path, settings: IngestSettings, metadata: dict[str, str]) -> Iterator[Draft]:
    """A draft whose file is gone afterwards, whatever happens."""
    try:
        yield Draft(path, settings, metadata)
    finally:
        path.unlink(missing_ok=True)


def _split_column(codes: Codes) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), _SPLITS)


def _array(values: Any, kind: pa.DataType, size: int) -> pa.Array:
    if values is None:
        return pa.nulls(size, kind)
    return values if isinstance(values, pa.Array) else pa.array(values, kind)
