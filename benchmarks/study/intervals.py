"""Intervals of what several data sets or splits show, and the sample that a difference needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
from scipy import stats

from coterie.contracts import Estimate

LEVEL, POWER = 0.95, 0.8


def over_data_sets(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one figure of independent data sets, with the interval of Student's t; none of fewer than three."""
    n, mean = len(values), float(np.mean(values))
    if n < 3:
        return Estimate(value=mean, level=LEVEL).model_dump()
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Estimate(value=mean, low=mean - half, high=mean + half, level=LEVEL).model_dump()


def over_splits(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of estimates from several splits of the same data, as wide as the intervals of the splits are in the mean.

    The splits share their people, so that the mean is no surer by their number; and the standard deviation of a mean is at
    most the mean of the standard deviations, however they depend on each other. No interval where a split has none.
    """
    mean = float(np.mean([one["value"] for one in estimates]))
    if any(one["low"] is None for one in estimates):
        return Estimate(value=mean, level=LEVEL).model_dump()
    half = float(np.mean([one["high"] - one["low"] for one in estimates])) / 2
    return Estimate(value=mean, low=mean - half, high=mean + half, level=LEVEL).model_dump()


def comparisons_an_arm(one: float, other: float) -> int | None:
    """Comparisons in each of two independent arms with which shares `one` and `other` are told apart, two-sided at 5 %, in
    80 % of repetitions; None where they do not differ.

    n = (z_{1 - alpha/2} + z_{power})^2 (p q + p' q') / (p - p')^2 (Fleiss, Levin and Paik 2003, Statistical Methods for Rates
    and Proportions, third edition, chapter 4, without the correction for continuity).
    """
    if one == other:
        return None
    z = float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER))
    return ceil(z**2 * (one * (1 - one) + other * (1 - other)) / (one - other) ** 2)


def comparisons_for_rate(rate: float) -> int | None:
    """Comparisons with which a win rate is told from one half, two-sided at 5 %, in 80 % of repetitions (as above, for one
    share); None for one half."""
    if rate == 0.5:
        return None
    level, power = (float(stats.norm.ppf(q)) for q in ((1 + LEVEL) / 2, POWER))
    return ceil((level * 0.5 + power * sqrt(rate * (1 - rate))) ** 2 / (rate - 0.5) ** 2)
