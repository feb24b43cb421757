"""Choosing the priors, the rank and the number of coteries by held-out likelihood (docs/method, section 2).

Whole prompts are held out, several times over, inside the training votes. A worker counts once: the log-loss is macro
over workers, and candidates are compared by the paired differences of workers. The rule is one standard error, twice:
a taste member must beat pooled + reliability by one, and the smallest within one of the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GroupShuffleSplit

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import Candidate
from coterie.discovery.clustering import Method, fit_coteries
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import PooledReward, ReliabilityReward, Reward
from coterie.discovery.votes import Array, Votes, random_workers
from coterie.progress import progress

POOLED_PRECISIONS = (1.0, 10.0, 100.0)
RELIABILITY_VARIANCES = (0.003, 0.03, 0.25, 1.0)
COTERIE_PRECISIONS = (30.0, 100.0, 300.0)
BASIS_PRECISIONS = (30.0, 300.0)
_HELD_OUT = 0.25  # of the prompts, in each split
_FEWEST_WORKERS = 2  # that make a coterie
_FEWEST_PROMPTS = 5  # with fewer, pairs are held out
_MOST = 200_000  # comparisons that candidates are compared on: more change no choice and cost minutes
_NOTICEABLE = 1e-4  # nats a comparison
_PATIENCE = 2  # sizes in a row that bring no better mean before larger ones are given up

Make = Callable[[Votes, ReliabilityReward], Reward]


def split_groups(votes: Votes) -> tuple[Array, str]:
    """What to hold out together, [n], and its name: the prompts; the pairs where there are hardly any prompts."""
    if len(np.unique(votes.prompt)) >= _FEWEST_PROMPTS:
        return votes.prompt, "prompt"
    # The same pair has the same differences, up to the sign that the vote decides.
    sign = np.sign(votes.x[np.arange(len(votes)), np.abs(votes.x).argmax(axis=1)])
    _, pair = np.unique(votes.x * sign[:, None], axis=0, return_inverse=True)
    return pair, "pair"


class HeldOut:
    """Repeated item-disjoint splits of training votes, and the priors and losses of members on them.

    Args:
        votes: training votes; the votes of some workers, drawn at random, where there are very many.
        repeats: splits.
        seed: of the splits.

    Attributes:
        unit: what is held out whole, "prompt" or "pair"; "none" where there is nothing to hold out.
        splits: pairs of votes, to fit on and to judge on.
        precision, reliability_variance: the priors of pooled + reliability that did best.
        bases: pooled + reliability under these, fitted on each split.
    """

    def __init__(self, votes: Votes, repeats: int, seed: int) -> None:
        if len(votes) > _MOST:
            votes = votes.of_workers(random_workers(votes, _MOST, 50, seed))
        groups, self.unit = split_groups(votes)
        self.workers, self.splits = votes.n_workers, []
        if len(np.unique(groups)) > 1:
            shuffle = GroupShuffleSplit(repeats, test_size=_HELD_OUT, random_state=seed)
            for _, judge in shuffle.split(votes.y, groups=groups):
                mask = np.zeros(len(votes), bool)
                mask[judge] = True
                self.splits.append((votes.subset(~mask), votes.subset(mask)))
        else:
            self.unit = "none"
        self.precision, self.reliability_variance = 10.0, 0.25
        self._choose_priors()

    def _choose_priors(self) -> None:
        self.bases: list[ReliabilityReward] = []
        if not self.splits:
            return
        grid = {p: self._bases(p, self.reliability_variance) for p in POOLED_PRECISIONS}
        self.precision = min(grid, key=lambda p: float(np.nanmean(self.losses(grid[p]))))
        tried = {v: self._bases(self.precision, v) for v in RELIABILITY_VARIANCES}
        self.reliability_variance = min(tried, key=lambda v: float(np.nanmean(self.losses(tried[v]))))
        self.bases = tried[self.reliability_variance]

    def _bases(self, precision: float, variance: float) -> list[ReliabilityReward]:
        return [ReliabilityReward(precision, variance).fit(train) for train, _ in self.splits]

    def fit(self, make: Make) -> list[Reward]:
        """What `make` fits to the votes and the base of each split."""
        return [make(train, base) for (train, _), base in zip(self.splits, self.bases, strict=True)]

    def losses(self, rewards: Sequence[Reward]) -> Array:
        """Log-loss of each worker, averaged over the splits that hold some of their votes out; NaN where none does."""
        losses = np.array([reward.losses(judge) for reward, (_, judge) in zip(rewards, self.splits, strict=True)])
        seen = np.isfinite(losses)
        total = np.where(seen, losses, 0).sum(axis=0)
        return np.where(seen.any(axis=0), total / np.maximum(seen.sum(axis=0), 1), np.nan)

    def base(self, votes: Votes) -> ReliabilityReward:
        """Pooled + reliability under the chosen priors, fitted to all of some votes."""
        return ReliabilityReward(self.precision, self.reliability_variance).fit(votes)


@dataclass(frozen=True)
class Choice:
    """What the held-out likelihood chose.

    Attributes:
        size: coteries, or rank; 0 of a rank says that no rank beats pooled + reliability.
        precision: of the chosen size's prior (of a coterie's reward, or of the basis).
        candidates: all that was tried, pooled + reliability among them.
        unit: what was held out whole, "prompt", "pair" or "none".
        heldout: the splits and the other priors, to fit with.
    """

    size: int
    precision: float
    candidates: list[Candidate]
    unit: str
    heldout: HeldOut


def select_rank(votes: Votes, settings: EmbedSettings) -> Choice:
    """Choose the rank of the low-rank member for training votes; 0 where pooled + reliability does as well.

    A rank that `settings` fixes is the only one tried, and is chosen.
    """
    heldout = HeldOut(votes, settings.splits, settings.seed)
    limit = min(votes.n_features, _voting(votes) - 1)
    sizes = range(1, min(settings.max_rank, limit) + 1) if settings.rank == "auto" else (settings.rank,)

    def member(rank: int, precision: float) -> Make:
        return lambda train, base: LowRankReward(rank, base.precision, precision, base=base).fit(train)

    fixed = None if settings.rank == "auto" else settings.rank
    return _choose(heldout, "lowrank", sizes, BASIS_PRECISIONS, member, 0, fixed)


def select_coteries(votes: Votes, settings: ClusterSettings, rank: int = 2) -> Choice:
    """Choose the number of coteries for training votes; 1 where pooled + reliability does as well.

    A number that `settings` fixes is the only one tried beside 1, and is chosen. `rank` is that of the embeddings, for
    the methods that cluster them.
    """
    heldout = HeldOut(votes, settings.splits, settings.seed)
    sizes = range(2, min(settings.max_coteries, _voting(votes) // 2) + 1)
    if settings.coteries != "auto":
        sizes = range(settings.coteries, settings.coteries + 1) if settings.coteries > 1 else range(0)

    def member(coteries: int, precision: float) -> Make:
        return lambda train, base: fit_coteries(
            train, min(coteries, _voting(train)), settings.method, base, precision, rank, settings.seed
        )

    fixed = None if settings.coteries == "auto" else settings.coteries
    return _choose(heldout, "mixture", sizes, COTERIE_PRECISIONS, member, 1, fixed)


def _voting(votes: Votes) -> int:
    return int(votes.present.sum())


def _choose(
    heldout: HeldOut,
    name: str,
    sizes: range | tuple[int, ...],
    precisions: tuple[float, ...],
    member: Callable[[int, float], Make],
    none: int,
    fixed: int | None,
) -> Choice:
    """Try the sizes, each under its best prior, and apply the rule of one standard error."""
    middle = precisions[len(precisions) // 2]
    if not heldout.splits:
        return Choice(none if fixed is None else fixed, middle, [], heldout.unit, heldout)
    reference = heldout.losses(heldout.bases)
    pooled = heldout.losses(heldout.fit(lambda train, base: PooledReward(base.precision).fit(train)))
    losses: dict[int, Array] = {}
    priors: dict[int, float] = {}
    near, worse = precisions, 0
    for size in progress(sizes, desc=f"{name}: sizes tried", unit="sizes"):
        if worse == _PATIENCE:
            break
        fits = {p: heldout.fit(member(size, p)) for p in near}
        tried = {p: heldout.losses(rewards) for p, rewards in fits.items() if fixed or _populated(rewards)}
        if not tried:
            worse += 1
            continue
        priors[size] = min(tried, key=lambda p: float(np.nanmean(tried[p])))
        losses[size] = tried[priors[size]]
        # More coteries lie further apart: from here on only this prior and the next weaker one.
        near = precisions[max(precisions.index(priors[size]) - 1, 0) : precisions.index(priors[size]) + 1]
        best = min(losses, key=lambda s: float(np.nanmean(losses[s])))
        worse = worse + 1 if best != size else 0
    chosen = smallest_within_one_error(reference, losses, none) if fixed is None else fixed
    candidates = [_candidate("pooled", 1, pooled, reference), _candidate("reliability", 1, reference, reference)]
    candidates += [_candidate(name, size, losses[size], reference) for size in losses]
    return Choice(chosen, priors.get(chosen, middle), candidates, heldout.unit, heldout)


def _populated(rewards: Sequence[Reward]) -> bool:
    """Whether every split fills every coterie; a group of one is none, and an empty one only blurs predictions."""
    return all(r.smallest_ >= _FEWEST_WORKERS for r in rewards if isinstance(r, MixtureReward))


def smallest_within_one_error(reference: Array, losses: dict[int, Array], none: int) -> int:
    """The smallest size within one standard error of the best, if that beats `reference` by one; else `none`.

    Args:
        reference: held-out log-loss of each worker under pooled + reliability.
        losses: the same under each size.
        none: what to return where no size beats the reference.
    """
    beating = [size for size, loss in losses.items() if beats(*_paired(reference, loss))]
    if not beating:
        return none
    best = min(losses, key=lambda size: float(np.nanmean(losses[size])))

    def close(size: int) -> bool:
        gap, error = _paired(losses[size], losses[best])
        return gap <= error

    return min(size for size in [*beating, best] if close(size))


def beats(gain: float, error: float) -> bool:
    """Whether a mean gain is larger than its standard error, and large enough for anybody to notice."""
    return gain > max(error, _NOTICEABLE)


def _paired(a: Array, b: Array) -> tuple[float, float]:
    """Mean over workers of a - b, and its standard error (0 for a single worker)."""
    difference = (a - b)[np.isfinite(a - b)]
    if not len(difference):
        return 0.0, 0.0
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)


def _candidate(member: str, size: int, losses: Array, reference: Array) -> Candidate:
    gain, error = _paired(reference, losses)
    return Candidate(member=member, size=size, log_loss=float(np.nanmean(losses)), gain=gain, standard_error=error)


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
    """Adjusted Rand index between the coteries found on two item-disjoint halves, over the workers who vote in both.

    The mean over `repeats` random halves; None where there are no two halves or not enough workers in one.
    """
    groups, _ = split_groups(votes)
    if len(np.unique(groups)) < 2:
        return None
    scores = []
    for one, other in GroupShuffleSplit(repeats, test_size=0.5, random_state=seed).split(votes.y, groups=groups):
        labels, voting = [], np.ones(votes.n_workers, bool)
        for rows in (one, other):
            half = votes.subset(np.sort(rows))
            voting &= half.present
            if _voting(half) < n_coteries:
                return None
            fitted = fit_coteries(half, n_coteries, method, heldout.base(half), precision, rank, seed)
            labels.append(fitted.responsibilities_.argmax(axis=1))
        if voting.any():
            scores.append(adjusted_rand_score(labels[0][voting], labels[1][voting]))
    return float(np.mean(scores)) if scores else None
