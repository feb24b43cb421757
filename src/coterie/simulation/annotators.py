"""Annotators with known tastes: who they are, and how they vote (docs/method, sections 1 and 8).

A taste is a vector over visible attributes, in logits a standard deviation. Every group shares a common part and has
a part of its own, orthogonal to all others, in such a proportion that any two groups are at cosine 0.7.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from coterie.errors import BadConfiguration
from coterie.simulation.settings import Setting

Array = NDArray[np.float64]
Rows = NDArray[np.intp]

COSINE = 0.7  # between the tastes of any two groups
CARELESS_SHARE, CARELESS_RELIABILITY = 0.3, 0.1
CONTINUOUS_RANK = 3
UNEQUAL_SIGMA, FEWEST_COMPARISONS = 1.2, 2  # of the log-normal amounts of data

# What everybody likes, and what each group likes besides. The first four and the last four groups use the same pairs
# of attributes with one sign turned, so that all eight are orthogonal.
_EVERYBODY = ("everybody", {"examples": 1, "second_person": 1, "overlap": -1, "first_person": -1})
_GROUPS: tuple[tuple[str, dict[str, int]], ...] = (
    ("brief and direct", {"words": -1, "hedging": -1}),
    ("lists and figures", {"lists": 1, "numbers": 1}),
    ("warm, and asks back", {"exclamations": 1, "questions": 1}),
    ("formal and technical", {"word_length": 1, "contractions": -1}),
    ("thorough and direct", {"words": 1, "hedging": -1}),
    ("prose with figures", {"lists": -1, "numbers": 1}),
    ("warm, without questions", {"exclamations": 1, "questions": -1}),
    ("plain words, spelled out", {"word_length": -1, "contractions": -1}),
)
_SHARES = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2)}  # of more groups: in proportion to K, K - 1, ..., 1


@dataclass(frozen=True)
class Annotators:
    """The simulated people.

    Attributes:
        names: of the groups, [K]; none where tastes are continuous.
        group_tastes: [K, d].
        group: of each worker, [w]; -1 where tastes are continuous.
        tastes: [w, d].
        reliability: beta of each worker, [w].
    """

    names: list[str]
    group_tastes: Array
    group: Rows
    tastes: Array
    reliability: Array

    def utilities(self, worker: Rows, differences: Array) -> Array:
        """x . theta_i of attribute differences [m, d] for the workers [m] who judge them: [m]."""
        utilities: Array = np.einsum("md,md->m", self.tastes[worker], differences)
        return utilities

    def scaled(self, accuracy: float, worker: Rows, differences: Array) -> Annotators:
        """The same people with all tastes scaled so that a careful worker's own predicts `accuracy` of their votes.

        Raises:
            BadConfiguration: too many pairs show no difference for that.
        """
        margins = np.abs(self.utilities(worker, differences))
        strongest = 1e3 / max(float(margins.mean()), 1e-12)
        if expit(strongest * margins).mean() <= accuracy:
            raise BadConfiguration(
                f"an accuracy of {accuracy} cannot be reached: in {np.mean(margins == 0):.0%} of the pairs nothing "
                "differs that these annotators care about. Lower the accuracy, or give other texts."
            )
        factor = brentq(lambda scale: expit(scale * margins).mean() - accuracy, 0.0, strongest)
        return replace(self, tastes=factor * self.tastes, group_tastes=factor * self.group_tastes)

    def votes(self, worker: Rows, differences: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Whether each worker [m] prefers the first response of a pair with attribute differences [m, d]."""
        probabilities = expit(self.reliability[worker] * self.utilities(worker, differences))
        votes: NDArray[np.bool_] = rng.random(len(worker)) < probabilities
        return votes


def draw_annotators(
    setting: Setting, groups: int, workers: int, attributes: tuple[str, ...], rng: np.random.Generator
) -> Annotators:
    """Draw people for a setting; their tastes have unit length (continuous: in the mean square).

    Args:
        setting: groups where it speaks of none else, one group where it is a null.
        groups: 1 to 8.
        workers: how many people.
        attributes: the names of the d attributes, among them all that tastes are made of.
        rng: decides who belongs where.
    """
    common, own = np.sqrt(COSINE), np.sqrt(1 - COSINE)
    everybody = _direction(_EVERYBODY[1], attributes)
    directions = np.array([_direction(likes, attributes) for _, likes in _GROUPS])
    reliability = np.ones(workers)
    if setting in ("careless", "null-careless"):
        careless = rng.permutation(workers)[: round(CARELESS_SHARE * workers)]
        reliability[careless] = CARELESS_RELIABILITY
    if setting == "continuous":
        places = rng.standard_normal((workers, CONTINUOUS_RANK)) / np.sqrt(CONTINUOUS_RANK)
        tastes = common * everybody + own * places @ directions[:CONTINUOUS_RANK]
        nobody = np.full(workers, -1)
        return Annotators([], np.empty((0, len(attributes))), nobody, tastes, reliability)
    if setting.startswith("null"):
        names, group_tastes = [_EVERYBODY[0]], everybody[None]
    else:
        names = [name for name, _ in _GROUPS[:groups]]
        group_tastes = common * everybody + own * directions[:groups]
    group = rng.permutation(np.repeat(np.arange(len(names)), _apportion(group_shares(len(names)), workers)))
    return Annotators(names, group_tastes, group, group_tastes[group], reliability)


def draw_amounts(setting: Setting, workers: int, mean: int, most: int, rng: np.random.Generator) -> Rows:
    """How many comparisons each worker makes, [workers]: `mean`, or log-normal around it where they are unequal."""
    if setting not in ("unequal", "null-unequal"):
        return np.full(workers, mean)
    weights = rng.lognormal(0.0, UNEQUAL_SIGMA, workers)
    amounts: Rows = np.clip(np.rint(mean * weights / weights.mean()), FEWEST_COMPARISONS, most).astype(np.intp)
    return amounts


def group_shares(groups: int) -> Array:
    """The groups' shares of the annotators, descending: 60/40, 50/30/20, 40/30/20/10 % and so on."""
    shares = np.array(_SHARES.get(groups, range(groups, 0, -1)), dtype=np.float64)
    normalised: Array = shares / shares.sum()
    return normalised


def _direction(likes: dict[str, int], attributes: tuple[str, ...]) -> Array:
    """The unit vector over `attributes` that weighs the named ones equally."""
    direction = np.zeros(len(attributes))
    for name, sign in likes.items():
        direction[attributes.index(name)] = sign / np.sqrt(len(likes))
    return direction


def _apportion(shares: Array, n: int) -> Rows:
    """Whole numbers that sum to n, by largest remainder."""
    counts = np.floor(shares * n).astype(np.intp)
    counts[np.argsort(counts - shares * n, kind="stable")[: n - counts.sum()]] += 1
    return counts
