"""Held-out quality: own against global against wrong coterie, what is shipped against the pooled reward, and the gate.

Validation prompts decide (the gate), test prompts report. All means are macro: every worker counts once. Ties count in
the log-loss and not in the accuracy, where a tie has no right answer. Intervals come from a bootstrap over workers
and prompts, paired between models (bootstrap.py; docs/method, sections 2 and 9). Differences are a model's minus its
baseline's: accuracy gains are positive, log-loss gains negative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from coterie.bootstrap import FEWEST_WORKERS, TwoWayBootstrap
from coterie.config import EvaluateSettings
from coterie.contracts import (
    ASSIGNMENT,
    EMBEDDING_REWARD,
    FEATURES_FILE,
    GLOBAL,
    SPLITS,
    TEST,
    VALIDATION,
    CoterieSummary,
    Gate,
    Heldout,
    Quality,
    Ships,
    StyleWeight,
    matrix,
)
from coterie.discovery.discover import fit_embedding
from coterie.discovery.features import FeatureMap
from coterie.discovery.logistic import log_loss
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.newcomers import Member, learning_curve
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.votes import VoteFile, Votes, joined, load_votes
from coterie.errors import BadData
from coterie.portraits import calibration_curve, likes, style_weights
from coterie.rewards import RewardHead, served_heads, serving_own
from coterie.rewards.scored import HeldoutMargins, has_adapter
from coterie.scoring import average

Array = NDArray[Any]

_DECILE_COMPARISONS = 5  # a worker's accuracy over fewer is noise, not a bad reward


@dataclass(frozen=True)
class _Judged:
    """Comparisons of one split with every model's margins: global and own heads [n, 1 + K], by embedding [n]."""

    votes: Votes
    margins: Array
    bootstrap: TwoWayBootstrap
    personal: Array | None = None

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
    embedded: Path,
    clustered: Path,
    rewards: Mapping[str, Path],
    settings: EvaluateSettings,
    comparisons: Path | None = None,
) -> dict[str, Any]:
    """Judge the rewards (by name: global, coterie-0 ..., embedding) on held-out prompts.

    Args:
        embedded: folder of the embed stage. clustered: of the cluster stage. rewards: folders of the rewards.
        settings: replicates, level, seed.
        comparisons: comparisons.parquet; needed where rewards are adapters.

    Returns:
        gates, ships (after them), matrix (accuracy and log_loss, [people of coterie, model]), own_wrong, heldout, worst,
        calibration, coteries: the parts of contracts.Metrics that are held-out quality.

    Raises:
        BadData: an input is missing, or no test or validation prompt is there.
    """
    table = ASSIGNMENT.read(
        clustered / "assignments.parquet", ["coterie", "posterior", "comparisons", "embedding", "reliability"]
    )
    posterior, coterie = matrix(table["posterior"]).astype(np.float64), table["coterie"].to_numpy()
    found = json.loads((clustered / "metrics.json").read_text(encoding="utf-8"))
    heads = {name: RewardHead.load(folder) for name, folder in rewards.items() if name != EMBEDDING_REWARD}
    n_coteries = posterior.shape[1]
    if missing := [k for k in range(n_coteries) if f"coterie-{k}" not in heads]:
        raise BadData(f"no reward of coterie {', '.join(map(str, missing))}; run `coterie reward` for all of them")
    features = FeatureMap.load(embedded / FEATURES_FILE)
    models = [rewards[GLOBAL], *(rewards[f"coterie-{k}"] for k in range(n_coteries))]
    personal, places = rewards.get(EMBEDDING_REWARD), matrix(table["embedding"])
    validation, test = (
        _judge(embedded, comparisons, split, models, personal, places, settings) for split in (VALIDATION, TEST)
    )
    people = [coterie == k for k in range(n_coteries)]
    everybody = np.ones(len(coterie), dtype=bool)

    gates = [_gate(k, validation, people[k], validation.margins[:, 1 + k], n_coteries) for k in range(n_coteries)]
    ships: Ships = found["selection"]["ships"]
    common = shipped = test.margins[:, 0]
    if ships == "coteries":
        served = [1 + k if own else 0 for k, own in enumerate(serving_own(gates))]
        shipped = average(test.margins[:, served], posterior[test.votes.worker])
    elif ships == "embedding":
        if validation.personal is None or test.personal is None:
            raise BadData("people are to be served by their embedding, and no reward does that; run `coterie reward`")
        gates.append(_gate(None, validation, everybody, validation.personal, 2))
        if gates[-1].serves == "own":
            shipped = test.personal
        else:
            ships = "one-reward"
    overall, gain = test.quality(shipped, everybody), test.quality(shipped, everybody, common)
    linear = {}
    if any(has_adapter(folder) for folder in rewards.values()):
        linear = {
            "difference_to_linear": test.quality(shipped, everybody, _linear(test, heads, posterior, gates, ships))
        }
    counts = table["comparisons"].to_numpy()
    styles = style_weights(
        _pooled([validation.votes, test.votes]),
        posterior,
        table["reliability"].to_numpy().astype(np.float64),
        heads,
        _precisions(rewards, (len(validation.votes) + len(test.votes)) / counts.sum()),
        features,
        settings.level,
    )
    summaries = [
        CoterieSummary(
            id=k,
            workers=int(people[k].sum()),
            comparisons=int(counts[people[k]].sum()),
            serves=gates[k].serves,
            own_vs_global=test.quality(test.margins[:, 1 + k], people[k], common),
            likes=likes(styles[k]),
            style=[StyleWeight(**weight) for weight in styles[k]],
        )
        for k in range(n_coteries)
    ]
    cells = [[test.quality(test.margins[:, m], who) for m in range(len(models))] for who in people]
    return {
        "level": settings.level,
        "ships": ships,
        "gates": [gate.model_dump() for gate in gates],
        "matrix": {
            "models": [GLOBAL, *(f"coterie-{k}" for k in range(n_coteries))],
            "accuracy": [[cell.accuracy.model_dump() for cell in row] for row in cells],
            "log_loss": [[cell.log_loss.model_dump() for cell in row] for row in cells],
        },
        "own_wrong": [_against_wrong(k, test, people[k]) for k in range(n_coteries)] if n_coteries > 1 else [],
        "heldout": {
            "seen": Heldout(
                accuracy=overall.accuracy.value, log_loss=overall.log_loss.value, difference_to_pooled=gain
            ).model_dump()
            | {
                "accuracy_interval": overall.accuracy.model_dump(),
                "pooled": test.quality(common, everybody).model_dump(),
            }
            | {name: quality.model_dump() for name, quality in linear.items()},
            **_unseen(embedded, found, ships, settings),
        },
        "worst": _worst(test, shipped, people),
        "calibration": _calibration(shipped, test.votes.y),
        "calibration_curve": calibration_curve(shipped, test.votes.y),
        "coteries": [summary.model_dump() for summary in summaries],
        "test_comparisons": len(test.votes),
        "validation_comparisons": len(validation.votes),
    }


def _linear(test: _Judged, heads: Mapping[str, RewardHead], posterior: Array, gates: list[Gate], ships: Ships) -> Array:
    """Margins [n] if linear heads served in the place of adapters: what a backbone is worth is measured against these."""
    if ships != "coteries":
        return heads[GLOBAL].margin(test.votes.x)
    served = served_heads(heads, posterior.shape[1], serving_own(gates))
    margins = np.stack([head.margin(test.votes.x) for head in served], axis=1)
    return average(margins, posterior[test.votes.worker])


def _unseen(embedded: Path, found: Mapping[str, Any], ships: Ships, settings: EvaluateSettings) -> dict[str, Any]:
    """Quality for new workers after some of their comparisons, by the member that is shipped, and its temperature."""
    selection, priors = found["selection"], found["priors"]
    base = ReliabilityReward(priors["precision"], priors["reliability_variance"])
    if ships == "embedding":
        member, size, prior = priors["embedding"]

        def make(votes: Votes, base: ReliabilityReward) -> Member:
            return fit_embedding(votes, member, size, prior, base, settings.seed)
    else:
        coteries = selection["coteries"] if ships == "coteries" else 1

        def make(votes: Votes, base: ReliabilityReward) -> Member:
            precision, variance = priors["coterie_precision"], base.reliability_variance
            return MixtureReward(coteries, precision, variance, base, seed=settings.seed).fit(votes)

    train, validation, test = (VoteFile(embedded / "differences.parquet", split) for split in SPLITS)
    curve = learning_curve(train, validation, test, make, base, settings.seed)
    if curve is None:
        return {"unseen_by_shots": {}}
    bootstrap = TwoWayBootstrap(curve.votes, settings.replicates, settings.level, settings.seed)
    judged = _Judged(curve.votes, curve.pooled[:, None], bootstrap)
    everybody = np.ones(curve.votes.n_workers, bool)
    shots = {}
    for k, personal in curve.logits.items():
        logits = curve.pooled if ships == "one-reward" else personal  # then nothing that is said changes what serves
        quality, difference = judged.quality(logits, everybody), judged.quality(logits, everybody, curve.pooled)
        shots[str(k)] = Heldout(
            accuracy=quality.accuracy.value, log_loss=quality.log_loss.value, difference_to_pooled=difference
        ).model_dump() | {"workers": len(curve.newcomers)}
    return {"unseen_by_shots": shots, "temperature": curve.temperature}


def _pooled(parts: list[Votes]) -> Votes:
    """Votes of several splits as one set."""
    votes = joined(parts, parts[0].n_workers)
    return Votes.of(votes.x, votes.y, votes.worker, votes.prompt, votes.n_workers, votes.weight)


def _precisions(rewards: Mapping[str, Path], share: float) -> dict[str, float]:
    """The precision of each head's prior, for this share of its comparisons."""
    folders = {name: folder for name, folder in rewards.items() if name != EMBEDDING_REWARD}
    return {
        name: share * json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["precision"]
        for name, folder in folders.items()
    }


def _judge(
    embedded: Path,
    comparisons: Path | None,
    split: str,
    models: list[Path],
    personal: Path | None,
    places: Array,
    settings: EvaluateSettings,
) -> _Judged:
    """Judge the rewards in `models`, the global one first, and that by embedding in `personal`, of workers at places [n, r]."""
    votes = load_votes(embedded / "differences.parquet", split)
    told = HeldoutMargins(embedded, comparisons, split, votes.x)
    margins = np.stack([told.of(folder) for folder in models], axis=1)
    own = None if personal is None else told.by_embedding(personal, models[0], places[votes.worker])
    bootstrap = TwoWayBootstrap(votes, settings.replicates, settings.level, settings.seed)
    return _Judged(votes, margins, bootstrap, own)


def _gate(k: int | None, validation: _Judged, people: Array, own: Array, coteries: int) -> Gate:
    """A coterie serves its own reward, of margins own [n], only if it beats the global one on its people's validation
    prompts; and so with everybody (no coterie) and the reward by embedding."""
    if coteries == 1:
        return Gate(coterie=k, serves="global", reason="one reward serves everybody")
    gain = validation.quality(validation.margins[:, 0], people, own).log_loss
    if gain.low is None or gain.high is None:
        return Gate(
            coterie=k,
            serves="global",
            reason=f"fewer than {FEWEST_WORKERS} workers, or too few validation prompts, for an interval",
        )
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
