"""Do tastes differ at all? A parametric bootstrap against "everybody wants the same, and some are careless".

The statistic is the held-out gain in log-loss of a low-rank member over pooled + reliability. Its null distribution comes
from votes drawn from the fitted pooled + reliability model, by the same workers on the same pairs: permuted votes, or a
null without reliability, take carelessness for taste (docs/method, section 2).
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from coterie.contracts import Heterogeneity
from coterie.discovery.logistic import reliability_slopes
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.selection import HeldOut, paired
from coterie.discovery.votes import Array, Votes
from coterie.progress import progress

_RANK, _PRECISIONS, _TOLERANCE = 2, (30.0, 1000.0), 1e-3
_SPLITS = 2  # of the held-out splits
_ENOUGH = 5  # replicates beyond the statistic that end the test: it will not reject any more


def heterogeneity(heldout: HeldOut, replicates: int, seed: int) -> Heterogeneity:
    """Test whether workers' tastes differ.

    The test is sequential (Besag and Clifford 1991, Biometrika 78(2)): when _ENOUGH replicates have reached the statistic
    it ends, and that many over all drawn is the p-value.

    Args:
        heldout: splits of the training votes, with the priors of pooled + reliability.
        replicates: data sets drawn at most; the smallest p-value is 1 / (replicates + 1).
        seed: of the draws.
    """
    null = "pooled + reliability, parametric bootstrap"
    rank = min(_RANK, heldout.votes.n_features, int(heldout.votes.present.sum()) - 1)
    if not heldout.splits or rank < 1 or not replicates:
        return Heterogeneity(statistic=0.0, p_value=1.0, replicates=0, null=null)
    rng = np.random.default_rng(seed)
    observed, reached = _gain(heldout, heldout.votes.y, rank), 0
    probability, spread = _null(heldout)
    drawn = 0
    for _ in progress(range(replicates), desc="test: replicates", unit="data sets"):
        drawn += 1
        reached += _gain(heldout, _draw(heldout.votes, probability, spread, rng), rank) >= observed
        if reached == _ENOUGH:
            return Heterogeneity(statistic=observed, p_value=reached / drawn, replicates=drawn, null=null)
    return Heterogeneity(statistic=observed, p_value=(reached + 1) / (drawn + 1), replicates=drawn, null=null)


def _gain(heldout: HeldOut, y: Array, rank: int) -> float:
    """Held-out gain of the low-rank member for answers y [n], macro over workers, under the prior that does best.

    A wide prior overfits little data and a narrow one sees nothing in it; every replicate makes the same choice.
    """
    votes, gains = heldout.votes.answered(y), []
    for rows in heldout.rows[:_SPLITS]:
        train, judge = votes.subset(~rows), votes.subset(rows)
        base = ReliabilityReward(heldout.precision, heldout.reliability_variance, tol=_TOLERANCE).fit(train)
        before = base.losses(judge)
        fits = [LowRankReward(rank, base.precision, p, base=base, tol=_TOLERANCE).fit(train) for p in _PRECISIONS]
        gains.append([paired(before, fitted.losses(judge))[0] for fitted in fits])
    return float(np.mean(gains, axis=0).max())


def _null(heldout: HeldOut) -> tuple[Array, Array]:
    """The null's margins x.theta [n], and mean and standard deviation of each log beta_i, [2, n_workers]."""
    votes = heldout.votes
    base = heldout.base(votes)
    margins = votes.x @ base.theta_
    everybody = np.ones((votes.n_workers, 1))
    _, information = reliability_slopes(base.log_reliability_, margins[None], everybody, votes)
    return margins, np.stack([base.log_reliability_, (information + 1 / base.reliability_variance) ** -0.5])


def _draw(votes: Votes, margins: Array, reliability: Array, rng: np.random.Generator) -> Array:
    """Answers [n] of the null; ties stay ties. beta_i is drawn, since its mode alone would be less diverse than people are."""
    beta = np.exp(reliability[0] + reliability[1] * rng.standard_normal(votes.n_workers))
    answers = rng.random(len(votes)) < expit(beta[votes.worker] * margins)
    return np.where(votes.y == 0.5, votes.y, answers).astype(np.float32)
