"""Are the groups there when one looks again? (docs/method, section 2)"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GroupShuffleSplit

from coterie.discovery.clustering import Method, fit_coteries
from coterie.discovery.selection import HeldOut, split_groups
from coterie.discovery.votes import Votes

STABLE = 0.3  # half-split ARI from which groups count as groups, if they predict as well as tastes by degrees do
DISTINCT = 0.8  # from which they do anyway: a cut through tastes that vary by degrees is not found again like that
_CARELESS = 0.5  # reliability below which a worker's votes hardly show a taste


def half_split_ari(
    votes: Votes,
    n_coteries: int,
    method: Method,
    heldout: HeldOut,
    precision: float,
    rank: int,
    repeats: int,
    seed: int,
) -> float | None:
    """Adjusted Rand index between the coteries found on two item-disjoint halves, over the workers whom half of their votes
    can place: who vote in both, at least as often as half of the workers do, and not carelessly. Others land anywhere,
    whether there are groups or not.

    The mean over `repeats` random halves; None where there are no two halves or not enough workers in one.
    """
    groups, _ = split_groups(votes)
    if len(np.unique(groups)) < 2:
        return None
    scores, often = [], votes.counts >= np.median(votes.counts[votes.present])
    for one, other in GroupShuffleSplit(repeats, test_size=0.5, random_state=seed).split(votes.y, groups=groups):
        labels, placed, log_beta = [], often.copy(), np.zeros(votes.n_workers)
        for rows in (one, other):
            half = votes.subset(np.sort(rows))
            placed &= half.present
            if int(half.present.sum()) < n_coteries:
                return None
            fitted = fit_coteries(half, n_coteries, method, heldout.base(half), precision, rank, seed)
            labels.append(fitted.responsibilities_.argmax(axis=1))
            log_beta += fitted.log_reliability_ / 2
        placed &= log_beta > np.log(_CARELESS)
        if placed.any():
            scores.append(adjusted_rand_score(labels[0][placed], labels[1][placed]))
    return float(np.mean(scores)) if scores else None
