"""Who votes, on what, how often: docs/method, section 8, "Simulated settings"."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from coterie.config import Settings
from coterie.simulation.texts import MOST_PROMPTS

Setting = Literal["groups", "continuous", "careless", "unequal", "null", "null-careless", "null-unequal", "planted"]


class SimulationSettings(Settings):
    """Simulated annotators and their comparisons."""

    setting: Setting = Field(
        default="groups",
        description="groups; continuous (tastes along three directions); careless (groups, 30 % careless); unequal "
        "(groups, very unequal amounts of data); null (one taste); null-careless; null-unequal; planted (groups on "
        "the texts, workers and pairs of --texts)",
    )
    groups: int = Field(default=4, ge=1, le=8, description="number of groups, where the setting has groups")
    workers: int = Field(default=400, ge=1, description="annotators; planted: those of the texts")
    comparisons_per_worker: int = Field(
        default=100, ge=1, description="comparisons of each; unequal: the mean; planted: those of the texts"
    )
    prompts: int = Field(default=240, ge=1, le=MOST_PROMPTS, description="distinct prompts")
    responses: int = Field(default=6, ge=2, le=64, description="responses to a prompt")
    accuracy: float = Field(
        default=0.76, gt=0.5, lt=1, description="share of a careful annotator's votes that the true taste predicts"
    )
    texts: Path | None = Field(
        default=None, description="planted: comparisons.parquet of ingest, or line JSON of comparisons"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.setting == "planted") != (self.texts is not None):
            raise ValueError("planted needs texts (a file of comparisons), and no other setting takes them")
        if self.comparisons_per_worker > self.pairs:
            raise ValueError(
                f"{self.comparisons_per_worker} comparisons a worker of {self.pairs} distinct pairs: lower "
                "comparisons_per_worker, or raise prompts or responses"
            )
        return self

    @property
    def pairs(self) -> int:
        """Distinct pairs of responses to one prompt, over all prompts."""
        return self.prompts * comb(self.responses, 2)
