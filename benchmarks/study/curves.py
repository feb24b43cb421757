"""One data set under every number of coteries, by every method: what benchmarks.study.coteries measures.

Two-stage: every worker's own taste is estimated by itself (slopes around the pooled reward), and then clustered. Joint:
embeddings and rewards are learned together (low rank), and then clustered. The rewards of the clusters are fitted alike, with
the same priors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from benchmarks import settings, verdicts
from benchmarks.rows import Row, Task
from benchmarks.settings import SETTINGS
from benchmarks.study import data
from benchmarks.study.data import FILES
from benchmarks.study.intervals import LEVEL
from coterie.bootstrap import TwoWayBootstrap
from coterie.config import ClusterSettings, EmbedSettings, EvaluateSettings
from coterie.discovery import LowRankReward, PooledReward, ReliabilityReward, Votes, fit_coteries
from coterie.discovery.clustering import Method
from coterie.discovery.discover import discover
from coterie.discovery.logistic import log_loss
from coterie.discovery.pooled import Reward
from coterie.discovery.selection import BASIS_PRECISIONS, COTERIE_PRECISIONS, SLOPE_VARIANCES, HeldOut, sample_of
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Array, one_thread

SIZES = range(2, 9)
RANK = EmbedSettings().max_rank  # directions of the joint embeddings
CLUSTERINGS: dict[str, Method] = {"k-means": "kmeans", "Ward": "ward"}
METHODS = (*(f"{stages}, {clustering}" for stages in ("two-stage", "joint") for clustering in CLUSTERINGS), "mixture")


def measure(task: Task) -> Row:
    """Every method and number of coteries on one data set, and what coterie ships."""
    name, seed = task
    if name in FILES:
        train, test = data.real(name, seed)
        with one_thread():
            base = HeldOut(sample_of(train, 0), ClusterSettings().splits, 0).base(train)
        return judge(train, test, base, TwoWayBootstrap(test, *_bootstrap()))
    drawn = settings.draw(SETTINGS[name].model_copy(update={"seed": seed}))
    found = discover(drawn.train, EmbedSettings(), ClusterSettings())
    group = drawn.people.group if len(drawn.people.names) > 1 else None
    row = judge(drawn.train, drawn.test, found.base, None, group)
    shipped = _difference(drawn.test, found.reward, found.base, None)
    picked = {"verdict": found.selection.verdict, "coteries": found.selection.coteries, "ships": found.selection.ships}
    return row | {"automatic": picked | shipped}


def _bootstrap() -> tuple[int, float, int]:
    chosen = EvaluateSettings()
    return chosen.replicates, LEVEL, chosen.seed


def judge(
    train: Votes, test: Votes, base: ReliabilityReward, bootstrap: TwoWayBootstrap | None, group: Array | None = None
) -> Row:
    """All methods and numbers, fitted to the training votes and judged on the test votes.

    Args:
        base: pooled + reliability, fitted to the training votes.
        bootstrap: of the test votes; None: a data set of many, whose intervals are over data sets.
        group: [n_workers], the true groups.
    """
    embeddings = {
        "two-stage": SlopesReward(SLOPE_VARIANCES[1], base=base).fit(train).embeddings_,
        "joint": LowRankReward(RANK, base.precision, BASIS_PRECISIONS[1], base=base).fit(train).embeddings_,
    }
    pooled = PooledReward(base.precision).fit(train)
    methods: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    gains: dict[str, dict[str, Any]] = {clustering: {} for clustering in CLUSTERINGS}
    for size in SIZES:
        if size > train.present.sum():
            break
        fitted = {
            f"{stages}, {clustering}": fit_coteries(
                train, size, method, base, COTERIE_PRECISIONS[1], RANK, 0, embeddings[stages]
            )
            for stages in embeddings
            for clustering, method in CLUSTERINGS.items()
        }
        fitted["mixture"] = fit_coteries(train, size, "mixture", base, COTERIE_PRECISIONS[1], RANK, 0)
        for method, mixture in fitted.items():
            own = mixture.responsibilities_.argmax(axis=1)
            methods[method][str(size)] = {
                **_difference(test, mixture, base, bootstrap),
                "smallest": mixture.smallest_,
                "ari": None if group is None else adjusted_rand_score(group[train.present], own[train.present]),
            }
        for clustering in CLUSTERINGS:
            joint, two_stage = (fitted[f"{stages}, {clustering}"] for stages in ("joint", "two-stage"))
            gains[clustering][str(size)] = _difference(test, joint, two_stage, bootstrap)
    return {
        "workers": int(train.present.sum()),
        "comparisons": len(train),
        "accuracy": verdicts.accuracy(test, base.decision_function(test)),
        "log_loss": -base.score(test),
        "pooled": _difference(test, pooled, base, bootstrap),
        "methods": methods,
        "joint_less_two_stage": gains,
        "automatic": None,
    }


def _difference(test: Votes, reward: Reward, other: Reward, bootstrap: TwoWayBootstrap | None) -> dict[str, Any]:
    """Log-loss and accuracy of a reward less those of another."""
    logits = [one.decision_function(test) for one in (reward, other)]
    losses = [log_loss(one, test.y) for one in logits]
    right = [np.where(one == 0, 0.5, one > 0) for one in logits]
    decided = test.y != 0.5
    told = {"log_loss": (losses[0] - losses[1], np.ones(len(test), bool)), "accuracy": (right[0] - right[1], decided)}
    if bootstrap is None:
        return {name: {"value": verdicts.macro(test, values), "low": None} for name, (values, _) in told.items()}
    everybody = np.ones(test.n_workers, bool)
    return {name: bootstrap.estimate(values, valid, everybody).model_dump() for name, (values, valid) in told.items()}
