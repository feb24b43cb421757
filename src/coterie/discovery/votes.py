"""Votes: the comparisons of many workers, ordered by worker, in memory or in a file that is read a chunk at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from threadpoolctl import ThreadpoolController

from coterie.contracts import DIFFERENCE, matrix
from coterie.errors import BadData

Array = NDArray[Any]
Chunk = tuple[slice, "Votes"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_LIMITED = ContextVar(
    "limited", default=False
)  # whether native threads are limited already: asking costs as much as a pass
PILOT = 100_000  # comparisons on which an estimator first converges where there are many more
CHUNK_ROWS = 16_384  # comparisons of a chunk: what is worked on stays in the cache
_PROBE_ROWS, _PROBE_FEATURES = 100_000, 400  # rows of a probe, and rows for each feature of it, at least


class VoteSet(ABC):
    """Comparisons of workers 0 .. n_workers - 1, which are gone through in chunks of whole workers.

    What an estimator needs are sums over comparisons and over the comparisons of a worker, so that a pass over the
    chunks, on all cores, is a step of any of them, and nothing of the size of the comparisons is held.
    """

    n_workers: int

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def n_features(self) -> int:
        """The number of features, d."""

    @property
    @abstractmethod
    def counts(self) -> Array:
        """[n_workers] comparisons of each worker."""

    @abstractmethod
    def _chunks(self) -> list[Callable[[], Chunk]]: ...

    @abstractmethod
    def of_workers(self, workers: Array) -> Votes:
        """The comparisons of some workers, who are renumbered 0 .. len(workers) - 1 in ascending order."""

    @abstractmethod
    def loaded(self) -> Votes:
        """All comparisons, in memory."""

    @property
    @abstractmethod
    def probe(self) -> Votes:
        """An even sample of the comparisons, weighted so that its sums estimate the sums over all: for Hessians, which
        may be rough (sub-sampled Newton), and bounds. All comparisons where they are few."""

    @cached_property
    def present(self) -> Array:
        """[n_workers] bool: who has votes."""
        return np.asarray(self.counts > 0)

    def each(self, function: Callable[[slice, Votes], Result]) -> Iterator[Result]:
        """Yield `function(workers, votes)` for each chunk, in order; `votes` numbers its workers from workers.start.

        Chunks are worked on in threads, one a core, so `function` may only write what belongs to its workers. Workers
        without votes may be in no chunk.
        """
        chunks = self._chunks()
        with one_thread():
            if len(chunks) == 1:
                yield function(*chunks[0]())
                return
            yield from in_threads(lambda chunk: function(*chunk()), chunks)

    def total(self, function: Callable[[slice, Votes], Array]) -> Array:
        """The sum of `function(workers, votes)`, as in `each`, over the chunks; the same sum whatever the threads did."""
        return np.asarray(sum(self.each(function)))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order, on all cores."""
    with ThreadPoolExecutor(_cores()) as pool:
        yield from pool.map(function, items)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, BLAS and OpenMP use one thread. Their own threads wait for each other at every thin product and every k-means
    of ours, which on a busy machine takes many times what they save."""
    if _LIMITED.get():
        yield
        return
    token = _LIMITED.set(True)
    try:
        with _pools().limit(limits=1):
            yield
    finally:
        _LIMITED.reset(token)


@lru_cache(maxsize=1)
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Votes(VoteSet):
    """Comparisons with their feature differences, in memory, so that sums over a worker are segment sums.

    Make one with `Votes.of`, which checks and orders; the bare constructor trusts its arguments.

    Attributes:
        x: [n, d] float32, h(chosen) - h(rejected).
        y: [n] float32, 1 (chosen preferred) or .5 (tie).
        worker: [n] int32, ascending.
        prompt: [n] int64, the unit of splitting.
        n_workers: workers are numbered 0 .. n_workers - 1; some may have no votes.
        weight: [n] float32, what a comparison counts in a likelihood; None: 1 each. The m (m - 1) / 2 pairs of a ranking
            of m responses count 2 / m each, together m - 1, as many as its free choices (a composite likelihood; Varin,
            Reid and Firth 2011, Statistica Sinica 21).
    """

    x: Array
    y: Array
    worker: Array
    prompt: Array
    n_workers: int
    weight: Array | None = None

    @classmethod
    def of(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        worker: ArrayLike,
        prompt: ArrayLike | None = None,
        n_workers: int | None = None,
        weight: ArrayLike | None = None,
    ) -> Self:
        """Check and order votes. Without `prompt` every comparison is a prompt of its own.

        Raises:
            BadData: shapes that do not fit, no votes, numbers that are not finite, labels outside [0, 1], or a worker
                number outside 0 .. n_workers - 1.
        """
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        worker = np.asarray(worker, np.int32)
        prompt = np.arange(len(y), dtype=np.int64) if prompt is None else np.asarray(prompt, np.int64)
        weight = None if weight is None else np.asarray(weight, np.float32)
        lengths = {len(y), len(worker), len(prompt), len(y if weight is None else weight)}
        if x.ndim != 2 or not x.shape[1] or lengths != {len(x)}:
            raise BadData(
                f"votes do not fit together: x {x.shape}, y {y.shape}, worker {worker.shape}, prompt {prompt.shape}; "
                "x is [comparisons, features], the others [comparisons]"
            )
        if not len(y):
            raise BadData("there are no comparisons to learn from; look at the splits and at the quarantine of ingest")
        n_workers = int(worker.max()) + 1 if n_workers is None else n_workers
        if worker.min() < 0 or worker.max() >= n_workers:
            raise BadData(f"worker numbers {worker.min()}..{worker.max()}, expected 0..{n_workers - 1}")
        if not np.isfinite(x.sum(dtype=np.float64)):  # one pass, no mask of x's size; a NaN or inf survives the sum
            row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise BadData(f"comparison {row} of worker {worker[row]} has features that are not finite; encode again")
        if not ((y >= 0) & (y <= 1)).all():
            raise BadData("labels lie outside 0..1; 1 says that the chosen response is preferred, .5 is a tie")
        if (np.diff(worker) < 0).any():
            order = np.argsort(worker, kind="stable")
            x, y, worker, prompt = x[order], y[order], worker[order], prompt[order]
            weight = None if weight is None else weight[order]
        return cls(x, y, worker, prompt, n_workers, weight)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def n_features(self) -> int:
        """The number of features, d."""
        return int(self.x.shape[1])

    @cached_property
    def counts(self) -> Array:
        """[n_workers] comparisons of each worker."""
        return np.bincount(self.worker, minlength=self.n_workers)

    @property
    def probe(self) -> Votes:
        """An even sample of the comparisons, as VoteSet says."""
        stride = probe_stride(len(self), self.n_features)
        if stride == 1:
            return self  # not kept: votes that hold themselves would stay in memory until cycles are looked for
        weight = np.full(len(self.y[::stride]), stride, np.float32)
        rows = slice(None, None, stride)
        return Votes(
            self.x[rows], self.y[rows], self.worker[rows], self.prompt[rows], self.n_workers,
            weight if self.weight is None else weight * self.weight[rows],
        )  # fmt: skip

    def _chunks(self) -> list[Callable[[], Chunk]]:
        if len(self) <= 2 * CHUNK_ROWS:
            return [lambda: (slice(0, self.n_workers), self)]
        bounds = np.concatenate(([0], np.cumsum(self.counts)))
        return [partial(self._part, first, end, bounds) for first, end in worker_runs(self.counts, CHUNK_ROWS)]

    def _part(self, first: int, end: int, bounds: Array) -> Chunk:
        rows = slice(bounds[first], bounds[end])
        weight = None if self.weight is None else self.weight[rows]
        part = Votes(
            self.x[rows], self.y[rows], self.worker[rows] - np.int32(first), self.prompt[rows], end - first, weight
        )
        return slice(first, end), part

    @cached_property
    def _starts(self) -> Array:
        return np.flatnonzero(np.diff(self.worker, prepend=-1))

    def weighted(self, values: Array) -> Array:
        """Values [..., n] times what each comparison counts."""
        return values if self.weight is None else values * self.weight

    def sum_by_worker(self, values: Array) -> Array:
        """Sum values [..., n] over each worker's comparisons: [..., n_workers] float64."""
        out = np.zeros((*values.shape[:-1], self.n_workers))
        if len(self):
            out[..., self.present] = np.add.reduceat(values, self._starts, axis=-1, dtype=np.float64)
        return out

    def gradients_by_worker(self, residual: Array) -> Array:
        """Sum residual_j x_j over each worker's comparisons: [n_workers, d] float32."""
        bounds = np.concatenate(([0], np.cumsum(self.counts)))
        shape = (self.n_workers, len(self))
        weights = sparse.csr_array((residual.astype(np.float32), np.arange(len(self)), bounds), shape=shape)
        return np.asarray(weights @ self.x)

    def loaded(self) -> Votes:
        """Itself."""
        return self

    def subset(self, mask: Array) -> Votes:
        """The comparisons where mask [n] is true; worker numbers stay as they are."""
        weight = None if self.weight is None else self.weight[mask]
        return Votes(self.x[mask], self.y[mask], self.worker[mask], self.prompt[mask], self.n_workers, weight)

    def answered(self, y: Array) -> Votes:
        """The same comparisons with other answers y [n] float32."""
        return Votes(self.x, y, self.worker, self.prompt, self.n_workers, self.weight)

    def of_workers(self, workers: Array) -> Votes:
        """The comparisons of some workers, who are renumbered 0 .. len(workers) - 1 in ascending order."""
        chosen = np.zeros(self.n_workers, bool)
        chosen[workers] = True
        number = np.cumsum(chosen, dtype=np.int32) - 1
        part = self.subset(chosen[self.worker])
        worker = number[part.worker].astype(np.int32)
        return Votes(part.x, part.y, worker, part.prompt, int(chosen.sum()), part.weight)


def probe_stride(rows: int, features: int) -> int:
    """Every how-manieth comparison makes up a probe."""
    return max(1, rows // max(_PROBE_ROWS, _PROBE_FEATURES * features))


def worker_runs(counts: Array, rows: int) -> list[tuple[int, int]]:
    """Cut workers 0 .. n - 1 into runs [first, end) of about `rows` comparisons; counts [n] are theirs."""
    run = np.cumsum(counts) // rows
    firsts = np.flatnonzero(np.diff(run, prepend=-1)).tolist()
    return list(zip(firsts, [*firsts[1:], len(counts)][: len(firsts)], strict=True))


def random_workers(votes: VoteSet, comparisons: int, at_least: int, seed: int) -> Array:
    """Workers, ascending, drawn at random among those who vote, with about so many comparisons together."""
    voting = np.flatnonzero(votes.present)
    size = min(max(at_least, int(comparisons / max(len(votes), 1) * len(voting))), len(voting))
    return np.sort(np.random.default_rng(seed).choice(voting, size, replace=False))


class VoteFile(VoteSet):
    """The comparisons of one split in a differences.parquet; of x, a chunk for each core is in memory at a time.

    The file is ordered by split and worker, and a row group holds whole workers of one split (discovery/differences.py).

    Args:
        path: the file.
        split: which comparisons.

    Raises:
        BadData: not a table of differences, or no comparison in this split.
    """

    def __init__(self, path: Path, split: str) -> None:
        file = DIFFERENCE.open(path)
        self._path, names = path, file.schema_arrow.names
        self._size = int(file.schema_arrow.field("x").type.list_size)
        self.n_workers = int(DIFFERENCE.metadata(path)["workers"])
        at = {name: i for i, name in enumerate(names)}
        self._groups = []
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            if described.column(at["split"]).statistics.min == split:
                worker = described.column(at["worker"]).statistics
                self._groups.append((group, worker.min, worker.max + 1))
        if not self._groups:
            raise BadData(
                f"{path}: no comparison in split {split}. Whole prompts are held out: ingest three prompts or more, larger "
                "shares of them (ingest.validation_share, ingest.test_share), or without splits of the source's own"
            )

    @staticmethod
    def splits(path: Path) -> list[str]:
        """The splits of which there are comparisons, in the file's order."""
        file = DIFFERENCE.open(path)
        at = file.schema_arrow.names.index("split")
        groups = (file.metadata.row_group(i).column(at).statistics.min for i in range(file.num_row_groups))
        return list(dict.fromkeys(groups))

    @cached_property
    def counts(self) -> Array:
        """[n_workers] comparisons of each worker."""
        counts = np.zeros(self.n_workers, np.int64)
        file = DIFFERENCE.open(self._path)
        for group, _, _ in self._groups:
            worker = file.read_row_group(group, columns=["worker"])["worker"].to_numpy()
            counts += np.bincount(worker, minlength=self.n_workers)
        return counts

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def n_features(self) -> int:
        """The number of features, d."""
        return self._size

    def _read(self, group: int, first: int, end: int) -> Chunk:
        """A file of its own for each reading: readers are not for several threads."""
        table = DIFFERENCE.open(self._path).read_row_group(group, columns=["worker", "prompt", "label", "weight", "x"])
        weight = table["weight"].to_numpy()
        votes = Votes(
            matrix(table["x"]),
            table["label"].to_numpy(),
            table["worker"].to_numpy() - np.int32(first),
            table["prompt"].to_numpy(),
            end - first,
            None if (weight == 1).all() else weight,
        )
        return slice(first, end), votes

    def _chunks(self) -> list[Callable[[], Chunk]]:
        return [partial(self._read, *place) for place in self._groups]

    @cached_property
    def probe(self) -> Votes:
        """An even sample of the comparisons, as VoteSet says."""
        stride = probe_stride(len(self), self.n_features)

        def thin(workers: slice, votes: Votes) -> Votes:
            part = votes.subset(np.arange(len(votes)) % stride == 0)
            weight = np.float32(stride) * (np.ones(len(part), np.float32) if part.weight is None else part.weight)
            return Votes(part.x, part.y, part.worker + np.int32(workers.start), part.prompt, self.n_workers, weight)

        return joined(list(self.each(thin)), self.n_workers)

    def of_workers(self, workers: Array) -> Votes:
        """The comparisons of some workers, who are renumbered 0 .. len(workers) - 1 in ascending order."""
        workers = np.unique(workers)

        def pick(here: slice, votes: Votes) -> Votes:
            wanted = workers[(workers >= here.start) & (workers < here.stop)]
            part = votes.of_workers(wanted - here.start)
            before = np.int32(np.searchsorted(workers, here.start))
            return Votes(part.x, part.y, part.worker + before, part.prompt, len(workers), part.weight)

        return joined(list(self.each(pick)), len(workers))

    def loaded(self) -> Votes:
        """All comparisons, in memory."""
        return self.of_workers(np.arange(self.n_workers))


def joined(parts: Sequence[Votes], n_workers: int) -> Votes:
    """Votes one after the other, whose workers have numbers of one numbering and ascend."""
    columns = ("x", "y", "worker", "prompt")
    x, y, worker, prompt = (np.concatenate([getattr(part, name) for part in parts]) for name in columns)
    weight = None
    if any(part.weight is not None for part in parts):
        weights = [np.ones(len(part), np.float32) if part.weight is None else part.weight for part in parts]
        weight = np.concatenate(weights)
    return Votes(x, y, worker, prompt, n_workers, weight)


def load_votes(path: str | Path, split: str) -> Votes:
    """Read the comparisons of a split from a differences.parquet into memory.

    Raises:
        BadData: not a table of differences, or no comparison in this split.
    """
    return VoteFile(Path(path), split).loaded()
