"""What preferences can show, before any GPU is used: the verdict, the gain to expect, the power, and what would settle it.

All of it is about d_i, worker i's mean held-out gain: the log-loss of pooled + reliability less that of the best taste
member. Its mean over W workers has the variance (between + within / k) / W where each has k times the comparisons: what
the workers' true gains differ by, and the noise of their votes. That a member learns more from more votes is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import norm, t

from coterie.bootstrap import FEWEST_WORKERS, TwoWayBootstrap
from coterie.contracts import TRAIN, Candidate, Estimate, Heterogeneity, Selection
from coterie.discovery.clustering import fit_coteries
from coterie.discovery.discover import LEVEL, fit_embedding
from coterie.discovery.logistic import log_loss
from coterie.discovery.pooled import ReliabilityReward, Reward
from coterie.discovery.selection import (
    BASIS_PRECISIONS,
    COTERIE_PRECISIONS,
    SLOPE_VARIANCES,
    HeldOut,
    sample_of,
    split_groups,
)
from coterie.discovery.votes import Array, VoteFile, Votes, one_thread
from coterie.progress import progress
from coterie.report.words import interval, number, share

POWER = 0.8
_DISTANCE = float(norm.ppf(1 - LEVEL) + norm.ppf(POWER))  # standard errors at which a gain shows with that probability
_RESAMPLES, _INTERVAL = 1000, 0.9
_PRIORS = {"mixture": COTERIE_PRECISIONS, "lowrank": BASIS_PRECISIONS, "slopes": SLOPE_VARIANCES}

Finding = Literal["coteries", "degrees", "one-taste", "undecided", "too-little"]


class Power(BaseModel):
    """What the paired test of the workers' gains, one-sided at the level of 5 %, can show. Gains in nats a comparison.

    Where votes are so many that discovery decides on a sample of the workers, all this is about the sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    member: str  # the best taste member that was tried
    size: int
    workers: int  # with held-out comparisons
    comparisons: float  # collected from a worker, mean
    gain: Estimate  # held out, of that member; the interval is over workers
    standard_error: float
    between: float  # the variance of workers' true gains
    within: float  # the variance of a worker's mean gain around the true one
    smallest_gain: float  # that shows in 80 % of repetitions
    wanted: float  # the gain that was found, or where none was, the one that would be worthwhile
    probability: float  # that the wanted gain shows
    more_workers: int  # like these, with which the wanted gain shows in 80 %
    more_comparisons: int | None  # from each of these workers, instead; None: no number of them does


class Assessment(BaseModel):
    """assessment.json: the evidence and what follows from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    finding: Finding
    recommendation: str
    data: dict[str, int]  # workers, comparisons, refused
    selection: Selection
    heterogeneity: Heterogeneity | None
    stability: dict[str, float]
    sizes: list[int]  # workers of each coterie
    accuracy: Estimate | None  # held-out gain of the best taste member, a fraction
    worthwhile: float  # nats a comparison
    power: Power | None  # None: fewer than ten workers who prefer anything, or nothing could be held out


@dataclass(frozen=True)
class Contrast:
    """The paired comparison of two models over workers: its mean, and the two parts of its variance.

    Attributes:
        gain: mean over workers of the mean difference of their comparisons.
        between: variance of the workers' true means.
        within: mean variance of a worker's mean around the true one.
        comparisons: held out of a worker, mean, in effective number.
        workers: W.
    """

    gain: float
    between: float
    within: float
    comparisons: float
    workers: int

    @classmethod
    def of(cls, votes: Votes, values: Array, weights: Array) -> Self:
        """Estimate by moments from the difference [n] that each of `votes` shows and what it counts for its worker, [n].

        A worker's comparisons of one prompt depend on each other: the noise is that of the prompts' sums, of one variance
        for everybody.
        """
        everybody = np.flatnonzero(votes.present)
        weights = weights / votes.sum_by_worker(weights)[votes.worker]
        means = votes.sum_by_worker(weights * values)
        prompts, prompt = np.unique(split_groups(votes)[0], return_inverse=True)
        cells, cell = np.unique(votes.worker * np.int64(len(prompts)) + prompt, return_inverse=True)
        worker, part = cells // len(prompts), np.bincount(cell, weights)  # of the worker's mean, that a prompt makes
        noise = (np.bincount(cell, weights * values) - part * means[worker]) ** 2
        square, cube = np.bincount(worker, part**2), np.bincount(worker, part**3)
        # Deviations of the prompts from a worker's own mean hold this part of their variance (bootstrap.py).
        held = (square - 2 * cube + square**2).sum()
        total = float(means[everybody].var(ddof=1))
        within = min(float(noise.sum() * square[everybody].mean() / held), total) if held > 0 else 0.0
        comparisons = float((1 / votes.sum_by_worker(weights**2)[everybody]).mean())
        return cls(float(means[everybody].mean()), total - within, within, comparisons, len(everybody))

    @property
    def standard_error(self) -> float:
        """Of the gain."""
        return float(np.sqrt((self.between + self.within) / self.workers))

    def estimate(self) -> Estimate:
        """The gain with its interval, of Student's t."""
        half = float(t.ppf((1 + _INTERVAL) / 2, self.workers - 1)) * self.standard_error
        return Estimate(value=self.gain, low=self.gain - half, high=self.gain + half, level=_INTERVAL)

    def parts(self, gain: float) -> tuple[float, float]:
        """between and within, were the true gain `gain`.

        Where tastes are not seen, the fitted ones are shrunk to nothing and the differences hardly vary, but a gain would
        not come without variance. A log-likelihood ratio between close models, the better one true, has twice its mean as
        variance (Kullback 1959, Information Theory and Statistics, section 2.6). Gains beyond what is seen are taken to grow
        with a worker's comparisons, so that it is their mean that counts, and to have their own mean as standard deviation
        over workers, as from normal tastes along two directions.
        """
        unseen = max(gain - max(self.gain, 0.0), 0.0)
        return self.between + unseen**2, self.within + 2 * unseen / self.comparisons

    def smallest_gain(self) -> float:
        """The gain that shows with probability POWER: gain = _DISTANCE * its standard error, solved for the gain."""
        seen, ratio = max(self.gain, 0.0), _DISTANCE**2 / self.workers
        missing = seen**2 - ratio * (self.between + self.within)
        if missing > 0:
            return float(np.sqrt(ratio * (self.between + self.within)))
        square, half = 1 - ratio, seen - ratio / self.comparisons
        return float(seen + (np.sqrt(half**2 - square * missing) - half) / square)

    def probability(self, gain: float) -> float:
        """That a true gain `gain` > 0 shows."""
        error = np.sqrt(sum(self.parts(gain)) / self.workers)
        return float(norm.cdf(gain / max(error, 1e-12) - norm.ppf(1 - LEVEL)))

    def times_workers(self, gain: float) -> float:
        """How many times the workers show a true gain `gain` with probability POWER."""
        return float(_DISTANCE**2 * sum(self.parts(gain)) / (self.workers * gain**2))

    def times_comparisons(self, gain: float) -> float:
        """How many times the comparisons of the same workers do; infinite where the workers differ too much."""
        between, within = self.parts(gain)
        room = self.workers * (gain / _DISTANCE) ** 2 - between
        return within / room if room > 0 else np.inf


def assess(
    ingested: Mapping[str, Any], clustered: Mapping[str, Any], differences: Path, worthwhile: float
) -> Assessment:
    """Assess what was discovered.

    Args:
        ingested, clustered: the metrics of these stages.
        differences: of the embed stage, which cluster read.
        worthwhile: held-out gain, in nats a comparison, from which personalised rewards are worth their cost.

    Raises:
        BadData: `differences` is not a table of differences.
    """
    selection, power, accuracy = Selection(**clustered["selection"]), None, None
    tastes = [candidate for candidate in selection.candidates if candidate.member in _PRIORS]
    if tastes and clustered["held_out"]["splits"]:
        seed = clustered["seed"]
        with one_thread():
            sample = sample_of(VoteFile(differences, TRAIN), seed)
            heldout = HeldOut(sample, clustered["held_out"]["splits"], seed)
            best = max(tastes, key=lambda candidate: candidate.gain)
            votes, nats, right, weights = heldout_gains(heldout, best)
        decided = votes.y != 0.5  # ties say nothing of tastes, however many they are
        if votes.subset(decided).present.sum() >= FEWEST_WORKERS:
            collected = ingested["comparisons"] / ingested["workers"]
            found = selection.verdict != "one-taste"
            power = power_of(Contrast.of(votes, nats, weights), best, collected, found, worthwhile)
            made = TwoWayBootstrap(votes, _RESAMPLES, _INTERVAL, seed)
            accuracy = made.estimate(right, decided, votes.present)
    return conclude(ingested, clustered, power, accuracy, worthwhile)


def heldout_gains(heldout: HeldOut, candidate: Candidate) -> tuple[Votes, Array, Array, Array]:
    """The votes that were held out, what the candidate gains on each in nats and in right answers, and their weights.

    The candidate is fitted to every split again, under the prior that gives its log-loss; a vote that several hold out has the mean.
    """

    def fit(prior: float) -> list[Reward]:
        def make(train: Votes, base: ReliabilityReward) -> Reward:
            if candidate.member == "mixture":
                return fit_coteries(train, candidate.size, "mixture", base, prior, 1, heldout.seed)
            return fit_embedding(train, candidate.member, candidate.size, prior, base, heldout.seed)

        return heldout.fit(make)

    priors = progress(_PRIORS[candidate.member], desc=f"assess: {candidate.member} fitted again", unit="priors")
    fits = [fit(prior) for prior in priors]
    tastes = min(fits, key=lambda made: abs(float(np.nanmean(heldout.losses(made))) - candidate.log_loss))
    nats, right, weights = np.zeros((3, len(heldout.votes)))
    for rows, (_, judge), base, taste in zip(heldout.rows, heldout.splits, heldout.bases, tastes, strict=True):
        before, after = base.decision_function(judge), taste.decision_function(judge)
        weight = judge.weighted(np.ones(len(judge)))
        weight = weight / judge.sum_by_worker(weight)[judge.worker]  # as HeldOut.losses: a worker's splits count alike
        nats[rows] += weight * (log_loss(before, judge.y) - log_loss(after, judge.y))
        right[rows] += weight * (np.sign(after) - np.sign(before)) / 2
        weights[rows] += weight
    out = weights > 0
    return heldout.votes.subset(out), nats[out] / weights[out], right[out] / weights[out], weights[out]


def power_of(contrast: Contrast, best: Candidate, collected: float, found: bool, worthwhile: float) -> Power:
    """What the contrast of the best taste member can show.

    Args:
        contrast: of the workers' held-out gains.
        best: the member.
        collected: comparisons a worker, those of all splits.
        found: whether tastes were found, so that it is their gain that should show; else it is the worthwhile one.
        worthwhile: nats a comparison.
    """
    wanted = contrast.gain if found and contrast.gain > 0 else worthwhile
    workers, comparisons = contrast.times_workers(wanted) - 1, contrast.times_comparisons(wanted) - 1
    return Power(
        member=best.member,
        size=best.size,
        workers=contrast.workers,
        comparisons=collected,
        gain=contrast.estimate(),
        standard_error=contrast.standard_error,
        between=contrast.between,
        within=contrast.within,
        smallest_gain=contrast.smallest_gain(),
        wanted=wanted,
        probability=contrast.probability(wanted),
        more_workers=max(ceil(workers * contrast.workers), 0),
        more_comparisons=max(ceil(comparisons * collected), 0) if np.isfinite(comparisons) else None,
    )


def conclude(
    ingested: Mapping[str, Any],
    clustered: Mapping[str, Any],
    power: Power | None,
    accuracy: Estimate | None,
    worthwhile: float,
) -> Assessment:
    """What follows from the metrics of ingest and cluster and from the power; the arguments are those of Assessment."""
    verdict = clustered["selection"]["verdict"]
    finding: Finding = "coteries" if verdict == "coteries" else "degrees"
    if power is None:
        finding = "too-little"
    elif verdict == "one-taste":
        finding = "one-taste" if power.smallest_gain <= worthwhile else "undecided"
    assessment = Assessment(
        finding=finding,
        recommendation="",
        data={name: int(ingested[name]) for name in ("workers", "comparisons", "refused")},
        selection=clustered["selection"],
        heterogeneity=clustered["heterogeneity"],
        stability=clustered["stability"],
        sizes=clustered["sizes"],
        accuracy=accuracy,
        worthwhile=worthwhile,
        power=power,
    )
    return assessment.model_copy(update={"recommendation": _recommendation(assessment)})


# ---------------------------------------------------------------------------------------------------------------- words
_HEADLINES: dict[Finding, str] = {
    "coteries": "There are groups who want different things",
    "degrees": "Tastes differ by degrees, not in groups",
    "one-taste": "One reward serves everybody",
    "undecided": "Nothing was found, and this data could have missed something",
    "too-little": "Too little data to say anything about tastes",
}


def _recommendation(assessment: Assessment) -> str:
    """What to do, in sentences for the person who pays for it."""
    power, selection, workers = assessment.power, assessment.selection, number(assessment.data["workers"])
    if power is None:
        return (
            f"Collect more before deciding anything. To say whether tastes differ takes at least {FEWEST_WORKERS} workers "
            f"who preferred one response to another on several prompts; here are {workers} worker"
            f"{'' if workers == '1' else 's'} and {number(assessment.data['comparisons'])} comparisons."
        )
    if selection.verdict == "one-taste":
        smallest = (
            f"The smallest gain that would have shown in {share(POWER, 0)} of repetitions is {_milli(power.smallest_gain)} "
            f"thousandths of a nat a comparison; a worthwhile one, set to {_milli(assessment.worthwhile)},"
        )
        if assessment.finding == "one-taste":
            return f"Train one reward for everybody. {smallest} would probably have been seen, and was not."
        missed = f"would have shown in only {_chance(power.probability)}."
        return f"Train one reward for now; different tastes may have been missed. {smallest} {missed} {_more(power)}"
    if assessment.finding == "coteries":
        ari = assessment.stability.get("half_split_ari", 0.0)
        advice = (
            f"Train a reward for each coterie: the {workers} workers fall into {selection.coteries} that want different "
            f"things, and the groups of two halves of their comparisons agree (adjusted Rand index {ari:.2f})."
        )
    else:
        by = "their own embedding" if selection.ships == "embedding" else "a mixture of the coteries’ rewards"
        advice = f"Serve everybody by {by}: tastes differ, but there are no groups with borders between them."
    if power.probability >= POWER:
        sure = f"A gain of the size seen shows in {_chance(power.probability)} of repetitions: this data suffices."
    else:
        sure = f"A gain of the size seen shows in only {_chance(power.probability)} of repetitions. {_more(power)}"
    if power.gain.value is None or power.gain.value >= assessment.worthwhile:
        return f"{advice} {sure}"
    small = (
        f"But the gain, {_told(power.gain, 1000)}, is below the {_milli(assessment.worthwhile)} thousandths of a nat that "
        "are set as worthwhile: one reward would cost less and lose little."
    )
    return f"{advice} {sure} {small}"


def _more(power: Power) -> str:
    """How many more workers or comparisons would show the wanted gain."""
    told = f"For {share(POWER, 0)} it takes about {_about(power.more_workers)} more workers like these"
    if power.more_comparisons is None:
        return (
            f"{told}; as far as this data can tell, more comparisons from these workers alone would not do, so much do the "
            "gains differ between them."
        )
    return f"{told}, or about {_about(power.more_comparisons)} more comparisons from each of these."


def assessment_markdown(assessment: Assessment) -> str:
    """assessment.md: the recommendation, the numbers it rests on, and what they mean."""
    data, selection, power, test = assessment.data, assessment.selection, assessment.power, assessment.heterogeneity
    facts = {
        "Workers": number(data["workers"]),
        "Comparisons": f"{number(data['comparisons'])} ({number(data['refused'])} rows refused)",
    }
    if power is not None:
        never = "no number seems to do" if power.more_comparisons is None else _about(power.more_comparisons)
        facts |= {
            "Verdict": selection.verdict,
            "the same in resamples of the workers": share(selection.confidence, 0),
            "Test of differing tastes": "–" if test is None else f"p = {test.p_value:.2g}",
        }
        if selection.coteries > 1:
            facts["Workers of each coterie"] = ", ".join(map(number, assessment.sizes))
        facts |= {
            "Expected gain": _told(power.gain, 1000),
            "Expected gain, points of accuracy": _told(assessment.accuracy, 100),
            f"Smallest gain that shows in {share(POWER, 0)} of repetitions": _milli(power.smallest_gain),
            f"Share of repetitions in which a gain of {_milli(power.wanted)} shows": _chance(power.probability),
            f"More workers like these, for {share(POWER, 0)}": _about(power.more_workers),
            "or more comparisons from each of these": never,
        }
    lines = [f"# {_HEADLINES[assessment.finding]}", "", assessment.recommendation, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if power is not None:
        lines += [
            "",
            "A gain is held-out log-loss in thousandths of a nat a comparison (guessing costs 693), every worker counted alike: "
            "the best taste member against one reward for everybody that allows for carelessness. Being the best of several "
            "that were tried, it is rather too high than too low. A gain shows when a one-sided test over the workers, at the "
            f"level of {share(LEVEL, 0)}, says so. That more comparisons would also make better rewards is not counted.",
        ]
    return "\n".join(lines) + "\n"


def _told(estimate: Estimate | None, factor: float) -> str:
    """+18.8 [+9.0, +29.2], 90 % interval."""
    told = interval(None if estimate is None else estimate.model_dump(), factor, 1, sign=True)
    return told if estimate is None or estimate.low is None else f"{told}, {share(estimate.level, 0)} interval"


def _chance(probability: float) -> str:
    """A probability in per cent, and never certainty."""
    return "over 99 %" if probability > 0.99 else share(probability, 0)


def _milli(gain: float) -> str:
    """Nats as thousandths: 4.6."""
    return f"{1000 * gain:.1f}"


def _about(count: int) -> str:
    """A count to two digits: 1,300."""
    return number(float(f"{count:.2g}"))
