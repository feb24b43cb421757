"""Choosing the priors, the rank and the number of coteries by held-out likelihood (docs/method, section 2).

Whole prompts are held out, several times over, inside the training votes. A worker counts once: the log-loss is macro
over workers, and candidates are compared by the paired differences of workers. The rule is one standard error, twice:
a taste member must beat pooled + reliability by one, and the smallest within one of the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import Candidate
from coterie.discovery.clustering import fit_coteries
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import PooledReward, ReliabilityReward, Reward
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Array, Votes, VoteSet, random_workers
from coterie.progress import progress

POOLED_PRECISIONS = (1.0, 10.0, 100.0)
_WEAKEST_PRECISION = 1e-3  # that is tried where each weaker one of these is noticeably better
RELIABILITY_VARIANCES = (0.003, 0.03, 0.25, 1.0)
COTERIE_PRECISIONS = (30.0, 100.0, 300.0)
BASIS_PRECISIONS = (30.0, 300.0, 3000.0)
SLOPE_VARIANCES = (0.003, 0.01, 0.03)
_HELD_OUT = 0.25  # of the prompts, in each split
_FEWEST_PROMPTS = 5  # with fewer, pairs are held out
_MOST = 150_000  # comparisons that candidates are compared on: more change no choice and cost minutes
_FEWEST_SAMPLED = 300  # workers, however many comparisons each has
_MOST_SAMPLED = 20_000  # workers, however few comparisons each has: a fit takes time for every worker too
_MOST_SLOPES, _FEWEST_FOR_SLOPES = (
    256,
    5,
)  # features, and comparisons a worker: beyond, slopes cost much and find nothing
_TOLERANCE = 3e-4  # of fits that are compared, not shipped
_NOTICEABLE = 5e-4  # nats a comparison
_PATIENCE = 2  # sizes in a row that bring no better mean before larger ones are given up

Make = Callable[[Votes, ReliabilityReward], Reward]
Key = TypeVar("Key", bound=Hashable)


def split_groups(votes: Votes) -> tuple[Array, str]:
    """What to hold out together, [n], and its name: the prompts; the pairs where there are hardly any prompts."""
    if len(np.unique(votes.prompt)) >= _FEWEST_PROMPTS:
        return votes.prompt, "prompt"
    # The same pair has the same differences, up to the sign that the vote decides.
    sign = np.sign(votes.x[np.arange(len(votes)), np.abs(votes.x).argmax(axis=1)])
    _, pair = np.unique(votes.x * sign[:, None], axis=0, return_inverse=True)
    return pair, "pair"


def item_splits(votes: Votes, repeats: int, seed: int) -> tuple[list[Array], str]:
    """Which votes to hold out, `repeats` times [n] bool, and what is held out whole: the "prompt" or the "pair"; no split and
    "none" where there is nothing to hold out."""
    groups, unit = split_groups(votes)
    if len(np.unique(groups)) < 2:
        return [], "none"
    rows = []
    for _, judge in GroupShuffleSplit(repeats, test_size=_HELD_OUT, random_state=seed).split(votes.y, groups=groups):
        mask = np.zeros(len(votes), bool)
        mask[judge] = True
        rows.append(mask)
    return rows, unit


def mean_losses(rewards: Sequence[Reward], judges: Sequence[Votes]) -> Array:
    """Log-loss of each worker, averaged over the splits that hold some of their votes out; NaN where none does.

    Args:
        rewards: fitted on the rest of each split.
        judges: what each split holds out.
    """
    losses = np.array([reward.losses(judge) for reward, judge in zip(rewards, judges, strict=True)])
    seen = np.isfinite(losses)
    total = np.where(seen, losses, 0).sum(axis=0)
    return np.where(seen.any(axis=0), total / np.maximum(seen.sum(axis=0), 1), np.nan)


def sample_of(votes: VoteSet, seed: int) -> Votes:
    """What choices are made on: all votes, or where they or the workers are very many those of workers drawn at random, in
    memory."""
    most = min(_MOST, len(votes) * _MOST_SAMPLED // max(int(votes.present.sum()), 1))
    if len(votes) <= most:
        return votes.loaded()
    return votes.of_workers(random_workers(votes, most, _FEWEST_SAMPLED, seed))


class HeldOut:
    """Repeated item-disjoint splits of training votes, and the priors and losses of members on them.

    Args:
        votes: training votes.
        repeats: splits.
        seed: of the splits.

    Attributes:
        votes, seed: as given.
        unit: what is held out whole, "prompt" or "pair"; "none" where there is nothing to hold out.
        splits: pairs of votes, to fit on and to judge on.
        precision, reliability_variance: the priors of pooled + reliability that did best.
        bases: pooled + reliability under these, fitted on each split.
        rows: [n] bool of each split, which votes it judges on.
    """

    def __init__(self, votes: Votes, repeats: int, seed: int) -> None:
        self.votes, self.seed = votes, seed
        self.rows, self.unit = item_splits(votes, repeats, seed)
        self.splits = [(votes.subset(~mask), votes.subset(mask)) for mask in self.rows]
        self.precision, self.reliability_variance = 10.0, 0.25
        self._choose_priors()

    def _choose_priors(self) -> None:
        self.bases: list[ReliabilityReward] = []
        if not self.splits:
            return
        loss = {p: self._loss(p) for p in POOLED_PRECISIONS}
        self.precision = min(loss, key=lambda p: loss[p])
        # Where a reward separates the votes, only the prior bounds it; other members would seem better for being freer.
        while self.precision == min(loss) > _WEAKEST_PRECISION:
            weaker = self.precision / 10
            loss[weaker] = self._loss(weaker)
            if loss[self.precision] - loss[weaker] < _NOTICEABLE:
                break
            self.precision = weaker
        tried = {v: self._bases(self.precision, v) for v in RELIABILITY_VARIANCES}
        self.reliability_variance = min(tried, key=lambda v: float(np.nanmean(self.losses(tried[v]))))
        self.bases = tried[self.reliability_variance]

    def _loss(self, precision: float) -> float:
        return float(np.nanmean(self.losses(self._bases(precision, self.reliability_variance))))

    def _bases(self, precision: float, variance: float) -> list[ReliabilityReward]:
        return [ReliabilityReward(precision, variance).fit(train) for train, _ in self.splits]

    def fit(self, make: Make) -> list[Reward]:
        """What `make` fits to the votes and the base of each split."""
        return [make(train, base) for (train, _), base in zip(self.splits, self.bases, strict=True)]

    def losses(self, rewards: Sequence[Reward]) -> Array:
        """Log-loss of each worker, averaged over the splits that hold some of their votes out; NaN where none does."""
        return mean_losses(rewards, [judge for _, judge in self.splits])

    def base(self, votes: VoteSet) -> ReliabilityReward:
        """Pooled + reliability under the chosen priors, fitted to all of some votes."""
        return ReliabilityReward(self.precision, self.reliability_variance).fit(votes)


@dataclass(frozen=True)
class Choice:
    """What the held-out likelihood chose.

    Attributes:
        member: "lowrank", "slopes" or "mixture"; "reliability" where no other beats it.
        size: coteries, or directions of taste; that of none (0 directions, 1 coterie) where nothing beats pooled + reliability.
        prior: of the chosen size: precision of a coterie's reward or of the basis, variance of slopes.
        candidates: all that was tried, pooled + reliability among them.
        losses: held-out log-loss of each worker under each candidate, in their order.
        heldout: the splits and the other priors, to fit with.
    """

    member: str
    size: int
    prior: float
    candidates: list[Candidate]
    losses: list[Array]
    heldout: HeldOut


def select_embedding(heldout: HeldOut, settings: EmbedSettings) -> Choice:
    """Choose how tastes vary by degrees: along a few directions (low rank), in all (slopes), or not at all.

    A rank that `settings` fixes is the only one tried, and is chosen.
    """
    votes = heldout.votes
    voting = int(votes.present.sum())
    if settings.rank != "auto":
        tried = _try(heldout, "lowrank", (settings.rank,), BASIS_PRECISIONS, everything=True)
        return _choice(heldout, tried, 0, (("lowrank", settings.rank), BASIS_PRECISIONS[1]))
    sizes = range(1, min(settings.max_rank, votes.n_features, voting - 1) + 1)
    tried = _try(heldout, "lowrank", sizes, BASIS_PRECISIONS)
    if votes.n_features <= _MOST_SLOPES and len(votes) >= _FEWEST_FOR_SLOPES * voting:
        tried |= _try(heldout, "slopes", (votes.n_features,), SLOPE_VARIANCES)
    return _choice(heldout, tried, 0)


def select_coteries(heldout: HeldOut, settings: ClusterSettings, rank: int = 2, smallest: int = 2) -> Choice:
    """Choose the number of coteries; 1 where pooled + reliability does as well.

    A number that `settings` fixes is the only one tried beside 1, and is chosen.

    Args:
        rank: of the embeddings, for the methods that cluster them.
        smallest: workers that a coterie has at least, or its number of coteries is not considered.
    """
    voting = int(heldout.votes.present.sum())

    def make(size: int, prior: float) -> Make:
        return lambda train, base: fit_coteries(train, size, settings.method, base, prior, rank, settings.seed)

    if settings.coteries != "auto":
        fixed, middle = settings.coteries, COTERIE_PRECISIONS[1]
        tried = {}
        if 1 < fixed <= voting:
            tried = _try(heldout, "mixture", (fixed,), COTERIE_PRECISIONS, make, everything=True)
        return _choice(heldout, tried, 1, (("mixture", fixed), middle))
    sizes = range(2, min(settings.max_coteries, voting // 2) + 1)
    return _choice(heldout, _try(heldout, "mixture", sizes, COTERIE_PRECISIONS, make, smallest), 1)


_Tried = dict[tuple[str, int], tuple[float, Array]]  # member and size: the best prior, and the losses under it


def _member(name: str, seed: int) -> Callable[[int, float], Make]:
    if name == "slopes":
        return lambda _, variance: lambda train, base: SlopesReward(variance, base=base).fit(train)
    return lambda size, prior: (
        lambda train, base: LowRankReward(size, base.precision, prior, base=base, tol=_TOLERANCE, seed=seed).fit(train)
    )


def _try(
    heldout: HeldOut,
    name: str,
    sizes: range | tuple[int, ...],
    priors: tuple[float, ...],
    member: Callable[[int, float], Make] | None = None,
    smallest: int = 1,
    everything: bool = False,
) -> _Tried:
    """Each size under its best prior, until larger ones bring nothing; without sizes that leave a coterie too small."""
    member = member or _member(name, heldout.seed)
    tried: _Tried = {}
    near, worse = priors, 0
    for size in progress(sizes if heldout.splits else (), desc=f"{name}: sizes tried", unit="sizes"):
        if worse == _PATIENCE:
            break
        fits = {prior: heldout.fit(member(size, prior)) for prior in near}
        losses = {
            p: heldout.losses(rewards) for p, rewards in fits.items() if everything or _populated(rewards, smallest)
        }
        if not losses:
            worse += 1
            continue
        prior = min(losses, key=lambda p: float(np.nanmean(losses[p])))
        tried[name, size] = prior, losses[prior]
        # More coteries lie further apart: from here on only this prior and the next weaker one.
        near = priors[max(priors.index(prior) - 1, 0) : priors.index(prior) + 1]
        best = min(tried, key=lambda key: float(np.nanmean(tried[key][1])))
        worse = worse + 1 if best != (name, size) else 0
    return tried


def _choice(heldout: HeldOut, tried: _Tried, none: int, fixed: tuple[tuple[str, int], float] | None = None) -> Choice:
    """Apply the rule of one standard error to what was tried; `fixed` names what is chosen whatever it says."""
    member, size, prior = "reliability", none, 0.0
    if fixed is not None:
        (member, size), prior = fixed
    if not heldout.splits:
        return Choice(member, size, prior, [], [], heldout)
    reference = heldout.losses(heldout.bases)
    pooled = heldout.losses(heldout.fit(lambda train, base: PooledReward(base.precision).fit(train)))
    if fixed is None:
        of_each = {key: loss for key, (_, loss) in tried.items()}
        member, size = smallest_within_one_error(reference, of_each, (member, size))
    prior = tried[member, size][0] if (member, size) in tried else prior
    losses = {("pooled", 1): pooled, ("reliability", 1): reference} | {key: loss for key, (_, loss) in tried.items()}
    candidates = [candidate(*key, loss, reference) for key, loss in losses.items()]
    return Choice(member, size, prior, candidates, list(losses.values()), heldout)


def _populated(rewards: Sequence[Reward], smallest: int) -> bool:
    """Whether every split fills every coterie; a group of one is none, and an empty one only blurs predictions."""
    return all(r.smallest_ >= smallest for r in rewards if isinstance(r, MixtureReward))


def smallest_within_one_error(reference: Array, losses: Mapping[Key, Array], none: Key) -> Key:
    """The first, and so the simplest, within one standard error of the best, if that beats `reference` by one; else `none`.

    Args:
        reference: held-out log-loss of each worker under pooled + reliability.
        losses: the same under each candidate, the simplest first.
        none: what to return where no candidate beats the reference.
    """
    beating = [key for key, loss in losses.items() if beats(*paired(reference, loss))]
    if not beating:
        return none
    best = min(losses, key=lambda key: float(np.nanmean(losses[key])))

    def close(key: Key) -> bool:
        gap, error = paired(losses[key], losses[best])
        return gap <= error

    return next(key for key in losses if (key in beating or key == best) and close(key))


def beats(gain: float, error: float) -> bool:
    """Whether a mean gain is larger than its standard error, and large enough for anybody to notice."""
    return gain > max(error, _NOTICEABLE)


def paired(a: Array, b: Array) -> tuple[float, float]:
    """Mean over workers of a - b, and its standard error (0 for a single worker)."""
    difference = (a - b)[np.isfinite(a - b)]
    if not len(difference):
        return 0.0, 0.0
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)


def candidate(member: str, size: int, losses: Array, reference: Array) -> Candidate:
    """How a member of a size did, by the held-out log-loss of each worker under it and under pooled + reliability."""
    gain, error = paired(reference, losses)
    return Candidate(member=member, size=size, log_loss=float(np.nanmean(losses)), gain=gain, standard_error=error)
