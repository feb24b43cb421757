"""Where the workers stand: their tastes, the two directions in which they differ most, and words for these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.contracts import ASSIGNMENT, FEATURES_FILE, MODEL_FILE, matrix
from coterie.discovery.embedding import EmbeddingReward
from coterie.discovery.features import FeatureMap
from coterie.encoding.style import STYLE_WORDS
from coterie.portraits import NOTABLE

Array = NDArray[Any]

_MOST = 20_000  # workers whom the pictures are made of; more change nothing that can be seen
_FLAT = 1e-9  # tastes that differ by less do not differ
_MOST_WORDS, _LONGEST = 2, 46  # at an end of a direction: words, and characters at both ends together


@dataclass(frozen=True)
class Direction:
    """One of the directions in which tastes differ most.

    Attributes:
        place: [n], each worker's, in logits a standard difference of a feature.
        share: of the variance of tastes.
        ends: what people at its low and at its high end like; empty where no readable feature says.
    """

    place: Array
    share: float
    ends: tuple[str, str]


@dataclass(frozen=True)
class People:
    """The workers with training comparisons, or a sample of them.

    Attributes:
        tastes: U a_i [n, d], their own weights minus everybody's.
        directions: two at most, the strongest first; none where tastes do not differ.
        coterie: [n], column of the posterior.
        posterior: [n, K].
        comparisons: [n], training.
    """

    tastes: Array
    directions: list[Direction]
    coterie: Array
    posterior: Array
    comparisons: Array

    @classmethod
    def load(cls, stages: Mapping[str, Path]) -> People:
        """Read what embed and cluster wrote. Raises BadData: a file is missing or damaged."""
        table = ASSIGNMENT.read(stages["cluster"] / "assignments.parquet")
        embeddings, posterior = matrix(table["embedding"]), matrix(table["posterior"])
        model = EmbeddingReward().restore(stages["embed"] / MODEL_FILE, embeddings, np.zeros(len(table)))
        comparisons = table["comparisons"].to_numpy()
        voting = np.flatnonzero(comparisons > 0)
        shown = voting[sample(len(voting), _MOST)]
        tastes = embeddings[shown].astype(np.float64) @ model.basis_.T
        directions = principal_directions(tastes, FeatureMap.load(stages["embed"] / FEATURES_FILE).names)
        return cls(tastes, directions, posterior[shown].argmax(axis=1), posterior[shown], comparisons[shown])


def sample(n: int, most: int, seed: int = 0) -> Array:
    """Numbers of `most` of n people drawn at random, ascending; of all of them where they are no more."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def principal_directions(tastes: Array, names: Sequence[str]) -> list[Direction]:
    """The first two principal components of tastes [n, d] over features of these names; those without spread left out."""
    centred = tastes - tastes.mean(axis=0)
    if not np.abs(centred).max(initial=0) > _FLAT:
        return []
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    variances, axes = variances[::-1], axes.T[::-1]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # else the signs are open
    return [
        Direction(centred @ axis, float(variance / variances.sum()), _ends(axis * np.sqrt(variance), names))
        for variance, axis in zip(variances[:2], axes[:2], strict=True)
        if variance > _FLAT * variances[0]
    ]


def _ends(loading: Array, names: Sequence[str]) -> tuple[str, str]:
    """Words for the ends of a direction with this standard deviation of each feature's weight [d]."""
    styled = [(float(size), name) for size, name in zip(loading, names, strict=True) if name in STYLE_WORDS]
    largest = max((abs(size) for size, _ in styled), default=0.0)
    told = sorted((item for item in styled if abs(item[0]) > max(NOTABLE, largest / 2)), key=lambda item: -abs(item[0]))
    low, high = ([STYLE_WORDS[name][0 if sign * size > 0 else 1] for size, name in told] for sign in (-1, 1))
    most = next((n for n in range(_MOST_WORDS, 1, -1) if len("".join(low[:n] + high[:n])) <= _LONGEST), 1)
    return ", ".join(low[:most]), ", ".join(high[:most])
