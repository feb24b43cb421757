"""Intervals for macro means over workers that speak about new workers and new prompts.

How often they hold the truth is measured by benchmarks/intervals.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from coterie.contracts import Estimate

if TYPE_CHECKING:
    from coterie.discovery.votes import Votes

Array = NDArray[Any]

FEWEST_WORKERS = 10  # an interval over fewer would not mean what it says
FEWEST_PROMPTS = 2.5  # in effective number; as above
_MOST_GROUPS = 2000  # workers or prompts past it are resampled in random groups, so that memory stays bounded


class TwoWayBootstrap:
    """Intervals for macro means over workers, of a bootstrap over workers and one over prompts.

    Every worker counts once, so that a comparison counts by one over its worker's number of comparisons. The variance of
    the mean is that of resampled workers plus that of resampled prompts, less what both count: the noise within a worker's
    comparisons of a prompt (Cameron, Gelbach and Miller 2011, Journal of Business & Economic Statistics 29(2), section 2;
    never less than that of the workers alone). Resampling both at once, the pigeonhole bootstrap, counts that noise three
    times (Owen 2007, Annals of Applied Statistics 1(2)), and votes are mostly noise.

    An interval is the mean +- a quantile of Student's t times the standard error (Hesterberg 2015, The American
    Statistician 69(4)); percentiles are too narrow where few prompts decide. The degrees of freedom are Satterthwaite's
    (1946, Biometrics Bulletin 2(6)), where prompts count in effective number: some are judged far more often than others
    (Carter, Schnepel and Steigerwald 2017, Review of Economics and Statistics 99(4)).

    The same resamples serve every statistic. A difference is paired: its values are differences.

    Args:
        votes: the comparisons, ordered by worker.
        replicates: resamples.
        level: of the intervals.
        seed: of the resamples.
    """

    def __init__(self, votes: Votes, replicates: int, level: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._level, self._worker = level, votes.worker
        prompts, self._prompt = np.unique(votes.prompt, return_inverse=True)
        _, self._cell = np.unique(votes.worker * np.int64(len(prompts)) + self._prompt, return_inverse=True)
        self._workers = _Resamples.of(votes.n_workers, replicates, rng)
        self._prompts = _Resamples.of(len(prompts), replicates, rng)

    def estimate(self, values: Array, valid: Array, workers: Array) -> Estimate:
        """Macro mean of values [n] where `valid` [n], over the workers [n_workers, bool]; with its interval."""
        rows = np.flatnonzero(valid & workers[self._worker])
        worker, prompt = self._worker[rows], self._prompt[rows]
        count = np.bincount(worker)
        n = int(np.count_nonzero(count))
        if not n:
            return Estimate(value=None, level=self._level)
        weight = 1 / (n * count[worker])  # of each comparison in the mean
        value = float(weight @ values[rows])
        share = np.bincount(prompt, weight)  # of each prompt in the mean
        prompts = 1 / float(share @ share)  # in effective number
        if n < FEWEST_WORKERS or prompts < FEWEST_PROMPTS:
            return Estimate(value=value, level=self._level)

        influence = weight * (values[rows] - value)
        of_workers = self._workers.variance(worker, influence) * n / (n - 1)
        # Of prompts that differ alike, deviations from their own mean hold this part of the variance of the mean.
        held = 1 - 2 * float((share**3).sum()) * prompts + 1 / prompts
        of_prompts = self._prompts.variance(prompt, influence) / held
        noise = float((np.bincount(self._cell[rows], influence) ** 2).sum())
        shared = max(0.0, of_prompts - noise)
        variance = of_workers + shared
        if variance == 0:
            return Estimate(value=value, low=value, high=value, level=self._level)
        uncertainty = of_workers**2 / (n - 1) + (of_prompts**2 / (prompts - 1) if shared else 0)
        half = float(stats.t.ppf((1 + self._level) / 2, variance**2 / uncertainty) * np.sqrt(variance))
        return Estimate(value=value, low=value - half, high=value + half, level=self._level)


@dataclass(frozen=True)
class _Resamples:
    """The group [units] of each worker or prompt, and multiplicities [groups, replicates]; few units are a group each."""

    group: Array
    multiplicities: Array

    @classmethod
    def of(cls, units: int, replicates: int, rng: np.random.Generator) -> Self:
        groups = min(units, _MOST_GROUPS)
        group = rng.permutation(units) % groups
        drawn = rng.multinomial(groups, np.full(groups, 1 / groups), replicates).T
        return cls(group, np.ascontiguousarray(drawn, dtype=np.float32))

    def variance(self, unit: Array, influence: Array) -> float:
        """The variance of a sum of influences [n] over the resamples of their units [n]."""
        of_group = np.bincount(self.group[unit], influence, len(self.multiplicities)).astype(np.float32)
        return float(np.var(of_group @ self.multiplicities, dtype=np.float64))
