"""coterie as a peer: what it discovers and would ship, and its inference of new workers.

The default settings of embed and cluster, so that the member, its size and priors are chosen by coterie's own selection on
item-disjoint splits of the training votes. New workers are inferred as in serving (discovery/newcomers.py): their posterior
over coteries, or their embedding, under a temperature that is calibrated on training workers whom a fit has left out and on
prompts that it has left out. Where one reward is shipped, a new worker shows a reliability. A stranger has the pooled reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.base import clone

from benchmarks.peers import Settings
from coterie.config import ClusterSettings, EmbedSettings
from coterie.discovery import MixtureReward, ReliabilityReward, Votes
from coterie.discovery.discover import Discovery, discover
from coterie.discovery.newcomers import Member, learning_curve, predict
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array


class Found(Reward):
    """What was discovered.

    Args:
        discovery: in the training votes.
        member: that is shipped; the mixture of one coterie where one reward is.
        temperature: of new workers' evidence.
    """

    def __init__(self, discovery: Discovery, member: Member, temperature: float) -> None:
        self.discovery = discovery
        self.member = member
        self.temperature = temperature

    def decision_function(self, votes: Votes) -> Array:
        return self.discovery.reward.decision_function(votes)

    def adapt(self, shots: Votes) -> Reward:
        """The posterior, or the embedding, that the shots show."""
        return _Inferred(
            self.member, self.member.infer(shots), shots.present, self.discovery.base.theta_, self.temperature
        )


class _Inferred(Reward):
    """The shipped member for workers whom it did not learn from; strangers have the pooled reward [d]."""

    def __init__(
        self, member: Member, inferred: Sequence[Array], known: Array, pooled: Array, temperature: float
    ) -> None:
        self.member = member
        self.inferred = inferred
        self.known = known
        self.pooled = pooled
        self.temperature = temperature

    def decision_function(self, votes: Votes) -> Array:
        personal = predict(self.member, self.inferred, votes, self.temperature)
        return np.where(self.known[votes.worker], personal, votes.x @ self.pooled)


class Ours:
    """coterie."""

    name = "coterie"
    source = "docs/method"
    grid: tuple[Settings, ...] = ({},)

    def fit(self, train: Votes, settings: Settings, seed: int) -> Found:
        """Discover what is in training votes, with the defaults of both stages; `settings` are other ones of cluster."""
        found = discover(train, EmbedSettings(seed=seed), ClusterSettings(seed=seed, **settings))
        if found.selection.ships == "one-reward":
            return Found(found, MixtureReward(1, base=found.base).fit(train), 1.0)
        member = found.mixture if found.selection.ships == "coteries" else found.embedding

        def make(votes: Votes, base: ReliabilityReward) -> Member:
            fresh: Member = clone(member).set_params(base=base)
            return fresh.fit(votes)

        learned, judged = found.heldout.splits[0]
        curve = learning_curve(learned, judged, judged, make, found.base, seed)
        return Found(found, member, curve.temperature if curve else 1.0)
