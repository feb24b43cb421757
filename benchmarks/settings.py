"""Simulated workers of known tastes, for benchmarks.verdicts: the settings of docs/method, section 8, as features.

The people, their amounts of data and the scale of their tastes are those of coterie.simulation. In place of texts, every
response is a point of independent normal features, so that a comparison is x ~ N(0, I), and workers meet the same
responses again. "planted" draws votes for real texts and for those who really compared them.

Test prompts are never training prompts. What an estimator reaches that is told the truth is in `oracle`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from scipy.stats import ortho_group

from coterie import stages
from coterie.config import EmbedSettings, EncodeSettings, IngestSettings
from coterie.contracts import TEST, TRAIN, VALIDATION
from coterie.discovery import LowRankReward, MixtureReward, ReliabilityReward, Votes, load_votes
from coterie.discovery.differences import differences
from coterie.discovery.features import fit_features
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array, joined
from coterie.simulation import SimulationSettings
from coterie.simulation.annotators import CONTINUOUS_RANK, Annotators, draw_amounts, draw_annotators
from coterie.simulation.texts import ATTRIBUTES

UKP = Path(__file__).parents[2] / "shared" / "data" / "ukpconvarg1.jsonl.gz"
HELD_OUT = 50  # test comparisons of a worker
FEWEST_COMPARISONS = 50  # of a worker on whose real comparisons a taste is planted


class FeatureSettings(SimulationSettings):
    """A simulation in feature space; `prompts` is the number of training prompts, and of test prompts."""

    features: int = Field(default=32, ge=1, description="independent features; fewer than twelve only for one taste")


_SMALL: dict[str, Any] = {"workers": 60, "comparisons_per_worker": 40, "features": 8}
SETTINGS: dict[str, FeatureSettings] = {
    "groups": FeatureSettings(setting="groups"),
    "groups-2": FeatureSettings(setting="groups", groups=2),
    "groups-8": FeatureSettings(setting="groups", groups=8),
    "continuous": FeatureSettings(setting="continuous"),
    "careless": FeatureSettings(setting="careless"),
    "unequal": FeatureSettings(setting="unequal"),
    "planted": FeatureSettings(setting="planted", texts=UKP),
    "planted-null": FeatureSettings(setting="planted", texts=UKP, groups=1),
    "null": FeatureSettings(setting="null"),
    "null-careless": FeatureSettings(setting="null-careless"),
    "null-unequal": FeatureSettings(setting="null-unequal"),
    "small-null": FeatureSettings(setting="null", **_SMALL),
    "small-null-careless": FeatureSettings(setting="null-careless", **_SMALL),
    "small-null-unequal": FeatureSettings(setting="null-unequal", **_SMALL),
}


@dataclass(frozen=True)
class DataSet:
    """Training votes, the votes of the same people on other prompts, and who they are; tastes are about the features."""

    train: Votes
    test: Votes
    people: Annotators


def draw(settings: FeatureSettings) -> DataSet:
    """Draw one data set; the seed of the settings decides everything.

    Raises:
        BadData: planted, and the texts are not there. BadConfiguration: planted, and there is no encoder.
    """
    rng = np.random.default_rng(settings.seed)
    if settings.texts is not None:
        train, test, names = _real_comparisons(settings.texts)
        people = draw_annotators(settings.setting, settings.groups, train.n_workers, names, rng)
    else:
        train, test = _made_up_comparisons(settings, rng)
        people = draw_annotators(settings.setting, settings.groups, settings.workers, ATTRIBUTES, rng)
        # Orthonormal rows, a random direction for every attribute; with fewer features than attributes only one is used.
        size = max(settings.features, len(ATTRIBUTES))
        frame = ortho_group.rvs(size, random_state=rng)[: len(ATTRIBUTES), : settings.features]
        people = replace(people, tastes=people.tastes @ frame, group_tastes=people.group_tastes @ frame)
    worker, x = (np.concatenate([getattr(votes, name) for votes in (train, test)]) for name in ("worker", "x"))
    people = people.scaled(settings.accuracy, worker, x)
    return DataSet(_vote(people, train, rng), _vote(people, test, rng), people)


def _made_up_comparisons(settings: FeatureSettings, rng: np.random.Generator) -> tuple[Votes, Votes]:
    """Everybody compares random distinct pairs of responses of one pool, before anybody has voted."""
    sides = np.array(list(combinations(range(settings.responses), 2)))
    amounts = draw_amounts(settings.setting, settings.workers, settings.comparisons_per_worker, settings.pairs, rng)
    parts: list[Votes] = []
    for size in (amounts, np.full(settings.workers, min(HELD_OUT, settings.pairs))):
        shape = (settings.prompts, settings.responses, settings.features)
        h = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(2))
        drawn = np.concatenate([rng.choice(settings.pairs, n, replace=False) for n in size.tolist()])
        prompt, pair = np.divmod(drawn, len(sides))
        first, second = sides[pair].T
        worker = np.repeat(np.arange(settings.workers), size)
        x = h[prompt, first] - h[prompt, second]
        parts.append(Votes.of(x, np.ones(len(x)), worker, prompt + len(parts) * settings.prompts, settings.workers))
    return parts[0], parts[1]


@cache
def _real_comparisons(texts: Path) -> tuple[Votes, Votes, tuple[str, ...]]:
    """Training and held-out comparisons of the workers who made many, as features, and the features' names."""
    folder = Path(tempfile.gettempdir()) / "coterie-benchmarks"
    ingested, encoded = folder / "ingest", folder / "encode"
    stages.ingest(ingested, IngestSettings(source=[str(texts)], pseudonyms="none"))
    stages.encode(ingested, encoded, EncodeSettings())
    comparisons, vectors = ingested / stages.COMPARISONS, encoded / stages.VECTORS
    features = fit_features(comparisons, vectors, EmbedSettings())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / stages.DIFFERENCES
        differences(comparisons, vectors, features, path)
        train, *held_out = (load_votes(path, split) for split in (TRAIN, VALIDATION, TEST))
    many = np.flatnonzero(sum(votes.counts for votes in (train, *held_out)) >= FEWEST_COMPARISONS)
    return train.of_workers(many), together(held_out).of_workers(many), features.names


def together(parts: Sequence[Votes]) -> Votes:
    """Votes of the same workers as one set."""
    joint = joined(parts, parts[0].n_workers)
    return Votes.of(joint.x, joint.y, joint.worker, joint.prompt, joint.n_workers, joint.weight)


def _vote(people: Annotators, votes: Votes, rng: np.random.Generator) -> Votes:
    """The same comparisons with the chosen response of each first."""
    first_wins = people.votes(votes.worker, votes.x, rng)
    return Votes.of(
        np.where(first_wins[:, None], votes.x, -votes.x),
        np.ones(len(votes)),
        votes.worker,
        votes.prompt,
        votes.n_workers,
    )


def truth(people: Annotators, votes: Votes) -> Array:
    """Logits [n] of the votes as they were drawn."""
    return people.reliability[votes.worker] * people.utilities(votes.worker, votes.x)


def oracle(data: DataSet, base: ReliabilityReward, precision: float) -> Reward:
    """The estimator that is told what is to be discovered, fitted to the training votes.

    Groups: the mixture under these priors, told everybody's group. Continuous tastes: the low-rank member, told theta and
    U but no a_i, and that all are equally reliable.
    """
    people, train = data.people, data.train
    if people.names:
        groups = np.eye(len(people.names))[people.group]
        mixture = MixtureReward(len(people.names), precision, base=base).fit(train, labels=people.group)
        largest = np.argsort(-groups[train.present].sum(axis=0), kind="stable")  # the order of theta_
        mixture.responsibilities_ = groups[:, largest]  # fit has put the posterior here
        return mixture
    lowrank = LowRankReward(CONTINUOUS_RANK)
    mean = people.tastes.mean(axis=0)
    _, lengths, directions = np.linalg.svd(people.tastes - mean, full_matrices=False)
    basis = directions[:CONTINUOUS_RANK].T * lengths[:CONTINUOUS_RANK] / np.sqrt(len(people.tastes))
    lowrank.theta_, lowrank.basis_ = mean.astype(np.float32), basis.astype(np.float32)
    lowrank.n_features_in_, lowrank.reliability_variance_ = train.n_features, 1e-6
    lowrank.embeddings_, lowrank.covariances_, lowrank.log_reliability_ = lowrank.infer(train)
    return lowrank
