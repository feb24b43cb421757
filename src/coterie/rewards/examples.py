"""Comparisons as texts: what reward adapters are trained and judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from coterie.contracts import COMPARISON, DIFFERENCE, batched, replacing
from coterie.discovery.votes import Array
from coterie.errors import BadData
from coterie.rewards.heads import SMALLEST_RESPONSIBILITY

_REFERENCE = 512  # responses that a reward is centred on
_BATCH = 4096


def reference_rows(responses: int) -> Array:
    """Which of all distinct responses, in the order of their ids, rewards are centred on."""
    return np.random.default_rng(0).choice(responses, min(_REFERENCE, responses), replace=False)


@dataclass(frozen=True)
class TextComparisons:
    """The comparisons of all splits, and what they count for one audience.

    Attributes:
        response_ids, prompts, responses: of the distinct responses, [m].
        chosen, rejected: rows of the two responses of each comparison, [n].
        split, worker, label: [n], as in contracts.DIFFERENCE.
        weight: [n] responsibility for the worker times what the comparison counts; 0 below SMALLEST_RESPONSIBILITY.
        reliability: [n] beta of the worker.
    """

    response_ids: Array
    prompts: list[str]
    responses: list[str]
    chosen: Array
    rejected: Array
    split: Array
    worker: Array
    label: Array
    weight: Array
    reliability: Array

    @classmethod
    def read(cls, embedded: Path, comparisons: Path, audience: Array, reliability: Array) -> Self:
        """Read them in the order of differences.parquet.

        Args:
            embedded: folder of the embed stage.
            comparisons: comparisons.parquet.
            audience: responsibility for each worker [n_workers].
            reliability: beta_i of each worker [n_workers].

        Raises:
            BadData: an input is missing, or the two are of different runs.
        """
        difference = DIFFERENCE.read(
            embedded / "differences.parquet", ["comparison_id", "worker", "split", "label", "weight"]
        )
        texts = COMPARISON.read(
            comparisons, ["comparison_id", "prompt", "chosen", "rejected", "chosen_id", "rejected_id"]
        )
        where = pc.index_in(difference["comparison_id"], texts["comparison_id"].combine_chunks()).combine_chunks()
        if where.null_count:
            raise BadData(f"{comparisons}: not the comparisons that {embedded} was made of. Run embed again.")
        texts = texts.take(where)
        sides = [texts[name].to_pandas() for name in ("chosen_id", "rejected_id")]
        codes, ids = pd.factorize(pd.concat(sides, ignore_index=True), sort=True)
        first = np.unique(codes, return_index=True)[1]  # where each response occurs first, in chosen and then rejected
        n, worker = len(texts), difference["worker"].to_numpy()
        answers = pa.chunked_array([*texts["chosen"].chunks, *texts["rejected"].chunks])
        posterior = np.where(audience < SMALLEST_RESPONSIBILITY, 0.0, audience)
        return cls(
            response_ids=ids.to_numpy(dtype=object),
            prompts=texts["prompt"].take(pa.array(first % n)).to_pylist(),
            responses=answers.take(pa.array(first)).to_pylist(),
            chosen=codes[:n],
            rejected=codes[n:],
            split=difference["split"].cast(pa.string()).to_numpy(),
            worker=worker,
            label=difference["label"].to_numpy(),
            weight=posterior[worker] * difference["weight"].to_numpy(),
            reliability=reliability[worker],
        )

    def counted(self, split: str) -> Array:
        """Rows of the comparisons of a split that count."""
        return np.flatnonzero((self.split == split) & (self.weight > 0))

    @property
    def reference(self) -> Array:
        """Rows of the responses that rewards are centred on: the same for every audience."""
        return reference_rows(len(self.response_ids))

    def write(self, path: Path, rows: Array, tokens: Sequence[Any]) -> None:
        """Write comparisons, with the `tokens` [m] of the responses, as `launch.Job` describes them, and their worker."""
        weight = self.weight[rows] / self.weight[rows].mean()
        with (
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, _EXAMPLE) as writer,
        ):
            for part in batched(range(len(rows)), _BATCH):
                of = rows[part]
                columns = [
                    pa.array([tokens[row] for row in self.chosen[of]], _EXAMPLE.field("chosen_ids").type),
                    pa.array([tokens[row] for row in self.rejected[of]], _EXAMPLE.field("rejected_ids").type),
                    *(
                        pa.array(values, pa.float32())
                        for values in (self.label[of], weight[part], self.reliability[of])
                    ),
                    pa.array(self.worker[of], pa.int32()),
                ]
                writer.write_batch(pa.record_batch(columns, _EXAMPLE))


_EXAMPLE = pa.schema(
    {
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "label": pa.float32(),
        "weight": pa.float32(),
        "reliability": pa.float32(),
        "worker": pa.int32(),
    }
)
