"""Everybody wants the same: Bradley and Terry (1952, Biometrika 39(3/4)) on features, and the same with reliabilities.

Pooled is the reward model of Christiano et al. (2017, arXiv 1706.03741), which plain RLHF trains, as a ridge regression on
frozen features. Pooled + reliability is this project's reference (docs/method, section 1): nothing but carelessness is a
person's own.
"""

from __future__ import annotations

import numpy as np

from benchmarks.peers import LinearReward, Settings, chosen, inner_splits
from coterie.discovery import MixtureReward, PooledReward, ReliabilityReward, Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array


class _FittedPooled(PooledReward):
    """Bradley-Terry, which says the same of everybody."""

    def adapt(self, shots: Votes) -> Reward:
        """What is served to everybody."""
        return LinearReward(np.tile(self.theta_, (shots.n_workers, 1)))


class Pooled:
    """One reward for everybody."""

    name = "pooled"
    source = "Bradley and Terry 1952"
    grid: tuple[Settings, ...] = tuple({"precision": p} for p in (1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0))

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedPooled:
        """Fit to training votes."""
        return _FittedPooled(settings["precision"]).fit(train)


def common_reward(train: Votes, seed: int) -> PooledReward:
    """The pooled reward that other peers start from or are pulled towards, tuned as the peer is, inside what it learns from."""
    peer = Pooled()
    settings = chosen(peer, inner_splits(train, seed), seed)
    return peer.fit(train, settings, seed)


class _FittedReliability(Reward):
    """A mixture of one coterie, which is pooled + reliability, and infers the reliability of new workers."""

    def __init__(self, mixture: MixtureReward) -> None:
        self.mixture = mixture

    def decision_function(self, votes: Votes) -> Array:
        return self.mixture.decision_function(votes)

    def adapt(self, shots: Votes) -> Reward:
        """The common reward by the reliability that the shots show."""
        _, log_reliability = self.mixture.infer(shots)
        return LinearReward(np.exp(log_reliability)[:, None] * self.mixture.theta_)


class Reliability:
    """One reward for everybody, and how carefully each votes."""

    name = "pooled + reliability"
    source = "docs/method, section 1"
    grid: tuple[Settings, ...] = tuple(
        {"precision": p, "reliability_variance": v} for p in (10.0, 100.0, 1000.0) for v in (0.03, 0.25)
    )

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedReliability:
        """Fit to training votes."""
        base = ReliabilityReward(**settings).fit(train)
        return _FittedReliability(MixtureReward(1, base=base).fit(train))
