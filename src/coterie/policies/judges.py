"""Judges of answers that no policy was tuned on.

- Held out: reward heads fitted to validation and test comparisons, where policies are tuned on rewards of training
  comparisons. Features and coteries are common to both, the votes are not.
- The truth, where annotators are simulated and their tastes can be measured on any text.

What a held-out judge says rests on the people whose votes it was fitted to. How sure it is, is told by letting each of them
stand for the judge as it were with a little more of their votes: the infinitesimal jackknife (Efron 1982, The Jackknife, the
Bootstrap and Other Resampling Plans, chapter 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from coterie.contracts import ASSIGNMENT, TEST, TRAIN, VALIDATION, matrix
from coterie.discovery.logistic import curvature, gram, residual
from coterie.discovery.votes import Votes, joined, load_votes
from coterie.encoding import STYLE_NAMES, style_features
from coterie.errors import BadData
from coterie.policies.policy import Answer
from coterie.rewards import SMALLEST_RESPONSIBILITY, FittedHead, fit_coterie, fit_global
from coterie.simulation.truth import SimulatedTruth

Array = NDArray[Any]
Features = Callable[[Sequence[str], Sequence[str]], Array]  # prompts and responses [n] -> h [n, d]

_WORDS = STYLE_NAMES.index("words")
_MOST_PEOPLE, _FEWEST_GROUPS = 500, 50  # past the first, people whose votes made judges stand together in random groups


@dataclass(frozen=True)
class Answers:
    """One answer to each of n prompts.

    Attributes:
        prompts, texts: [n].
        finished: [n] bool.
        words: [n], log(1 + words).
        features: h [n, d].
    """

    prompts: list[str]
    texts: list[str]
    finished: Array
    words: Array
    features: Array

    @classmethod
    def of(cls, prompts: list[str], answers: Sequence[Answer], features: Features) -> Answers:
        """Measure answers [n] to prompts [n]."""
        texts = [answer.text for answer in answers]
        finished = np.array([answer.finished for answer in answers])
        words = style_features(prompts, texts)[:, _WORDS].astype(np.float64)
        return cls(prompts, texts, finished, words, features(prompts, texts).astype(np.float64))


class Judge(Protocol):
    """Says how the people of a coterie vote."""

    @property
    def people(self) -> int:
        """How many they are."""
        ...

    def votes(self, first: Answers, second: Answers) -> Array:
        """The chance that each person votes for the first answer, [people, n]."""
        ...


@dataclass(frozen=True)
class HeldoutJudge:
    """A reward head of held-out votes.

    Attributes:
        weight: [d], calibrated: the logistic function of a score difference is the chance of a vote.
        influence: [people, d], by how much each of them moves the weight, times their number; sums to zero.
    """

    weight: Array
    influence: Array

    @property
    def people(self) -> int:
        """As Judge.people; many stand together in groups."""
        return len(self.influence)

    def score(self, answers: Answers) -> Array:
        """Scores [n]."""
        scores: Array = answers.features @ self.weight
        return scores

    def votes(self, first: Answers, second: Answers) -> Array:
        """As Judge.votes. All people have the judge's opinion in the mean, and differ by what they have moved it."""
        margin = self.score(first) - self.score(second)
        moved = self.influence @ (first.features - second.features).T
        votes: Array = expit(margin) + curvature(margin) * moved
        return votes


@dataclass(frozen=True)
class TrueJudge:
    """Simulated annotators themselves; `workers` are rows of the truth's."""

    truth: SimulatedTruth
    workers: Array

    @property
    def people(self) -> int:
        """As Judge.people."""
        return len(self.workers)

    def votes(self, first: Answers, second: Answers) -> Array:
        """As Judge.votes."""
        return self.truth.prefers(first.prompts, first.texts, second.texts)[:, self.workers].T


def heldout_judges(embedded: Path, clustered: Path, seed: int = 0) -> list[HeldoutJudge | None]:
    """Judges of the folders of the embed and cluster stages, as of `fit_judges`: held out are validation and test prompts.

    Raises:
        BadData: an input is missing, or a split is empty.
    """
    train, *parts = (load_votes(embedded / "differences.parquet", split) for split in (TRAIN, VALIDATION, TEST))
    held = joined(parts, train.n_workers)
    held = Votes.of(held.x, held.y, held.worker, held.prompt, held.n_workers, held.weight)
    table = ASSIGNMENT.read(clustered / "assignments.parquet", ["posterior", "reliability"])
    posterior, reliability = matrix(table["posterior"]), table["reliability"].to_numpy()
    return fit_judges(train, held, posterior.astype(np.float64), reliability.astype(np.float64), seed)


def fit_judges(
    train: Votes, held: Votes, posterior: Array, reliability: Array, seed: int = 0
) -> list[HeldoutJudge | None]:
    """Judges for everybody and for each coterie, [1 + coteries]; a coterie without held-out votes has none.

    Args:
        train: comparisons that choose two numbers of a judge, the precision of its prior and its scale.
        held: comparisons that it is fitted to.
        posterior: [n_workers, coteries]. reliability: beta of each worker [n_workers].
        seed: of the random groups of people, where they are many.
    """
    everybody = np.ones(held.n_workers)
    common = fit_global(held, train, reliability)
    moved = _influence(held, everybody, reliability, common, np.zeros((held.n_workers, held.n_features)))
    judges: list[HeldoutJudge | None] = [_judge_of(common, moved, held.present, train, everybody, seed)]
    for audience in np.where(posterior < SMALLEST_RESPONSIBILITY, 0.0, posterior).T:
        people = held.present & (audience > 0)
        if not people.any():
            judges.append(None)
            continue
        fitted = fit_coterie(held, train, audience, reliability, common.head)
        own = _influence(held, audience, reliability, fitted, moved)
        judges.append(_judge_of(fitted, own, people, train, audience, seed))
    return judges


def _influence(votes: Votes, audience: Array, reliability: Array, fitted: FittedHead, of_prior: Array) -> Array:
    """By how much each worker's votes move the weight of a head, and of the prior's mean it is pulled towards [workers, d]."""
    beta = reliability[votes.worker]
    counts = votes.weighted(audience[votes.worker])
    margin = beta * (votes.x @ fitted.head.weight)
    hessian = gram(votes.x, counts * beta**2 * curvature(margin)) + fitted.precision * np.eye(votes.n_features)
    pushed = votes.gradients_by_worker(counts * beta * residual(margin, votes.y)) + fitted.precision * of_prior
    moved: Array = np.linalg.solve(hessian, pushed.T).T
    return moved


def _judge_of(
    fitted: FittedHead, moved: Array, people: Array, train: Votes, audience: Array, seed: int
) -> HeldoutJudge:
    """A judge of the workers `people` [n_workers, bool], who move the head's weight by `moved` [n_workers, d]."""
    weight = fitted.head.scale * fitted.head.weight
    moved = fitted.head.scale * moved[people] * np.count_nonzero(people)
    # The scale follows the weight: at the least loss on training comparisons this sum stays zero.
    counts, margin = train.weighted(audience[train.worker]), train.x @ weight
    slope = train.x.T @ (counts * (residual(margin, train.y) - curvature(margin) * margin))
    moved = moved - np.outer(moved @ slope, weight) / float(slope @ weight)
    groups = min(len(moved), max(_FEWEST_GROUPS, _MOST_PEOPLE * len(moved) // len(people)))  # in proportion
    group = np.random.default_rng(seed).permutation(len(moved)) % groups
    grouped = np.zeros((groups, moved.shape[1]))
    np.add.at(grouped, group, moved)
    grouped /= np.bincount(group)[:, None]
    return HeldoutJudge(weight, grouped - grouped.mean(axis=0))


def true_judges(truth: SimulatedTruth, clustered: Path) -> list[TrueJudge | None]:
    """Judges for everybody and for each coterie, [1 + coteries]: the simulated workers that were assigned to it, if any.

    Raises:
        BadData: the workers of the clustering are not the simulation's.
    """
    table = ASSIGNMENT.read(clustered / "assignments.parquet", ["worker_id", "coterie", "posterior"])
    places = {worker: row for row, worker in enumerate(truth.workers)}
    rows = np.array([places.get(worker, -1) for worker in table["worker_id"].to_pylist()])
    if (rows < 0).any():
        raise BadData(
            f"{clustered}: {np.count_nonzero(rows < 0)} of its {len(rows)} workers are not in the truth. Give the truth.json "
            "that ingest wrote of simulated://..., or ingest with pseudonyms none."
        )
    coterie = table["coterie"].to_numpy()
    coteries = table.schema.field("posterior").type.list_size
    groups = [rows, *(rows[coterie == k] for k in range(coteries))]
    return [TrueJudge(truth, group) if len(group) else None for group in groups]
