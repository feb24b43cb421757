"""Where people stand whom a bundle does not know, by votes on its features: their coteries, and their place by embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from coterie.bundle import Bundle
from coterie.contracts import MIXTURE_FILE, MODEL_FILE
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.newcomers import tempered, tempered_embedding
from coterie.discovery.votes import Array, VoteSet


class Placed(NamedTuple):
    """People: posterior [n, K], embedding N(mean [n, rank], covariance [n, rank, rank]), reliability [n]."""

    posterior: Array
    mean: Array
    covariance: Array
    reliability: Array


@dataclass(frozen=True)
class Placing:
    """A bundle's mixture and directions of taste.

    Their evidence counts by the temperature that the evaluation calibrated on people whom nothing had learned from
    (docs/method, section 5).
    """

    mixture: MixtureReward
    directions: LowRankReward
    temperature: float

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Read those of a bundle. Raises BadData: they are damaged."""
        nobody = np.zeros((0, 0)), np.zeros(0)
        return cls(
            MixtureReward.load(bundle.path / MIXTURE_FILE),
            LowRankReward(bundle.manifest.rank).restore(bundle.path / MODEL_FILE, *nobody),
            bundle.manifest.temperature,
        )

    def infer(self, votes: VoteSet) -> Placed:
        """Where the workers of `votes`, on the bundle's features, stand."""
        shares, log_reliability = self.mixture.infer(votes)
        mean, covariance, _ = self.directions.infer(votes)
        return Placed(
            tempered(shares, self.mixture.weights_, self.temperature),
            *tempered_embedding(mean, covariance, self.temperature),
            np.exp(log_reliability),
        )
