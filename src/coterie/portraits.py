"""What a reward likes in words, with intervals, and whether its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from coterie.bootstrap import FEWEST_WORKERS
from coterie.contracts import GLOBAL, Estimate
from coterie.discovery.features import FeatureMap
from coterie.discovery.logistic import curvature, gram, residual
from coterie.discovery.votes import Votes
from coterie.encoding.style import STYLE_WORDS
from coterie.rewards import SMALLEST_RESPONSIBILITY, RewardHead, fit_head

Array = NDArray[Any]

NOTABLE = 0.1  # logits a standard style difference: what a coterie weighs differently by less is not told
_MOST_LIKES = 3


def calibration_curve(margin: Array, y: Array, bins: int = 10) -> list[dict[str, float]]:
    """How often a prediction is right, beside how sure it was, over bins of equally many comparisons.

    Args:
        margin: logits [n] that the chosen response is preferred.
        y: labels [n]; ties, which have no right answer, are left out.
        bins: at most; fewer where there are fewer comparisons.

    Returns:
        For each bin, by ascending confidence max(p, 1 - p): its mean confidence, the accuracy, and its comparisons.
    """
    decided = y != 0.5
    p = expit(margin[decided])
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (y[decided] > 0.5))  # an undecided prediction is half right
    order = np.argsort(confidence, kind="stable")
    return [
        {
            "confidence": float(confidence[rows].mean()),
            "accuracy": float(right[rows].mean()),
            "comparisons": len(rows),
        }
        for rows in np.array_split(order, min(bins, len(order)) or 1)
        if len(rows)
    ]


def style_weights(
    votes: Votes,
    posterior: Array,
    reliability: Array,
    heads: Mapping[str, RewardHead],
    precisions: Mapping[str, float],
    features: FeatureMap,
    level: float,
) -> list[list[dict[str, Any]]]:
    """What each coterie's people weigh differently from everybody, among the readable style features.

    Measured on comparisons that nobody was grouped by: the votes that made the groups show differences between them
    also where there are none. The heads are fitted anew to `votes` as the served ones were to theirs, and scaled as those
    are, so that a weight is logits a standard difference of the feature. Intervals are cluster-robust (Liang and Zeger
    1986, Biometrika 73(1)): each worker's influence on the penalised fit is one draw, through both heads and through the
    prior that ties them. They take the coteries and the scales as they are.

    Args:
        votes: comparisons of prompts kept out of training.
        posterior: [n_workers, K], from training votes.
        reliability: beta_i [n_workers].
        heads: as served, by name: global, and with several coteries coterie-0 ...
        precisions: of the heads' priors, by name; for as many comparisons as `votes` has.
        features: names the features.
        level: of the intervals.

    Returns:
        For each coterie: name, words (what is liked) and weight (contracts.Estimate) of each style feature, the largest
        first. With one coterie: what everybody weighs, not a difference. Without intervals where the people are fewer
        than ten, counted in effective number (Kish 1965, Survey Sampling, section 11.7).
    """
    everybody = _Refitted.to(votes, np.ones(votes.n_workers), reliability, precisions[GLOBAL])
    value, through = (heads[GLOBAL].scale * part for part in (everybody.weight, everybody.influence))
    if posterior.shape[1] == 1:
        return [_in_words(value, through[votes.present], float(votes.present.sum()), features, level)]
    told: list[list[dict[str, Any]]] = []
    for k in range(posterior.shape[1]):
        audience = np.where(posterior[:, k] < SMALLEST_RESPONSIBILITY, 0.0, posterior[:, k]) * votes.present
        if not audience.any():
            told.append([])
            continue
        head, precision = heads[f"coterie-{k}"], precisions[f"coterie-{k}"]
        own = _Refitted.to(votes, audience, reliability, precision, everybody)
        difference, influence = head.scale * own.weight - value, head.scale * own.influence - through
        workers = float(audience.sum() ** 2 / (audience @ audience))
        told.append(_in_words(difference, influence[votes.present], workers, features, level))
    return told


@dataclass(frozen=True)
class _Refitted:
    """Weights [d] fitted to votes, and each worker's influence on them [n_workers, d]."""

    weight: Array
    influence: Array

    @classmethod
    def to(
        cls, votes: Votes, audience: Array, reliability: Array, precision: float, around: _Refitted | None = None
    ) -> _Refitted:
        beta, counted = reliability[votes.worker], votes.weighted(audience[votes.worker])
        x = votes.x * beta[:, None].astype(np.float32)
        center = np.zeros(votes.n_features) if around is None else around.weight
        weight = fit_head(x, votes.y, counted, center, precision)
        margin = x @ weight
        scores = votes.gradients_by_worker(counted * beta * residual(margin, votes.y))
        scores = scores if around is None else scores + precision * around.influence
        hessian = gram(x, counted * curvature(margin)) + precision * np.eye(votes.n_features)
        return cls(weight, np.linalg.solve(hessian, scores.T).T)


def _in_words(
    value: Array, influence: Array, workers: float, features: FeatureMap, level: float
) -> list[dict[str, Any]]:
    """The style features among weights [d] with influences [n, d], for an audience of so many workers."""
    half = np.full(len(value), np.nan)
    if workers >= FEWEST_WORKERS:
        error = np.sqrt(len(influence) * influence.var(axis=0, ddof=1))
        half = stats.t.ppf((1 + level) / 2, workers - 1) * error
    styled = [i for i, name in enumerate(features.names) if name in STYLE_WORDS]
    return [
        _told(features.names[i], float(value[i]), float(half[i]), level)
        for i in sorted(styled, key=lambda i: -abs(value[i]))
    ]


def _told(name: str, value: float, half: float, level: float) -> dict[str, Any]:
    low, high = (None, None) if np.isnan(half) else (value - half, value + half)
    words = STYLE_WORDS[name][0 if value > 0 else 1]
    return {"name": name, "words": words, "weight": Estimate(value=value, low=low, high=high, level=level)}


def likes(style: Sequence[dict[str, Any]]) -> list[str]:
    """In words what `style_weights` are sure of and large enough to notice, the strongest first, three at most."""
    sure = [
        feature["words"]
        for feature in style
        if (weight := feature["weight"]).low is not None
        and weight.low * weight.high > 0
        and abs(weight.value) > NOTABLE
    ]
    return sure[:_MOST_LIKES]
