"""New workers: how much a few of their comparisons tell, and which comparison to ask them next (docs/method, section 5).

A newcomer is inferred, never fitted: the member was fitted on other workers, and the newcomer's comparisons only move
the posterior over its coteries, or over its embeddings. That evidence counts 1 / temperature. Above 1: the model is not
the whole truth, takes a worker's comparisons for more independent than they are, and is too sure too soon. Below 1: its
rewards were shrunk towards each other by their prior, and tell the coteries apart less well than the truth would. The
reliability is left as inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import minimize_scalar
from scipy.special import entr, expit, log_expit, logsumexp, softmax
from sklearn.base import clone

from coterie.bootstrap import FEWEST_WORKERS
from coterie.discovery.logistic import log_loss
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Array, Votes, VoteSet, random_workers
from coterie.progress import progress

SHOTS = (0, 5, 10, 20, 50)
_MOST = 400  # newcomers: more hardly narrow the intervals
_FOLDS = 5  # at most a fifth of the workers is new at a time
_MOST_FITTED = 500_000  # comparisons of others that a member is fitted to: more cost minutes
_LOG_TEMPERATURES = (-2.0, 4.0)
_TEMPERATURE_PRIOR_SD = 1.0  # of log temperature: decides where the held-out votes say nothing of it
_TINY = 1e-300  # a probability whose logarithm is finite
_NODES = 32  # of the quadrature over a logit; more change no digit that matters

Member = MixtureReward | LowRankReward | SlopesReward
Make = Callable[[Votes, ReliabilityReward], Member]


def tempered(posterior: Array, weights: Array, temperature: float) -> Array:
    """The posterior over coteries [..., K] when the evidence that led from `weights` [K] to it counts 1 / temperature."""
    prior = np.log(weights)
    evidence = np.log(np.maximum(posterior, _TINY)) - prior  # up to a constant of the worker
    return np.asarray(softmax(prior + evidence / temperature, axis=-1))


def tempered_embedding(mean: Array, covariance: Array, temperature: float) -> tuple[Array, Array]:
    """The same for an embedding N(mean [..., r], covariance [..., r, r]) whose prior is N(0, I).

    Its evidence is Gaussian: natural parameters that are divided by the temperature.
    """
    precision, eye = np.linalg.inv(covariance), np.eye(mean.shape[-1])
    cooler = np.linalg.inv(eye + (precision - eye) / temperature)
    return (cooler @ precision @ mean[..., None])[..., 0] / temperature, cooler


def predict(member: Member, inferred: Sequence[Array], votes: Votes, temperature: float = 1.0) -> Array:
    """Logits [n] that the chosen response is preferred, for workers whom `member` did not learn from.

    Args:
        member: fitted.
        inferred: what `member.infer` returned for these workers, from other votes.
        votes: to predict, workers numbered as there.
        temperature: of the evidence of those other votes. Slopes are inferred as a mode, without the covariance that it
            would take to cool them: it leaves them as they are.
    """
    beta = np.exp(inferred[-1])[votes.worker]
    if isinstance(member, MixtureReward):
        shares = np.log(np.maximum(tempered(inferred[0], member.weights_, temperature), _TINY))[votes.worker]
        logits = beta[:, None] * (votes.x @ member.theta_.T)
        above, below = (logsumexp(shares + log_expit(sign * logits), axis=1) for sign in (1, -1))
        return np.asarray(above - below)
    pooled, loadings = votes.x @ member.theta_, votes.x @ member.basis_
    if isinstance(member, SlopesReward):
        return np.asarray(beta * (pooled + (loadings * inferred[0][votes.worker]).sum(axis=1)))
    mean, covariance = tempered_embedding(inferred[0], inferred[1], temperature)
    margin = pooled + (loadings * mean[votes.worker]).sum(axis=1)
    variance = np.einsum("nr,nrs,ns->n", loadings, covariance[votes.worker], loadings)
    return np.asarray(beta * margin / np.sqrt(1 + np.pi / 8 * beta**2 * variance))  # MacKay 1992, as in LowRankReward


@dataclass(frozen=True)
class LearningCurve:
    """Predictions for new workers after their first k comparisons.

    Attributes:
        newcomers: [m], ascending; who was new in turn.
        votes: their test votes, workers renumbered 0 .. m - 1.
        pooled: [n] logits of these votes by the pooled reward.
        logits: the same by the member after k comparisons, for each k; at 0 they are `pooled`.
        temperature: of the evidence, calibrated on the newcomers' validation votes.
    """

    newcomers: Array
    votes: Votes
    pooled: Array
    logits: dict[int, Array]
    temperature: float


@dataclass(frozen=True)
class _Fold:
    """What was fitted without some workers, and what it inferred of them from k comparisons; their held-out votes."""

    member: Member
    inferred: dict[int, tuple[Array, ...]]
    validation: Votes
    test: Votes
    pooled: Array  # [n] logits of the test votes


def learning_curve(
    train: VoteSet,
    validation: VoteSet,
    test: VoteSet,
    make: Make,
    base: ReliabilityReward,
    seed: int = 0,
    shots: Sequence[int] = SHOTS,
) -> LearningCurve | None:
    """Judge a member on workers whom it was not fitted on, after k of their comparisons.

    Workers are new in turn, a fifth of them at a time: pooled + reliability and the member are fitted to the others'
    training votes; the first k of a newcomer's training votes, in random order, give the posterior (or embedding) and the
    reliability; the newcomer's test votes are predicted. At 0 the pooled reward theta_0 serves itself. Every k is judged
    on the same newcomers, at most 400, drawn from the workers who can give the most: 50 comparisons, or the largest k
    that ten workers can give. The temperature is one number for all k > 0, the one of least log-loss (macro over
    workers) on validation votes.

    Args:
        train, validation, test: votes of the same workers, numbered alike; no prompt is in two of them.
        make: fits the member to votes and a base fitted to the same votes.
        base: whose priors the pooled + reliability models take; it need not be fitted.
        seed: of the choice of newcomers and of the order of their comparisons.
        shots: the k, ascending.

    Returns:
        None where fewer than ten workers have test votes (and the smallest k comparisons).
    """
    counts = np.where(test.present, train.counts, -1)
    shots = [k for k in shots if (counts >= k).sum() >= FEWEST_WORKERS]
    if not shots:
        return None
    rng = np.random.default_rng(seed)
    able = np.flatnonzero(counts >= shots[-1])
    newcomers = np.sort(rng.choice(able, min(_MOST, len(able)), replace=False))
    n_folds = -(-_FOLDS * len(newcomers) // int(train.present.sum()))
    fold = rng.permutation(len(newcomers)) % n_folds
    folds = [
        _judge(train, validation, test, newcomers[fold == f], make, base, [k for k in shots if k], seed)
        for f in progress(range(n_folds), desc="new workers: folds", unit="folds")
    ]
    temperature = _calibrate(folds)
    votes = test.of_workers(newcomers)

    def gathered(parts: list[Array]) -> Array:
        whole = np.empty(len(votes))
        for f, part in enumerate(parts):
            whole[fold[votes.worker] == f] = part
        return whole

    pooled = gathered([f.pooled for f in folds])
    logits = {
        k: gathered([predict(f.member, f.inferred[k], f.test, temperature) for f in folds]) if k else pooled
        for k in shots
    }
    return LearningCurve(newcomers, votes, pooled, logits, temperature)


def _judge(
    train: VoteSet,
    validation: VoteSet,
    test: VoteSet,
    new: Array,
    make: Make,
    base: ReliabilityReward,
    shots: list[int],
    seed: int,
) -> _Fold:
    others = train.of_workers(np.setdiff1d(random_workers(train, _MOST_FITTED, _MOST, seed), new))
    pooled = clone(base).fit(others)
    member = make(others, pooled)
    own, held_out = train.of_workers(new), test.of_workers(new)
    order = np.lexsort((np.random.default_rng(seed).random(len(own)), own.worker))  # random within each worker
    turn = np.empty(len(own), np.intp)
    turn[order] = np.arange(len(own)) - (np.cumsum(own.counts) - own.counts)[own.worker]
    inferred: dict[int, tuple[Array, ...]] = {k: member.infer(own.subset(turn < k)) for k in shots}
    return _Fold(member, inferred, validation.of_workers(new), held_out, held_out.x @ pooled.theta_)


def _calibrate(folds: list[_Fold]) -> float:
    """The temperature of least log-loss on the newcomers' validation votes; a worker counts once in each k."""
    judged = [(f, inferred) for f in folds if len(f.validation) for inferred in f.inferred.values()]

    def loss(log_temperature: float) -> float:
        nats = 0.0
        for fold, inferred in judged:
            votes = fold.validation
            logits = predict(fold.member, inferred, votes, np.exp(log_temperature))
            nats += float((votes.sum_by_worker(log_loss(logits, votes.y)) / np.maximum(votes.counts, 1)).sum())
        return nats + 0.5 * (log_temperature / _TEMPERATURE_PRIOR_SD) ** 2

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


def next_pair(posterior: Array, theta: Array, x: Array, reliability: float | Array = 1.0) -> tuple[Array, Array]:
    """Which pair to ask a worker next: the one whose answer says most about the worker's coterie.

    The mutual information of answer and coterie, H(sum_k pi_k p_k) - sum_k pi_k H(p_k) (BALD; Houlsby et al. 2011, arXiv
    1112.5745). It passes over pairs that are a toss-up in every coterie, which the uncertainty of the answer would ask.

    Args:
        posterior: [..., K]; of one worker, or of several.
        theta: [K, d], the coteries' rewards.
        x: [m, d], feature differences of the pairs that can be asked; their order does not matter.
        reliability: beta [...] of the workers.

    Returns:
        The pairs by descending information [..., m], and the information in nats [..., m], in the order of x.
    """
    p = expit(np.asarray(reliability)[..., None, None] * (x @ theta.T))
    return _by_information(posterior[..., None, :], p)


def next_pair_by_embedding(
    mean: Array, covariance: Array, theta: Array, basis: Array, x: Array, reliability: float | Array = 1.0
) -> tuple[Array, Array]:
    """`next_pair` for an embedding: the mutual information of answer and embedding.

    Of the embedding only a pair's logit matters, which is Gaussian: both entropies are integrals over one dimension, by
    Gauss-Hermite quadrature.

    Args:
        mean: [..., r] of the embedding. covariance: [..., r, r].
        theta: [d]. basis: [d, r].
        x: [m, d]. reliability: [...], as in `next_pair`.
    """
    nodes, weights = hermegauss(_NODES)
    loadings = x @ basis
    center = x @ theta + (loadings @ mean[..., None])[..., 0]
    spread = np.sqrt(np.maximum(np.einsum("mr,...rs,ms->...m", loadings, covariance, loadings), 0))
    logits = np.asarray(reliability)[..., None, None] * (center[..., None] + spread[..., None] * nodes)
    return _by_information(weights / weights.sum(), expit(logits))


def _by_information(weights: Array, p: Array) -> tuple[Array, Array]:
    """Order and mutual information of a binary answer and a state, of P(state) and P(answer | state), states last."""
    answer = (weights * p).sum(axis=-1)
    information = _entropy(answer) - (weights * _entropy(p)).sum(axis=-1)
    return np.argsort(-information, axis=-1, kind="stable"), np.maximum(information, 0)


def _entropy(p: Array) -> Array:
    return np.asarray(entr(p) + entr(1 - p))
