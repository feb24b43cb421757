"""The table that embed and cluster learn from: a feature difference for each comparison, in the order of the workers.

Comparisons come in any order, and neither they nor the responses' features need fit in memory. The features lie in a
file, of which the rows that a batch needs are read; the differences are dealt to buckets of neighbouring workers, which
are ordered one by one. In memory are a batch, a bucket, 16 bytes a response, and what is known of each worker.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from coterie.contracts import COMPARISON, DIFFERENCE, SPLITS, VECTOR, iterate, matrix, table_of
from coterie.discovery.features import FeatureMap, hashed, missing_vector
from coterie.discovery.votes import CHUNK_ROWS, Array, worker_runs
from coterie.errors import BadData
from coterie.progress import progress

_BATCH = 16384
_AT_A_TIME = 1024  # rows read of a mapped file before it lets go: each may map 64 kB of it
_BUCKET, _MOST_BUCKETS = 131_072, 200  # comparisons that are ordered together; files that are open together


def differences(comparisons: Path, vectors: Path, feature_map: FeatureMap, out: Path) -> list[str]:
    """Write contracts.DIFFERENCE to `out`, ordered by split and worker; a row group holds whole workers of one split.

    Returns:
        The worker ids; a worker's number in the table is its place in this (sorted) list.

    Raises:
        BadData: not a table of comparisons or vectors, no comparison, or a response without a vector.
    """
    file = COMPARISON.open(comparisons)
    workers, counts = _count(comparisons)
    total = int(counts.sum())
    size, starts = max(_BUCKET, total // _MOST_BUCKETS), []
    for split, of_split in enumerate(counts):
        starts += [(split, first) for first, _ in worker_runs(of_split, size)]
    keys = np.array([split * len(workers) + first for split, first in starts])
    columns = ["comparison_id", "worker_id", "prompt_id", "chosen_id", "rejected_id", "split", "label", "ranking_id"]
    with (
        _workplace(out.parent) as folder,
        progress(total=2 * total, desc="differences", unit="comparisons") as bar,
        _Responses(vectors, feature_map, folder) as responses,
    ):
        schema = pa.schema([*(f for f in DIFFERENCE.schema(x=feature_map.size) if f.name != "weight"), _RANKING])
        with ExitStack() as stack:
            sinks = [stack.enter_context(pa.ipc.new_file(str(folder / f"{i}.arrow"), schema)) for i in range(len(keys))]
            for batch in iterate(file, columns, rows=_BATCH):
                rows = _rows(batch, workers, responses, schema)
                split = pc.index_in(rows["split"].cast(pa.string()), pa.array(SPLITS)).to_numpy()
                bucket = np.searchsorted(keys, split * len(workers) + rows["worker"].to_numpy(), side="right") - 1
                for i in np.unique(bucket):
                    sinks[i].write_table(rows.filter(pa.array(bucket == i)))
                bar.update(len(batch))
        with DIFFERENCE.writer(out, {"workers": str(len(workers))}, x=feature_map.size) as writer:
            for i in range(len(keys)):
                with pa.OSFile(str(folder / f"{i}.arrow")) as source:
                    rows = pa.ipc.open_file(source).read_all()
                for group in _row_groups(rows):
                    writer.write_table(group, row_group_size=max(len(group), 1))
                bar.update(len(rows))
    return [str(worker) for worker in workers]


_RANKING = pa.field("ranking", pa.uint64())  # a hash of the ranking that a comparison is a pair of; 0: none


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".differences.", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _count(comparisons: Path) -> tuple[pd.Index[str], Array]:
    """The sorted worker ids, and the comparisons of each in each split, [splits, workers]."""
    found = pd.Series(dtype=np.int64)
    for batch in iterate(COMPARISON.open(comparisons), ["worker_id", "split"], rows=8 * _BATCH):
        frame = pd.DataFrame({name: batch[name].cast(pa.string()).to_pandas() for name in ("worker_id", "split")})
        found = found.add(frame.value_counts(), fill_value=0) if len(found) else frame.value_counts()
    if not len(found):
        raise BadData(f"{comparisons}: there are no comparisons; look at the quarantine of ingest")
    table = found.unstack(fill_value=0).reindex(columns=list(SPLITS), fill_value=0).sort_index()
    return table.index, table.to_numpy().astype(np.int64).T


def _rows(batch: pa.RecordBatch, workers: pd.Index[str], responses: _Responses, schema: pa.Schema) -> pa.Table:
    columns = {
        "comparison_id": batch["comparison_id"],
        "worker": workers.get_indexer(batch["worker_id"].to_pandas()),
        "prompt": (hashed(batch["prompt_id"]) >> np.uint64(1)).astype(np.int64),
        "split": batch["split"],
        "label": batch["label"],
        "x": responses[batch["chosen_id"]] - responses[batch["rejected_id"]],
        "ranking": np.where(batch["ranking_id"].is_valid().to_numpy(False), hashed(batch["ranking_id"]), 0),
    }
    return table_of(columns, schema)


def _row_groups(rows: pa.Table) -> Iterator[pa.Table]:
    """A bucket in the order of its workers, cut into groups of whole workers."""
    worker, ranking = rows["worker"].to_numpy(), rows["ranking"].to_numpy()
    # m responses make m (m - 1) / 2 pairs, which count m - 1 together: see Votes.weight.
    _, of, pairs = np.unique(
        np.stack([worker.astype(np.uint64), ranking]), axis=1, return_inverse=True, return_counts=True
    )
    responses = (1 + np.sqrt(1 + 8 * pairs[of])) / 2
    weight = np.where(ranking == 0, 1.0, 2 / responses).astype(np.float32)
    at = DIFFERENCE.schema(x=rows["x"].type.list_size).names.index("weight")
    rows = rows.drop_columns("ranking").add_column(at, pa.field("weight", pa.float32(), False), pa.array(weight))
    order = np.argsort(worker, kind="stable")
    first = worker.min() if len(worker) else 0
    counts = np.bincount(worker - first)
    ends = np.concatenate(([0], np.cumsum(counts)))
    for start, end in worker_runs(counts, CHUNK_ROWS):
        if ends[end] > ends[start]:
            yield rows.take(pa.array(order[ends[start] : ends[end]])).combine_chunks()


class _Responses:
    """h of every response, in a file; `responses[ids]` are the rows [n, d] float32 of an Arrow array of ids."""

    def __init__(self, vectors: Path, feature_map: FeatureMap, folder: Path) -> None:
        self._vectors, keys = vectors, []
        path = folder / "features.float32"
        with path.open("wb") as sink:
            for batch in iterate(VECTOR.open(vectors), rows=_BATCH):
                sink.write(feature_map.transform(matrix(batch["vector"]), matrix(batch["style"])).tobytes())
                keys.append(hashed(batch["response_id"]))
        found = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        self._order = np.argsort(found)
        self._keys = found[self._order]
        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if len(found) else None
        self._h = np.frombuffer(self._map or b"", np.float32).reshape(-1, feature_map.size)

    def __enter__(self) -> _Responses:
        return self

    def __exit__(self, *_: object) -> None:
        del self._h
        if self._map is not None:
            self._map.close()
        self._file.close()

    def __getitem__(self, ids: pa.Array) -> Array:
        wanted = hashed(ids)
        place = np.minimum(np.searchsorted(self._keys, wanted), max(len(self._keys) - 1, 0))
        missing = self._keys[place] != wanted if len(self._keys) else np.ones(len(wanted), bool)
        if missing.any():
            raise missing_vector(str(ids[int(np.flatnonzero(missing)[0])]), self._vectors)
        rows = np.empty((len(wanted), self._h.shape[1]), np.float32)
        for start in range(0, len(rows), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            rows[part] = self._h[self._order[place[part]]]
            if self._map is not None:
                self._map.madvise(mmap.MADV_DONTNEED)  # what was read stays in the system's cache, not in this process
        return rows
