"""Groups as a pipeline makes them that asks nothing, and coterie on the same votes: what benchmarks.study.failures measures.

The naive pipeline takes the steps of arXiv 2601.20760: every worker's taste is estimated by itself, these are clustered by
k-means into a number of groups that somebody fixed, and each group gets a reward of its own, from its members' votes alone.
There is no test, no other number of groups, no reliability, nothing that pulls a small group's reward back to everybody's, and
no gate. That its groups look like groups is shown by what such work looks at: the silhouette, and the gain on the votes that
the rewards were fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import adjusted_rand_score, silhouette_score

from benchmarks import settings, verdicts
from benchmarks.rows import Row, Task
from benchmarks.settings import FeatureSettings
from benchmarks.study.intervals import LEVEL
from coterie.bootstrap import TwoWayBootstrap
from coterie.config import ClusterSettings, EmbedSettings, EvaluateSettings
from coterie.discovery import PooledReward, ReliabilityReward, Votes, cluster_embeddings
from coterie.discovery.discover import discover
from coterie.discovery.logistic import log_loss
from coterie.discovery.pooled import Reward
from coterie.discovery.selection import COTERIE_PRECISIONS, SLOPE_VARIANCES
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.stability import half_split_ari
from coterie.discovery.votes import Array, one_thread


@dataclass(frozen=True)
class Failure:
    """Annotators among whom the naive pipeline goes wrong.

    Attributes:
        settings: the annotators.
        groups: the number of groups that the naive pipeline is told.
        why: what is wrong with that, in words.
        control: that nothing is wrong with it, so that no diagnostic should give warning.
    """

    settings: FeatureSettings
    groups: int
    why: str
    control: bool = False


FAILURES = {
    "nothing to find": Failure(
        FeatureSettings(setting="null", workers=200, comparisons_per_worker=60), 4, "everybody wants the same"
    ),
    "carelessness": Failure(
        FeatureSettings(setting="null-careless", workers=200, comparisons_per_worker=60),
        2,
        "everybody wants the same, and 30 % answer carelessly",
    ),
    "poor clusters": Failure(
        FeatureSettings(setting="continuous", workers=200, comparisons_per_worker=60),
        4,
        "tastes vary by degrees, and no border is there to be found",
    ),
    "too little data": Failure(
        FeatureSettings(setting="groups", workers=60, comparisons_per_worker=10), 4, "four groups of 24 to 6 workers"
    ),
    "over-clustering": Failure(
        FeatureSettings(setting="groups", groups=2, workers=200, comparisons_per_worker=60), 8, "two groups"
    ),
    "no failure": Failure(
        FeatureSettings(setting="groups", workers=200, comparisons_per_worker=100),
        4,
        "four groups, and K as it is",
        True,
    ),
}


class NaiveReward(Reward):
    """Clusters of two-stage embeddings, and a reward for each, without prior knowledge of anybody else.

    Attributes:
        groups_: [n_workers], the cluster of each.
        rewards_: the reward of each cluster.
        embeddings_: [n_workers, d], what was clustered.
    """

    def __init__(self, n_groups: int, base: ReliabilityReward, seed: int = 0) -> None:
        self.n_groups = n_groups
        self.base = base
        self.seed = seed

    @one_thread()
    def fit(self, votes: Votes) -> NaiveReward:
        """Fit to votes."""
        self.n_features_in_ = votes.n_features
        self.embeddings_ = SlopesReward(SLOPE_VARIANCES[1], base=self.base).fit(votes).embeddings_
        self.groups_ = np.zeros(votes.n_workers, np.intp)
        self.groups_[votes.present] = cluster_embeddings(
            self.embeddings_[votes.present], self.n_groups, "kmeans", self.seed
        )
        self.rewards_ = [
            PooledReward(self.base.precision).fit(votes.subset((self.groups_ == k)[votes.worker]))
            for k in range(int(self.groups_.max()) + 1)
        ]
        return self

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] by the reward of each worker's cluster."""
        self._check(votes, len(self.groups_))
        logits = np.stack([reward.theta_ for reward in self.rewards_]) @ votes.x.T
        return np.asarray(logits[self.groups_[votes.worker], np.arange(len(votes))])


def measure(task: Task) -> Row:
    """One data set of a failure: the naive pipeline, coterie, and what would have given warning."""
    name, seed = task
    failure = FAILURES[name]
    data = settings.draw(failure.settings.model_copy(update={"seed": seed}))
    train, (validation, test) = data.train, _halves(data.test)
    found = discover(train, EmbedSettings(), ClusterSettings())
    pooled = PooledReward(found.base.precision).fit(train)
    naive = NaiveReward(failure.groups, found.base).fit(train)
    own = found.mixture.responsibilities_.argmax(axis=1)
    with one_thread():
        halves = half_split_ari(
            train, failure.groups, "kmeans", found.heldout, COTERIE_PRECISIONS[1], EmbedSettings().max_rank, 3, 0
        )

    def less_pooled(votes: Votes, reward: Reward) -> dict[str, float]:
        logits, other = reward.decision_function(votes), pooled.decision_function(votes)
        return {
            "log_loss": verdicts.macro(votes, log_loss(logits, votes.y) - log_loss(other, votes.y)),
            "accuracy": verdicts.accuracy(votes, logits) - verdicts.accuracy(votes, other),
        }

    def truth(labels: Array) -> float | None:
        return adjusted_rand_score(data.people.group, labels) if len(data.people.names) > 1 else None

    tested = found.heterogeneity
    return {
        "pooled_accuracy": verdicts.accuracy(test, pooled.decision_function(test)),
        "naive": less_pooled(test, naive)
        | {
            "on_training_votes": less_pooled(train, naive),
            "silhouette": float(silhouette_score(naive.embeddings_, naive.groups_)),
            "sizes": sorted(np.bincount(naive.groups_).tolist(), reverse=True),
            "ari": truth(naive.groups_),
        },
        "ours": less_pooled(test, found.reward)
        | {
            "verdict": found.selection.verdict,
            "coteries": found.selection.coteries,
            "ships": found.selection.ships,
            "confidence": found.selection.confidence,
            "ari": truth(own) if found.mixture.n_coteries > 1 else None,
        },
        "oracle": less_pooled(test, settings.oracle(data, found.base, COTERIE_PRECISIONS[1])),
        "diagnostics": {
            "p_value": None if tested is None else tested.p_value,
            "half_split_ari": halves,
            "half_split_ari_ours": found.stability,
            "gates_closed": sum(not opened for opened in gates(naive, pooled, validation)),
            "gates": len(naive.rewards_),
        },
    }


def gates(naive: NaiveReward, pooled: PooledReward, validation: Votes) -> list[bool]:
    """Whether each group's reward beats everybody's on its members' validation votes, the interval above zero: the rule by
    which coterie.evaluation lets a coterie serve its own."""
    chosen = EvaluateSettings()
    bootstrap = TwoWayBootstrap(validation, chosen.replicates, LEVEL, chosen.seed)
    common = log_loss(pooled.decision_function(validation), validation.y)
    gain = common - log_loss(naive.decision_function(validation), validation.y)
    everything = np.ones(len(validation), bool)
    told = [bootstrap.estimate(gain, everything, naive.groups_ == k) for k in range(len(naive.rewards_))]
    return [one.low is not None and one.low > 0 for one in told]


def _halves(votes: Votes) -> tuple[Votes, Votes]:
    """Votes on half of the prompts, and those on the others."""
    prompts = np.unique(votes.prompt)
    first = np.isin(votes.prompt, prompts[: len(prompts) // 2])
    return votes.subset(first), votes.subset(~first)
