"""What reward adapters scored on the GPU node that trained them, so that nobody after them loads a backbone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from coterie.contracts import ADAPTER_FILE, COMPARISON, DIFFERENCE, SCORE, SCORES_FILE, BaseModelReference
from coterie.errors import BadData
from coterie.rewards.heads import Array, RewardHead


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


def has_adapter(folder: Path) -> bool:
    """Whether the reward in this folder is an adapter of a backbone, beside its linear head."""
    return (folder / ADAPTER_FILE).is_file()


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

    def _ids(self) -> tuple[list[str], list[str]]:
        """Ids of the chosen and of the rejected response of each comparison."""
        if self._sides is None:
            if self._comparisons is None:
                raise BadData("rewards that are adapters are judged by text: give the comparisons of ingest as well")
            table = DIFFERENCE.read(self._embedded / "differences.parquet", ["comparison_id", "split"])
            wanted = table.filter(pc.equal(table["split"].cast(pa.string()), self._split))["comparison_id"]
            known = COMPARISON.read(self._comparisons, ["comparison_id", "chosen_id", "rejected_id"])
            rows = known.take(pc.index_in(wanted, known["comparison_id"].combine_chunks()).combine_chunks())
            self._sides = rows["chosen_id"].to_pylist(), rows["rejected_id"].to_pylist()
        return self._sides
