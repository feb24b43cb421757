"""What a policy is tuned for: a reward of a bundle, of texts, normalised on answers of the policy that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from coterie.contracts import GLOBAL
from coterie.errors import BadConfiguration, BadData, RunFailed
from coterie.policies.policy import Answer

Array = NDArray[np.floating]

NO_ANSWER = -3.0  # what an unfinished or an empty answer earns, and no answer less: standard deviations from the mean


class TextReward(Protocol):
    """Scores texts; the reward's tokenizer is its own affair."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Scores [n] of responses to prompts."""
        ...


def bundle_reward(path: Path, coterie: int | Literal["global"]) -> TextReward:
    """The reward of a coterie, or the global one, of the bundle in folder `path`.

    Raises:
        BadBundle: not a bundle, or it does not score here as it did where it was made.
        BadConfiguration: it has no such coterie.
    """
    from coterie.bundle import Bundle
    from coterie.scoring import load_scorer

    bundle = Bundle.load(path)
    if coterie != GLOBAL and not 0 <= int(coterie) < bundle.manifest.coteries:
        raise BadConfiguration(
            f"{path}: no coterie {coterie}; the bundle has {bundle.manifest.coteries}, numbered from 0."
        )
    scorer = load_scorer(bundle)
    return partial(scorer.by_reward, GLOBAL if coterie == GLOBAL else scorer.served[int(coterie)])


class Earned(NamedTuple):
    """Rewards of answers [n]: of their texts, and normalised: what a trainer sees."""

    raw: Array
    normalised: Array


@dataclass(frozen=True)
class NormalisedReward:
    """A reward in standard deviations from the mean that the start's answers get, finished or not.

    So the price of divergence means the same under every coterie's reward. An unfinished or empty answer earns
    NO_ANSWER, whatever its text would.
    """

    reward: TextReward
    mean: float
    sd: float

    @classmethod
    def of(cls, reward: TextReward, prompts: Sequence[str], answers: Sequence[Answer]) -> Self:
        """Normalise `reward` on answers [n] of the start.

        Raises:
            RunFailed: a reward is not finite. BadData: all of them are equal, so that there is nothing to learn.
        """
        scores = scored(reward, prompts, [answer.text for answer in answers])
        mean, sd = float(scores.mean()), float(scores.std())
        if sd <= 1e-9 * max(abs(mean), 1.0):
            raise BadData(
                f"the reward scores all {len(scores)} answers of the start {mean:.4g}: there is nothing to learn. "
                "Give more training prompts, or a higher align.temperature."
            )
        return cls(reward, mean, sd)

    def __call__(self, prompts: Sequence[str], answers: Sequence[Answer]) -> Earned:
        """Rewards of answers [n]. Raises RunFailed: one is not finite."""
        raw = scored(self.reward, prompts, [answer.text for answer in answers])
        answered = np.array([answer.finished and bool(answer.text) for answer in answers])
        normalised = np.maximum((raw - self.mean) / self.sd, NO_ANSWER)
        return Earned(raw, np.where(answered, normalised, NO_ANSWER))


def scored(reward: TextReward, prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """Scores [n] of responses. Raises RunFailed: one is not finite."""
    scores = np.asarray(reward(prompts, responses), dtype=np.float64)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise RunFailed(
            f"the reward of the answer {responses[worst][:60]!r} to the prompt {prompts[worst][:60]!r} is {scores[worst]}. "
            "Make the bundle again; a reward that is not finite teaches nothing."
        )
    return scores
