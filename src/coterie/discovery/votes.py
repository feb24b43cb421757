"""Votes: the comparisons of many workers as arrays, ordered by worker."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from coterie.contracts import DIFFERENCE, iterate, matrix
from coterie.errors import BadData

Array = NDArray[Any]

PILOT = 100_000  # comparisons on which an estimator first converges where there are many more


@dataclass(frozen=True)
class Votes:
    """Comparisons with their feature differences, ordered by worker, so that sums over a worker are segment sums.

    Make one with `Votes.of`, which checks and orders; the bare constructor trusts its arguments.

    Attributes:
        x: [n, d] float32, h(chosen) - h(rejected).
        y: [n] float32, 1 (chosen preferred) or .5 (tie).
        worker: [n] int32, ascending.
        prompt: [n] int32, the unit of splitting.
        n_workers: workers are numbered 0 .. n_workers - 1; some may have no votes.
    """

    x: Array
    y: Array
    worker: Array
    prompt: Array
    n_workers: int

    @classmethod
    def of(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        worker: ArrayLike,
        prompt: ArrayLike | None = None,
        n_workers: int | None = None,
    ) -> Self:
        """Check and order votes. Without `prompt` every comparison is a prompt of its own.

        Raises:
            BadData: shapes that do not fit, no votes, numbers that are not finite, labels outside [0, 1], or a worker
                number outside 0 .. n_workers - 1.
        """
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        worker = np.asarray(worker, np.int32)
        prompt = np.arange(len(y), dtype=np.int32) if prompt is None else np.asarray(prompt, np.int32)
        if x.ndim != 2 or not x.shape[1] or not len(x) == len(y) == len(worker) == len(prompt):
            raise BadData(
                f"votes do not fit together: x {x.shape}, y {y.shape}, worker {worker.shape}, prompt {prompt.shape}; "
                "x is [comparisons, features], the others [comparisons]"
            )
        if not len(y):
            raise BadData("there are no comparisons to learn from; look at the splits and at the quarantine of ingest")
        n_workers = int(worker.max()) + 1 if n_workers is None else n_workers
        if worker.min() < 0 or worker.max() >= n_workers:
            raise BadData(f"worker numbers lie in {worker.min()}..{worker.max()}, expected 0..{n_workers - 1}")
        if not np.isfinite(x.sum(dtype=np.float64)):  # one pass, no mask of x's size; a NaN or inf survives the sum
            row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise BadData(f"comparison {row} of worker {worker[row]} has features that are not finite; encode again")
        if not ((y >= 0) & (y <= 1)).all():
            raise BadData("labels lie outside 0..1; 1 says that the chosen response is preferred, .5 is a tie")
        if (np.diff(worker) < 0).any():
            order = np.argsort(worker, kind="stable")
            x, y, worker, prompt = x[order], y[order], worker[order], prompt[order]
        return cls(x, y, worker, prompt, n_workers)

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

    @cached_property
    def present(self) -> Array:
        """[n_workers] bool: who has votes."""
        return self.counts > 0

    @cached_property
    def _starts(self) -> Array:
        return np.flatnonzero(np.diff(self.worker, prepend=-1))

    def sum_by_worker(self, values: Array) -> Array:
        """Sum values [..., n] over each worker's comparisons: [..., n_workers] float64."""
        out = np.zeros((*values.shape[:-1], self.n_workers))
        out[..., self.present] = np.add.reduceat(values, self._starts, axis=-1, dtype=np.float64)
        return out

    def gradients_by_worker(self, residual: Array) -> Array:
        """Sum residual_j x_j over each worker's comparisons: [n_workers, d] float32."""
        bounds = np.concatenate(([0], np.cumsum(self.counts)))
        shape = (self.n_workers, len(self))
        weights = sparse.csr_array((residual.astype(np.float32), np.arange(len(self)), bounds), shape=shape)
        return np.asarray(weights @ self.x)

    def subset(self, mask: Array) -> Votes:
        """The comparisons where mask [n] is true; worker numbers stay as they are."""
        return Votes(self.x[mask], self.y[mask], self.worker[mask], self.prompt[mask], self.n_workers)

    def of_workers(self, workers: Array) -> Votes:
        """The comparisons of some workers, who are renumbered 0 .. len(workers) - 1 in ascending order."""
        chosen = np.zeros(self.n_workers, bool)
        chosen[workers] = True
        number = np.cumsum(chosen, dtype=np.int32) - 1
        part = self.subset(chosen[self.worker])
        return Votes(part.x, part.y, number[part.worker].astype(np.int32), part.prompt, int(chosen.sum()))


def random_workers(votes: Votes, comparisons: int, at_least: int, seed: int) -> Array:
    """Workers, ascending, drawn at random among those who vote, with about so many comparisons together."""
    voting = np.flatnonzero(votes.present)
    size = min(max(at_least, int(comparisons / len(votes) * len(voting))), len(voting))
    return np.sort(np.random.default_rng(seed).choice(voting, size, replace=False))


def load_votes(path: str | Path, splits: Collection[str]) -> Votes:
    """Read the comparisons of some splits from a differences.parquet, ordered by worker.

    The rows go straight to their places, so that the peak is x itself and one batch.

    Raises:
        BadData: not a table of differences, or no comparison in these splits.
    """
    file = DIFFERENCE.open(path)
    head = file.read(columns=["worker", "split"])
    wanted = pc.is_in(head["split"].cast(pa.string()), value_set=pa.array(list(splits), pa.string())).to_numpy()
    worker = head["worker"].to_numpy()
    rows = np.flatnonzero(wanted)
    if not len(rows):
        raise BadData(f"{path}: no comparison in split {' or '.join(splits)}; ingest more prompts or change the shares")
    place = np.full(len(worker), -1)
    place[rows[np.argsort(worker[rows], kind="stable")]] = np.arange(len(rows))
    size = file.schema_arrow.field("x").type.list_size
    x, y = np.empty((len(rows), size), np.float32), np.empty(len(rows), np.float32)
    prompt = np.empty(len(rows), np.int32)
    at = 0
    for batch in iterate(file, ["label", "prompt", "x"], rows=16384):
        target = place[at : at + len(batch)]
        keep = target >= 0
        x[target[keep]] = matrix(batch["x"])[keep]
        y[target[keep]] = batch["label"].to_numpy()[keep]
        prompt[target[keep]] = batch["prompt"].to_numpy()[keep]
        at += len(batch)
    return Votes.of(x, y, np.sort(worker[rows]), prompt, int(worker.max()) + 1)
