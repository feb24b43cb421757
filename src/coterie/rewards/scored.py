"""What reward adapters scored on the GPU node that trained them, so that nobody after them loads a backbone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from coterie.contracts import (
    ADAPTER_FILE,
    COMPARISON,
    DIFFERENCE,
    SCORE,
    SCORES_FILE,
    STATE,
    STATES_FILE,
    BaseModelReference,
    iterate,
    matrix,
)
from coterie.errors import BadData
from coterie.rewards.heads import Array, RewardHead
from coterie.rewards.personal import PersonalHead

_ROWS = 4096  # states read at a time


@dataclass(frozen=True)
class ScoredResponses:
    """Scores of a reward adapter by response.

    Attributes:
        folder: of the reward.
        raw: score of each response id, before center and scale.
        center, scale: as in RewardHead.
        backbone: what it is an adapter of.
    """

    folder: Path
    raw: pd.Series[float]
    center: float
    scale: float
    backbone: BaseModelReference

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what the reward stage left in `folder`. Raises BadData: it is not the folder of an adapter."""
        try:
            told = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadData(f"{folder}: no readable {ADAPTER_FILE} ({error}). Run the reward stage again.") from error
        table = SCORE.read(folder / SCORES_FILE)
        raw = pd.Series(table["score"].to_numpy().astype(np.float64), index=table["response_id"].to_pylist())
        backbone = BaseModelReference(name=told["backbone"], revision=told["revision"], role="backbone")
        return cls(folder, raw, float(told["center"]), float(told["scale"]), backbone)

    def score(self, response_ids: list[str]) -> Array:
        """Calibrated scores [n] of responses. Raises BadData: one of them was not scored."""
        found = self.raw.reindex(response_ids)
        if found.isna().any():
            missing = found.index[found.isna()][0]
            raise BadData(f"{self.folder}: no score of response {missing}; train the reward on these comparisons again")
        scores: Array = self.scale * (found.to_numpy() - self.center)
        return scores


@dataclass(frozen=True)
class States:
    """Hidden states that the global adapter left behind, for heads to read.

    Attributes:
        folder: of the global reward.
        response_ids: of the responses, distinct.
        values: [m, hidden] float32, the last hidden state at the last token of each.
    """

    folder: Path
    response_ids: pd.Index[str]
    values: Array

    @classmethod
    def load(cls, folder: Path, wanted: Iterable[str] | None = None) -> Self:
        """Read those of all responses, or of the `wanted` ones. Raises BadData: the reward stage left none in `folder`."""
        path, found, values = folder / STATES_FILE, [], []
        if not path.is_file():
            raise BadData(f"{folder}: no {STATES_FILE}. Train the global reward on this backbone again.")
        kept = None if wanted is None else pa.array(sorted(set(wanted)), pa.string())
        for batch in iterate(STATE.open(path), rows=_ROWS):
            if kept is not None:
                batch = batch.filter(pc.is_in(batch["response_id"], kept))
            found.append(batch["response_id"].to_pandas())
            values.append(matrix(batch["state"]))
        return cls(folder, pd.Index(pd.concat(found)), np.concatenate(values))

    def rows(self, response_ids: Sequence[str]) -> Array:
        """Which row of `values` each response [n] has. Raises BadData: one of them has none."""
        rows = self.response_ids.get_indexer(pd.Index(response_ids))
        if (rows < 0).any():
            missing = response_ids[int(np.flatnonzero(rows < 0)[0])]
            raise BadData(f"{self.folder}: no hidden state of response {missing}; train the global reward again")
        return np.asarray(rows)


def has_adapter(folder: Path) -> bool:
    """Whether the reward in this folder is an adapter of a backbone, beside its linear head."""
    return (folder / ADAPTER_FILE).is_file()


def compared(embedded: Path, comparisons: Path, split: str) -> tuple[list[str], list[str]]:
    """Ids of the chosen and of the rejected response of each comparison of a split, in the order of differences.parquet."""
    table = DIFFERENCE.read(embedded / "differences.parquet", ["comparison_id", "split"])
    wanted = table.filter(pc.equal(table["split"].cast(pa.string()), split))["comparison_id"]
    known = COMPARISON.read(comparisons, ["comparison_id", "chosen_id", "rejected_id"])
    where = pc.index_in(wanted, known["comparison_id"].combine_chunks()).combine_chunks()
    if where.null_count:
        raise BadData(f"{comparisons}: not the comparisons that {embedded} was made of. Run embed again.")
    rows = known.take(where)
    return rows["chosen_id"].to_pylist(), rows["rejected_id"].to_pylist()


class HeldoutMargins:
    """Score differences of the comparisons of one split by any reward, linear or adapter.

    Args:
        embedded: folder of the embed stage.
        comparisons: comparisons.parquet; needed for adapters, which know texts only.
        split: whose comparisons.
        x: [n, d] their feature differences, in the order of differences.parquet.
    """

    def __init__(self, embedded: Path, comparisons: Path | None, split: str, x: Array) -> None:
        self._embedded, self._comparisons, self._split, self._x = embedded, comparisons, split, x
        self._sides: tuple[list[str], list[str]] | None = None

    def of(self, folder: Path) -> Array:
        """Margins [n] of the reward in `folder`.

        Raises:
            BadData: not a reward, it did not score a response, or it is an adapter and the comparisons were not given.
        """
        if not has_adapter(folder):
            return RewardHead.load(folder).margin(self._x)
        chosen, rejected = self._ids()
        adapter = ScoredResponses.load(folder)
        return adapter.score(chosen) - adapter.score(rejected)

    def by_embedding(self, folder: Path, common: Path, embeddings: Array) -> Array:
        """Margins [n] of the reward by embedding in `folder`, for the workers' embeddings [n, r].

        `common` holds the global reward: where that is an adapter, the heads read its hidden state. Raises BadData.
        """
        head = PersonalHead.load(folder)
        if not has_adapter(common):
            return head.margin(self._x, embeddings)
        states = States.load(common, [*self._ids()[0], *self._ids()[1]])
        read = states.values @ np.column_stack([head.common.weight, head.basis])
        chosen, rejected = (read[states.rows(ids)] for ids in self._ids())
        taste = np.column_stack([np.ones(len(embeddings)), embeddings])
        margins: Array = head.common.scale * np.einsum("nk,nk->n", chosen - rejected, taste)
        return margins

    def _ids(self) -> tuple[list[str], list[str]]:
        """Ids of the chosen and of the rejected response of each comparison."""
        if self._sides is None:
            if self._comparisons is None:
                raise BadData("rewards that are adapters are judged by text: give the comparisons of ingest as well")
            self._sides = compared(self._embedded, self._comparisons, self._split)
        return self._sides
