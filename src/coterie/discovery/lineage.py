"""Coteries over time: which new coterie is which old one, and whether what people want has changed since.

A mixture that is fitted again numbers its coteries anew. What a coterie is called outlives that: a new coterie takes over
the id of an old one where its people are the same, and a fresh id otherwise. No id is ever used for another group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import linear_sum_assignment, minimize_scalar
from scipy.special import entr, expit

from coterie.bootstrap import FEWEST_PROMPTS, FEWEST_WORKERS
from coterie.contracts import Estimate
from coterie.discovery.logistic import log_loss
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.newcomers import predict, tempered
from coterie.discovery.votes import Array, Votes, VoteSet
from coterie.errors import BadData

_LEVEL = 0.05  # of the test that a match is more than chance, over all pairs of coteries of a refit


@dataclass(frozen=True)
class Lineage:
    """Where the K coteries of a new mixture come from.

    Attributes:
        ids: [K], what they are called.
        matched_from: [K], the row of the old coterie whose id each one keeps; -1 for a new one.
        overlap: [K], the share of a coterie's people, among the shared workers, who were in that old one; 0 for a new one.
        shared_workers: whom both mixtures know.
        next_id: the first id that was never used.
    """

    ids: Array
    matched_from: Array
    overlap: Array
    shared_workers: int
    next_id: int


def match_coteries(
    old_workers: ArrayLike,
    old: Array,
    new_workers: ArrayLike,
    new: Array,
    old_ids: ArrayLike,
    next_id: int,
) -> Lineage:
    """Give the coteries of a new mixture the ids of the old ones whose people they have.

    The overlap of an old and a new coterie is the sum over shared workers of the product of their posteriors: the
    expected number of people in both. The matching of largest total overlap is found (Hungarian algorithm). It always finds
    one, also between mixtures that have nothing to do with each other, and large coteries share many people by chance. So
    a match counts only where the overlap is larger than if every shared worker's new coterie were drawn anew, at the new
    coteries' shares: one-sided, by the normal approximation, at level .05 Bonferroni-corrected for the pairs of coteries
    that the matching chose among. A single coterie before and after is everybody, and stays.

    Args:
        old_workers: worker ids [n_old], each once. new_workers: [n_new].
        old: posteriors [n_old, K_old], or coteries [n_old] as rows of old_ids.
        new: posteriors [n_new, K], or coteries [n_new] from 0.
        old_ids: ids of the old coteries [K_old].
        next_id: the first id that was never used, as the last matching returned it.

    Raises:
        BadData: shapes that do not fit together, a worker or an id twice, or next_id not above every old id.
    """
    old_ids = np.asarray(old_ids, int)
    before, after = _memberships(old, len(old_ids)), _memberships(new)
    for name, workers, rows in (("old", np.asarray(old_workers), before), ("new", np.asarray(new_workers), after)):
        if len(workers) != len(rows) or len(np.unique(workers)) != len(workers):
            raise BadData(
                f"{len(workers)} {name} workers, {len(np.unique(workers))} of them distinct, for {len(rows)} posteriors; "
                "each worker has one"
            )
    if before.shape[1] != len(old_ids) or len(np.unique(old_ids)) != len(old_ids) or (old_ids >= next_id).any():
        raise BadData(
            f"ids {old_ids.tolist()} of {before.shape[1]} old coteries, with {next_id} as the next; each coterie has one "
            "id, and the next is larger than any that was used"
        )
    _, old_rows, new_rows = np.intersect1d(old_workers, new_workers, return_indices=True)
    before, after, shared = before[old_rows], after[new_rows], len(old_rows)
    overlap = before.T @ after
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    kept = _more_than_chance(before, after)[rows, columns]
    if overlap.shape == (1, 1):
        kept = np.array([shared > 0])

    n_new = after.shape[1]
    matched_from, share = np.full(n_new, -1), np.zeros(n_new)
    matched_from[columns[kept]] = rows[kept]
    share[columns[kept]] = overlap[rows, columns][kept] / after.sum(axis=0)[columns[kept]]
    fresh = matched_from < 0
    ids = np.where(fresh, next_id - 1 + np.cumsum(fresh), old_ids[matched_from])
    return Lineage(ids, matched_from, share, shared, next_id + int(fresh.sum()))


def _memberships(given: Array, n_coteries: int | None = None) -> Array:
    """Posteriors [n, K]; of coteries [n] the certain ones."""
    if given.ndim == 2:
        return given.astype(np.float64)
    n_coteries = int(given.max(initial=-1)) + 1 if n_coteries is None else n_coteries
    if len(given) and not 0 <= given.min() <= given.max() < n_coteries:
        raise BadData(f"coteries {given.min()}..{given.max()} of workers, but there are {n_coteries}, from 0")
    return np.asarray(np.eye(n_coteries)[given])


def _more_than_chance(before: Array, after: Array) -> Array:
    """Whether the memberships [n, K_old] and [n, K] of shared workers overlap by more than chance, [K_old, K].

    Only workers of whom the old posterior says more than the coteries' shares vary the overlap by chance.
    """
    if not len(before):
        return np.zeros((before.shape[1], after.shape[1]), bool)
    told, shares = before - before.mean(axis=0), after.mean(axis=0)
    spread = np.sqrt(np.outer((told**2).sum(axis=0), shares * (1 - shares)))
    threshold = stats.norm.isf(_LEVEL / spread.size) * spread
    # A coterie of nobody or everybody has a spread of 0, up to rounding, and goes together with nothing.
    return np.asarray((told.T @ after > threshold) & (spread > 1e-6))


@dataclass(frozen=True)
class Drift:
    """Whether what people want has changed since an incumbent was made. Differences are new votes' minus held-out votes'.

    Attributes:
        log_loss: difference in log-loss, nats a comparison, macro over workers.
        surprise: difference in log-loss beyond what the incumbent itself expects.
        moved: share of workers who by their new votes belong to another coterie than before; None where there is one
            coterie, or fewer than ten workers to look at.
        moved_then: the same by the held-out votes, where it is misfit.
        moved_p: p-value of the hypothesis that `moved` is no larger than `moved_then`.
        workers: known workers with new votes. comparisons: those votes.
        drifted: surprise lies above 0 with its interval, or moved_p is below half of 1 - level.
        reason: in words.
    """

    log_loss: Estimate
    surprise: Estimate
    moved: float | None
    moved_then: float | None
    moved_p: float | None
    workers: int
    comparisons: int
    drifted: bool
    reason: str


def drift(
    incumbent: MixtureReward, known: VoteSet, held_out: Votes, new: Votes, temperature: float = 1.0, level: float = 0.95
) -> Drift:
    """Compare new votes with the votes that an incumbent was judged on when it was made.

    Each known worker is predicted from the posterior and reliability of then. Log-loss rises because people changed, or
    because they were asked harder pairs, so what decides is the surprise: log-loss minus the entropy of the prediction,
    whose mean is 0 on pairs of any kind while a calibrated incumbent holds. A few people who changed sides hardly move that
    mean; they show in the second figure, the maximum-likelihood share of workers whose votes come from another coterie
    than the one that their posterior of then speaks of. A posterior that is not sure allows for either. Both figures are
    compared with those of the held-out votes, so that an incumbent that never was calibrated is no drift.

    Left out are workers without known votes, who cannot tell a change, and ties, to which the incumbent gives no
    probability. Each figure is tested one-sided at half of 1 - level, so unchanged people are called changed in at most
    1 - level of all cases.

    Args:
        incumbent: the mixture; with one coterie a pooled reward.
        known: the votes that the workers' posteriors are made of.
        held_out: the votes that it was judged on, none of them among the known.
        new: the votes since. Workers and prompts are numbered alike in all three.
        temperature: of the posteriors' evidence (newcomers.LearningCurve).
        level: of the intervals.

    Raises:
        BadData: votes of different numbers of workers.
    """
    if not known.n_workers == held_out.n_workers == new.n_workers:
        raise BadData(
            f"known, held-out and new votes of {known.n_workers}, {held_out.n_workers} and {new.n_workers} workers; "
            "number the workers alike in all three"
        )
    inferred = incumbent.infer(known)
    prior = tempered(inferred[0], incumbent.weights_, temperature)
    then, now = (votes.subset(known.present[votes.worker] & (votes.y != 0.5)) for votes in (held_out, new))

    def judged(votes: Votes) -> tuple[Array, Array]:
        """Log-loss [n], and what of it the incumbent does not expect."""
        logits = predict(incumbent, inferred, votes, temperature)
        p, losses = expit(logits), log_loss(logits, votes.y)
        return losses, losses - entr(p) - entr(1 - p)

    losses, surprise = (
        _change(now, new_, then, old, level) for new_, old in zip(judged(now), judged(then), strict=True)
    )
    drifted = surprise.low is not None and surprise.low > 0
    workers = int(now.present.sum())
    moved = moved_then = moved_p = None
    if surprise.low is not None and len(incumbent.weights_) > 1:
        sides = [_sides(incumbent, prior, votes, temperature) for votes in (now, then)]
        moved, moved_then, moved_p = _movers(*sides)
        drifted |= moved_p < (1 - level) / 2
    reason = _in_words(drifted, workers, surprise, moved, moved_then)
    return Drift(losses, surprise, moved, moved_then, moved_p, workers, len(now), drifted, reason)


def _sides(incumbent: MixtureReward, prior: Array, votes: Votes, temperature: float) -> Array:
    """Likelihood of each voting worker's votes if the worker stayed and if the worker moved, [2, workers].

    Both over the likelihood for a stranger: that in coterie k is the posterior from these votes alone over the weight.
    Who was in k and moved is in j != k with probability weights_j / (1 - weights_k).
    """
    alone = tempered(incumbent.infer(votes)[0], incumbent.weights_, temperature)
    stayed = (prior * alone / incumbent.weights_).sum(axis=1)
    moved = (prior * (1 - alone) / (1 - incumbent.weights_)).sum(axis=1)
    return np.stack([stayed, moved])[:, votes.present]


def _movers(now: Array, then: Array) -> tuple[float, float, float]:
    """Shares of movers now and then, of the likelihoods [2, n] of `_sides`; p-value that the former is no larger.

    Likelihood ratio of one share for both against one each, signed.
    """

    def fitted(sides: Array) -> tuple[float, float]:
        stayed, moved = sides
        found = minimize_scalar(
            lambda share: -float(np.log((1 - share) * stayed + share * moved).sum()), bounds=(0, 1), method="bounded"
        )
        return float(found.x), -float(found.fun)

    (share, one), (share_then, other), (_, both) = (fitted(s) for s in (now, then, np.concatenate([now, then], axis=1)))
    half = 0.5 * float(stats.chi2.sf(max(0.0, 2 * (one + other - both)), 1))
    return share, share_then, half if share > share_then else 1 - half


def _change(now: Votes, values: Array, then: Votes, former: Array, level: float) -> Estimate:
    """Macro mean over workers of the values [n] of votes now, minus that of the former values of votes then.

    The variance is that of bootstrap.TwoWayBootstrap in closed form: over workers, who are pairs where they have votes in
    both, plus what prompts share beyond the noise.
    """
    size = min(int(now.present.sum()), int(then.present.sum()))
    if not size:
        return Estimate(value=None, level=level)
    one, other = _Mean.of(now, values), _Mean.of(then, former)
    value, prompts = one.value - other.value, min(one.prompts, other.prompts)
    if size < FEWEST_WORKERS or prompts < FEWEST_PROMPTS:
        return Estimate(value=value, level=level)
    by_worker = now.sum_by_worker(one.influence) - then.sum_by_worker(other.influence)
    of_workers, shared = float((by_worker**2).sum()) * size / (size - 1), one.shared + other.shared
    degrees = min(size, prompts) - 1 if shared else size - 1
    reach = float(stats.t.ppf((1 + level) / 2, degrees)) * np.sqrt(of_workers + shared)
    return Estimate(value=value, low=value - reach, high=value + reach, level=level)


@dataclass(frozen=True)
class _Mean:
    """A macro mean over workers, and what its variance is made of."""

    value: float
    influence: Array  # [n], of each comparison
    prompts: float  # in effective number
    shared: float  # variance that comparisons of a prompt have in common, beyond that of a worker's on it

    @classmethod
    def of(cls, votes: Votes, values: Array) -> _Mean:
        weight = 1 / (votes.counts[votes.worker] * votes.present.sum())
        value = float(weight @ values)
        influence = weight * (values - value)
        _, prompt = np.unique(votes.prompt, return_inverse=True)
        _, cell = np.unique(votes.worker * (prompt.max() + 1) + prompt, return_inverse=True)
        share = np.bincount(prompt, weight)
        prompts = 1 / float(share @ share)
        held = 1 - 2 * float((share**3).sum()) * prompts + 1 / prompts  # as in TwoWayBootstrap; 0 for one prompt
        of_prompts = float((np.bincount(prompt, influence) ** 2).sum()) / max(held, 1e-9)
        return cls(value, influence, prompts, max(0.0, of_prompts - float((np.bincount(cell, influence) ** 2).sum())))


def _in_words(drifted: bool, workers: int, surprise: Estimate, moved: float | None, moved_then: float | None) -> str:
    if surprise.low is None:
        return f"not told: it takes {FEWEST_WORKERS} known workers and a few prompts, among new votes and those of then"
    verdict = "what people want has changed" if drifted else "no sign that what people want has changed"
    told = (
        f"{verdict}: the new votes of {workers} known workers surprise the incumbent by {surprise.value:.4f} nats a "
        f"comparison more than those it was judged on [{surprise.low:.4f}, {surprise.high:.4f}]"
    )
    if moved is not None:
        told += f", and place {moved:.1%} of them in another coterie, where those placed {moved_then:.1%}"
    return told.replace("-", "−")
