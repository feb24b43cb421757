"""What simulated annotators would say of any text: their true tastes, which the style features measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.special import expit

from coterie.contracts import COMPARISON, iterate
from coterie.encoding.style import STYLE_NAMES, style_features
from coterie.errors import BadConfiguration, BadData
from coterie.simulation.annotators import Annotators, Array


def about_style(truth: Path) -> bool:
    """Whether there is a truth.json here whose tastes can be measured on any text. Raises BadData: it is damaged."""
    return truth.is_file() and _read(truth)["attributes"] == list(STYLE_NAMES)


@dataclass(frozen=True)
class SimulatedTruth:
    """The annotators of a simulation, asked about texts that it did not hold.

    Attributes:
        workers: ids, [w].
        people: who they are; tastes are about the style features, d of them.
        scale: [d], what a feature is divided by before a taste weighs it: its standard deviation over the simulation's
            responses.
    """

    workers: list[str]
    people: Annotators
    scale: Array

    @classmethod
    def load(cls, truth: Path, comparisons: Path) -> Self:
        """Read the truth of a simulation.

        Args:
            truth: truth.json, of `coterie simulate` or of ingest.
            comparisons: comparisons.parquet, what ingest made of the simulation; its responses give the scale.

        Raises:
            BadConfiguration: the tastes are about switches of made-up texts, which no other text has.
            BadData: a file is missing or damaged.
        """
        told = _read(truth)
        if told["attributes"] != list(STYLE_NAMES):
            raise BadConfiguration(
                f"{truth}: the tastes of setting {told['setting']} are about how its texts were made up, which cannot be "
                "measured on other texts. Simulate with setting planted, whose tastes are about style."
            )
        tastes = [[group["taste"].get(name, 0.0) for name in STYLE_NAMES] for group in told["groups"]]
        workers = told["workers"]
        people = Annotators(
            names=[group["name"] for group in told["groups"]],
            group_tastes=np.array(tastes).reshape(-1, len(STYLE_NAMES)),
            group=np.array([worker["group"] for worker in workers.values()], dtype=np.intp),
            tastes=np.array([worker["taste"] for worker in workers.values()]),
            reliability=np.array([worker["reliability"] for worker in workers.values()]),
        )
        return cls(list(workers), people, _scale(comparisons))

    def utilities(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """What responses [n] are worth to each group, [n, groups], in logits; only differences at one prompt mean something."""
        utilities: Array = self._style(prompts, responses) @ self.people.group_tastes.T
        return utilities

    def prefers(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Array:
        """The probability that each worker votes for the first of two responses [n]: [n, w]."""
        differences = self._style(prompts, first) - self._style(prompts, second)
        probabilities: Array = expit(self.people.reliability * (differences @ self.people.tastes.T))
        return probabilities

    def _style(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        scaled: Array = style_features(list(prompts), list(responses)).astype(np.float64) / self.scale
        return scaled


def _scale(comparisons: Path) -> Array:
    """The standard deviation of each style feature over the distinct responses, as the simulation measures it."""
    seen: dict[tuple[str, str], None] = {}
    for batch in iterate(COMPARISON.open(comparisons), ["prompt", "chosen", "rejected"]):
        for side in ("chosen", "rejected"):
            seen |= dict.fromkeys(zip(batch["prompt"].to_pylist(), batch[side].to_pylist(), strict=True))
    scale = style_features([prompt for prompt, _ in seen], [text for _, text in seen]).astype(np.float64).std(axis=0)
    return np.where(scale > 1e-9, scale, 1.0)


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadData(
            f"{path}: no truth of a simulation can be read ({error}). Run `coterie simulate` again."
        ) from error
    if not {"attributes", "setting", "groups", "workers"} <= told.keys():
        raise BadData(f"{path}: not the truth of a simulation. Give the truth.json of `coterie simulate` or of ingest.")
    return told
