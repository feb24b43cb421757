"""Held-out quality: own against global against wrong coterie, what is shipped against the pooled reward, and the gate.

Validation prompts decide (the gate), test prompts report. All means are macro: every worker counts once. Ties count in
the log-loss and not in the accuracy, where a tie has no right answer. Intervals are percentiles of a bootstrap over
workers and prompts, paired between models (docs/method, sections 2 and 9). Differences are a model's minus its
baseline's: accuracy gains are positive, log-loss gains negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from coterie.config import EvaluateSettings
from coterie.contracts import (
    ASSIGNMENT,
    FEATURES_FILE,
    GLOBAL,
    TEST,
    VALIDATION,
    CoterieSummary,
    Estimate,
    Gate,
    Heldout,
    Quality,
    matrix,
)
from coterie.discovery.features import FeatureMap
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Votes, load_votes
from coterie.encoding.style import STYLE_WORDS
from coterie.errors import BadData
from coterie.rewards import RewardHead
from coterie.scoring import average, served_heads

Array = NDArray[Any]

FEWEST_WORKERS = 10  # an interval over fewer would not mean what it says
_DECILE_COMPARISONS = 5  # a worker's accuracy over fewer is noise, not a bad reward
_MOST_GROUPS = 2000  # workers or prompts past it are resampled in random groups, so that memory stays bounded
_NOTABLE = 0.1  # logits a standard style difference: what a coterie weighs differently by less is not told


class TwoWayBootstrap:
    """Percentile intervals for macro means over workers, of a bootstrap over workers and over prompts.

    Both are random, so that an interval speaks about new people and new prompts. Multiplying the resampled multiplicities
    of worker and prompt (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1(2)) counts the noise of single
    votes three times, and votes are mostly noise. Here the deviations of a bootstrap over workers and of one over prompts
    are added, after the prompts' are shrunk to what prompts share beyond that noise, as in two-way clustered variances
    (Cameron, Gelbach and Miller 2011, Journal of Business & Economic Statistics 29(2)). Percentiles are expanded for few
    workers or prompts (Hesterberg 2015, The American Statistician 69(4)).

    The same resamples serve every statistic: differences are paired.

    Args:
        votes: the comparisons, ordered by worker.
        replicates: resamples.
        level: of the intervals.
        seed: of the resamples.
    """

    def __init__(self, votes: Votes, replicates: int, level: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._votes, self._level = votes, level
        prompts, self._prompt = np.unique(votes.prompt, return_inverse=True)
        self._worker_group, self._worker_weights = _resamples(votes.n_workers, replicates, rng)
        self._prompt_group, self._prompt_weights = _resamples(len(prompts), replicates, rng)

    def estimate(self, values: Array, valid: Array, workers: Array) -> Estimate:
        """Macro mean of values [n] where `valid` [n], over the workers [n_workers, bool]; with its interval."""
        worker, prompt = self._votes.worker, self._prompt
        rows = valid & workers[worker]
        kept = np.where(rows, values, 0.0)
        total, count = (self._votes.sum_by_worker(v) for v in (kept, rows.astype(float)))
        counted = count > 0
        n = int(counted.sum())
        if not n:
            return Estimate(value=None, level=self._level)
        means = np.divide(total, count, out=np.zeros_like(total), where=counted)
        value = float(means.sum() / n)
        if n < FEWEST_WORKERS:
            return Estimate(value=value, level=self._level)

        groups = len(self._worker_weights)
        sums, sizes = (
            np.bincount(self._worker_group, v, groups) @ self._worker_weights for v in (means, counted.astype(float))
        )
        by_workers = sums / np.maximum(sizes, 1) - value

        influence = np.zeros(len(values))  # of each comparison on the macro mean
        influence[rows] = (kept[rows] - value) / (count[worker[rows]] * n)
        of_prompt = np.bincount(prompt, influence)
        noise, spread = float((influence**2).sum()), float((of_prompt**2).sum())
        shared = np.sqrt(max(0.0, 1 - noise / spread)) if spread > 0 else 0.0
        of_group = np.bincount(self._prompt_group, of_prompt, len(self._prompt_weights))
        by_prompts = of_group @ (self._prompt_weights - 1)

        few = min(n, len(np.unique(prompt[rows]))) if shared > 0 else n
        tail = stats.norm.cdf(np.sqrt(few / (few - 1)) * stats.t.ppf((1 - self._level) / 2, few - 1))
        low, high = value + np.quantile(by_workers + shared * by_prompts, [tail, 1 - tail])
        return Estimate(value=value, low=float(low), high=float(high), level=self._level)


def _resamples(units: int, replicates: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """The group of each unit, and multiplicities [groups, replicates] float32; a group is a unit while they are few."""
    groups = min(units, _MOST_GROUPS)
    group = rng.permutation(units) % groups
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), replicates).T
    return group, np.ascontiguousarray(weights, dtype=np.float32)


@dataclass(frozen=True)
class _Judged:
    """Comparisons of one split with every model's margins: global and own heads [n, 1 + K], shipped [n]."""

    votes: Votes
    margins: Array
    bootstrap: TwoWayBootstrap

    def quality(self, margin: Array, workers: Array, other: Array | None = None) -> Quality:
        """Accuracy and log-loss of margins [n], or their paired difference to those of `other` [n]."""
        hits, losses = self._right(margin), log_loss(margin, self.votes.y)
        if other is not None:
            hits, losses = hits - self._right(other), losses - log_loss(other, self.votes.y)
        decided = self.votes.y != 0.5
        return Quality(
            accuracy=self.bootstrap.estimate(hits, decided, workers),
            log_loss=self.bootstrap.estimate(losses, np.ones(len(losses), dtype=bool), workers),
        )

    def _right(self, margin: Array) -> Array:
        # A margin of exactly zero says nothing: half right.
        return np.where(margin == 0, 0.5, (margin > 0) == (self.votes.y > 0.5))


def evaluate(
    embedded: Path, clustered: Path, rewards: Mapping[str, Path], out: Path, settings: EvaluateSettings
) -> dict[str, Any]:
    """Judge the rewards (by name: global, coterie-0 ...) on held-out prompts.

    Args:
        embedded: folder of the embed stage. clustered: of the cluster stage. rewards: folders of the heads.
        out: the stage's folder; everything is in what is returned.
        settings: replicates, level, seed.

    Returns:
        gates, matrix (accuracy and log_loss, [people of coterie, model]), own_wrong, heldout, worst, calibration,
        coteries: the parts of contracts.Metrics that are held-out quality.

    Raises:
        BadData: an input is missing, or no test or validation prompt is there.
    """
    columns = ASSIGNMENT.read(clustered / "assignments.parquet", ["coterie", "posterior", "comparisons"])
    posterior, coterie = matrix(columns["posterior"]).astype(np.float64), columns["coterie"].to_numpy()
    heads = {name: RewardHead.load(folder) for name, folder in rewards.items()}
    n_coteries = posterior.shape[1]
    if missing := [k for k in range(n_coteries) if f"coterie-{k}" not in heads]:
        raise BadData(f"no reward of coterie {', '.join(map(str, missing))}; run `coterie reward` for all of them")
    features = FeatureMap.load(embedded / FEATURES_FILE)
    models = [heads[GLOBAL], *(heads[f"coterie-{k}"] for k in range(n_coteries))]
    validation, test = (_judge(embedded, split, models, settings) for split in (VALIDATION, TEST))
    people = [coterie == k for k in range(n_coteries)]
    everybody = np.ones(len(coterie), dtype=bool)

    gates = [_gate(k, validation, people[k], n_coteries) for k in range(n_coteries)]
    own = [gate.serves == "own" for gate in gates]
    common = test.margins[:, 0]
    served = np.stack([head.margin(test.votes.x) for head in served_heads(heads, n_coteries, own)], axis=1)
    shipped = average(served, posterior[test.votes.worker])
    overall, gain = test.quality(shipped, everybody), test.quality(shipped, everybody, common)
    counts = columns["comparisons"].to_numpy()
    summaries = [
        CoterieSummary(
            id=k,
            workers=int(people[k].sum()),
            comparisons=int(counts[people[k]].sum()),
            serves=gates[k].serves,
            own_vs_global=test.quality(test.margins[:, 1 + k], people[k], common),
            likes=_likes(heads[f"coterie-{k}"], heads[GLOBAL], features)
            if n_coteries > 1
            else _likes(heads[GLOBAL], None, features),
        )
        for k in range(n_coteries)
    ]
    table = [[test.quality(test.margins[:, m], who) for m in range(len(models))] for who in people]
    return {
        "level": settings.level,
        "gates": [gate.model_dump() for gate in gates],
        "matrix": {
            "models": [GLOBAL, *(f"coterie-{k}" for k in range(n_coteries))],
            "accuracy": [[cell.accuracy.model_dump() for cell in row] for row in table],
            "log_loss": [[cell.log_loss.model_dump() for cell in row] for row in table],
        },
        "own_wrong": [_against_wrong(k, test, people[k]) for k in range(n_coteries)] if n_coteries > 1 else [],
        "heldout": {
            "seen": Heldout(
                accuracy=overall.accuracy.value, log_loss=overall.log_loss.value, difference_to_pooled=gain
            ).model_dump()
            | {
                "accuracy_interval": overall.accuracy.model_dump(),
                "pooled": test.quality(common, everybody).model_dump(),
            },
            "unseen_by_shots": {},
        },
        "worst": _worst(test, shipped, people),
        "calibration": _calibration(shipped, test.votes.y),
        "coteries": [summary.model_dump() for summary in summaries],
        "test_comparisons": len(test.votes),
        "validation_comparisons": len(validation.votes),
    }


def _judge(embedded: Path, split: str, models: list[RewardHead], settings: EvaluateSettings) -> _Judged:
    votes = load_votes(embedded / "differences.parquet", (split,))
    margins = np.stack([head.margin(votes.x) for head in models], axis=1)
    return _Judged(votes, margins, TwoWayBootstrap(votes, settings.replicates, settings.level, settings.seed))


def _gate(k: int, validation: _Judged, people: Array, coteries: int) -> Gate:
    """A coterie serves its own reward only if it beats the global one on its own people's validation prompts."""
    if coteries == 1:
        return Gate(coterie=k, serves="global", reason="one reward serves everybody")
    gain = validation.quality(validation.margins[:, 0], people, validation.margins[:, 1 + k]).log_loss
    if gain.low is None or gain.high is None:
        return Gate(coterie=k, serves="global", reason=f"fewer than {FEWEST_WORKERS} workers with validation prompts")
    told = f"{gain.value:.4f} nats a comparison [{gain.low:.4f}, {gain.high:.4f}]"
    if gain.low > 0:
        return Gate(coterie=k, serves="own", reason=f"it beats the global reward on validation prompts by {told}")
    reason = f"its own does not surely beat the global reward on validation prompts, a gain of {told}"
    return Gate(coterie=k, serves="global", reason=reason.replace("-", "−"))


def _against_wrong(k: int, test: _Judged, people: Array) -> dict[str, Any]:
    """The own reward of a coterie's people against the mean of the other coteries' rewards, paired."""
    others = [m for m in range(1, test.margins.shape[1]) if m != 1 + k]
    own, y = test.margins[:, 1 + k], test.votes.y
    everything = np.ones(len(y), dtype=bool)
    losses = log_loss(own, y) - np.mean([log_loss(test.margins[:, m], y) for m in others], axis=0)
    hits = test._right(own) - np.mean([test._right(test.margins[:, m]) for m in others], axis=0)
    return {
        "accuracy": test.bootstrap.estimate(hits, y != 0.5, people).model_dump(),
        "log_loss": test.bootstrap.estimate(losses, everything, people).model_dump(),
    }


def _likes(head: RewardHead, common: RewardHead | None, features: FeatureMap) -> list[str]:
    """What a reward weighs most, compared with the common one if there is one, in words; the strongest first, three at most."""
    difference = head.scale * head.weight
    if common is not None:
        difference = difference - common.scale * common.weight
    style = [(float(d), name) for d, name in zip(difference, features.names, strict=True) if name in STYLE_WORDS]
    notable = sorted((item for item in style if abs(item[0]) > _NOTABLE), key=lambda item: -abs(item[0]))
    return [STYLE_WORDS[name][0 if weight > 0 else 1] for weight, name in notable[:3]]


def _worst(test: _Judged, shipped: Array, people: list[Array]) -> dict[str, float]:
    """Accuracy of the worst served coterie and of the worst tenth of the workers."""
    votes = test.votes
    decided = (votes.y != 0.5).astype(float)
    count = votes.sum_by_worker(decided)
    right = votes.sum_by_worker(test._right(shipped) * decided)
    enough = count >= _DECILE_COMPARISONS
    worst = {}
    accuracies = [
        (right[who & (count > 0)] / count[who & (count > 0)]).mean() for who in people if (who & (count > 0)).any()
    ]
    if accuracies:
        worst["coterie"] = float(min(accuracies))
    if enough.any():
        each = np.sort(right[enough] / count[enough])
        worst["decile"] = float(each[: max(1, len(each) // 10)].mean())
    return worst


def _calibration(margin: Array, y: Array, bins: int = 10) -> dict[str, float]:
    """Expected calibration error: |confidence - accuracy| over equal-width bins of max(p, 1 - p), by their sizes."""
    decided = y != 0.5
    if not decided.any():
        return {}
    p = expit(margin[decided])
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) == (y[decided] > 0.5)
    bin_ = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(bin_, confidence - right, bins))
    return {"expected_calibration_error": float(gaps.sum() / len(p))}
