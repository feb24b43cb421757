"""K groups of workers, each with a reward: a mixture of Bradley-Terry models, fitted by EM (docs/method, 1 and 4).

Soft assignment; theta_k = theta_0 + delta_k with theta_0 the reward of everybody, and a reliability for each worker.
The hard-assignment form is Park et al. 2024, arXiv 2405.00254.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import logsumexp, softmax
from sklearn.cluster import KMeans

from coterie.contracts import MIXTURE_TENSORS, replacing
from coterie.discovery.logistic import (
    curvature,
    log_loss,
    multipliers,
    newton_step,
    reliability_slopes,
    reliability_step,
    residual,
)
from coterie.discovery.pooled import ReliabilityReward, Reward
from coterie.discovery.spectral import taste_directions
from coterie.discovery.votes import PILOT, Array, Votes, VoteSet, one_thread, random_workers
from coterie.errors import BadData

_NEGLIGIBLE = 1e-5  # responsibility below which a worker is left out of a coterie's Hessian (never of its gradient)
_INFER_STEPS = 8  # alternations of posterior and reliability for workers whose rewards are given


class MixtureReward(Reward):
    """Workers belong to K coteries: P(chosen > rejected | z_i = k) = sigmoid(beta_i x.theta_k).

    theta_k ~ N(theta_0, I / precision) around the pooled reward theta_0 of ReliabilityReward, log beta_i ~
    N(0, reliability_variance), one pseudo-count for each coterie's weight. EM with one capped Newton step a coterie and
    iteration, from k-means on the leading directions of the workers' one-step taste estimates. Where there are many
    comparisons, EM first converges on a random part of the workers.

    The E-step leaves a worker out of the rewards that judge them, to first order (their votes pull theta_k towards
    them, so a coterie of few would keep whoever it has): l_ik - r_ik g_ik.H_k^-1 g_ik, g_ik the gradient of worker i.

    Args:
        n_coteries: K.
        precision: lambda.
        reliability_variance: tau^2.
        base: a fitted ReliabilityReward whose theta_0 and reliabilities to start from; None: fit one here.
        tol: largest component of the gradient of the mean penalised log-loss at which to stop.
        max_iter: EM iterations at most.
        seed: of k-means and of the choice of workers to start on.

    Attributes:
        theta_: [K, d] float32, by descending weight.
        weights_: [K], the prior of a worker's coterie.
        responsibilities_: [n_workers, K]; the weights for a worker without votes.
        log_reliability_: [n_workers].
        smallest_: workers with votes in the smallest coterie, each counted in their most probable one.
        n_iter_: EM iterations on all votes.
        gradient_: the largest component of the gradient of the mean penalised log-loss where it stopped.
    """

    def __init__(
        self,
        n_coteries: int = 2,
        precision: float = 100.0,
        reliability_variance: float = 0.25,
        base: ReliabilityReward | None = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        seed: int = 0,
    ) -> None:
        self.n_coteries = n_coteries
        self.precision = precision
        self.reliability_variance = reliability_variance
        self.base = base
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed

    @one_thread()
    def fit(self, votes: VoteSet, y: None = None, labels: Array | None = None) -> Self:
        """Fit to votes. With `labels` [n_workers], a clustering of the workers, only the rewards of those coteries are
        fitted (M-steps), and the responsibilities are the posterior under them.

        Raises:
            BadData: fewer workers with votes than coteries.
        """
        voting = int(votes.present.sum())
        if not 1 <= self.n_coteries <= voting:
            raise BadData(
                f"{self.n_coteries} coteries of {voting} workers with training comparisons; ask for 1 to {voting}"
            )
        base = self.base or ReliabilityReward(reliability_variance=self.reliability_variance, tol=self.tol).fit(votes)
        self.n_features_in_, self.reliability_variance_ = votes.n_features, max(base.reliability_variance, 1e-6)
        self._center = base.theta_.astype(np.float64)
        theta, log_beta = np.tile(self._center, (self.n_coteries, 1)), np.zeros(votes.n_workers)
        weights = np.full(self.n_coteries, 1 / self.n_coteries)
        if self.n_coteries == 1:
            self.n_iter_, self.gradient_ = base.n_iter_, base.gradient_
            responsibilities, log_beta = np.ones((votes.n_workers, 1)), base.log_reliability_
        elif labels is not None:
            given = np.eye(self.n_coteries)[labels]
            theta, _, log_beta, weights = self._em(
                votes, theta, log_beta, _weights(given, votes.present), given, hold=True
            )
            self.theta_, self.weights_ = theta.astype(np.float32), weights
            responsibilities = self._posterior(votes, log_beta)
        elif len(votes) > 2 * PILOT:
            some = random_workers(votes, PILOT, 50 * self.n_coteries, self.seed)
            pilot = votes.of_workers(some)
            first = self._start(pilot)
            theta, _, _, weights = self._em(pilot, theta, log_beta[some], weights, first, tol=10 * self.tol)
            theta, responsibilities, log_beta, weights = self._em(votes, theta, log_beta, weights, None)
        else:
            first = self._start(votes.loaded())
            theta, responsibilities, log_beta, weights = self._em(votes, theta, log_beta, weights, first)
        responsibilities = np.where(votes.present[:, None], responsibilities, weights)
        order = np.argsort(-weights, kind="stable")
        self.theta_, self.weights_ = theta[order].astype(np.float32), weights[order]
        self.responsibilities_, self.log_reliability_ = responsibilities[:, order], log_beta
        own = responsibilities[votes.present].argmax(axis=1)
        self.smallest_ = int(np.bincount(own, minlength=self.n_coteries).min())
        return self

    def _start(self, votes: Votes) -> Array:
        labels = spectral_labels(votes, self._center, self.n_coteries, self.precision, self.seed)
        return np.asarray(np.eye(self.n_coteries)[labels])

    def _em(
        self,
        votes: VoteSet,
        theta: Array,
        log_beta: Array,
        weights: Array,
        responsibilities: Array | None,
        hold: bool = False,
        tol: float | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """EM from rewards theta, or from responsibilities where given (then the first E-step, or all, are skipped)."""
        given, held = responsibilities is not None, responsibilities
        shares = np.tile(weights, (votes.n_workers, 1)) if held is None else held.copy()
        slopes = np.zeros(votes.n_workers), np.zeros(votes.n_workers)
        influence = np.zeros((votes.n_workers, self.n_coteries))
        inverse: list[Array] | None = None
        probe, count = votes.probe, len(votes)

        def look(workers: slice, part: Votes) -> Array:
            """E-step of these workers; their part of the gradient [K, d]."""
            margins = theta.astype(np.float32) @ part.x.T
            beta = np.exp(log_beta[workers]).astype(np.float32)[part.worker]
            if expecting:
                evidence = _evidence(part, beta * margins) - shares[workers] * influence[workers]
                shares[workers] = _responsibilities(evidence, weights, part.present)
            slopes[0][workers], slopes[1][workers] = reliability_slopes(
                log_beta[workers], margins, shares[workers], part
            )
            gradient = np.empty(theta.shape)
            for k, margin in enumerate(margins):
                own = part.gradients_by_worker(part.weighted(beta * residual(beta * margin, part.y)))
                gradient[k] = shares[workers, k] @ own
                if inverse is not None:
                    influence[workers, k] = ((own @ inverse[k]) * own).sum(axis=1)
            return gradient

        for iteration in range(1, self.max_iter + 1):
            expecting = not hold and (iteration > 1 or not given)
            gradient = votes.total(look) - self.precision * (theta - self._center)
            if expecting:
                weights = _weights(shares, votes.present)
            self.n_iter_, self.gradient_ = iteration, float(np.abs(gradient).max()) / count
            if self.gradient_ <= (tol or self.tol) and iteration > 2:
                break
            beta = np.exp(log_beta).astype(np.float32)[probe.worker]
            inverse, moved = [], theta.copy()
            for k in range(self.n_coteries):
                mine = shares[:, k].astype(np.float32)[probe.worker]
                margins = probe.x @ theta[k].astype(np.float32)
                rows = probe.weighted(np.where(mine > _NEGLIGIBLE, mine, 0) * curvature(beta * margins) * beta**2)
                step, hessian = newton_step(probe.x, rows, beta, gradient[k], self.precision)
                moved[k] += step
                inverse.append(np.linalg.inv(hessian).astype(np.float32))
            log_beta, _ = reliability_step(log_beta, slopes, shares, votes.present, self.reliability_variance_)
            scale = self._scale_step(moved, log_beta, np.where(votes.present[:, None], shares, 0))
            theta = moved / np.exp(scale)[:, None]
            log_beta[votes.present] += shares[votes.present] @ scale
        return theta, shares, log_beta, weights

    def _scale_step(self, theta: Array, log_beta: Array, responsibilities: Array) -> Array:
        """How far to move the scale that theta_k shares with its workers' reliabilities from the former to these, [K].

        The likelihood does not feel it; the two priors do. log beta keeps its mean over all workers.
        """
        counts = responsibilities.sum(axis=0) + 1e-9
        pull = self.precision * (theta * (theta - self._center)).sum(axis=1)
        gradient = pull - responsibilities.T @ log_beta / self.reliability_variance_
        hessian = counts / self.reliability_variance_ + self.precision * (theta**2).sum(axis=1)
        gradient -= multipliers(gradient, hessian, counts[:, None])
        return np.asarray(np.clip(gradient / hessian, -0.5, 0.5))

    def save(self, path: Path, version: str) -> None:
        """Write contracts.MIXTURE_TENSORS; `version` travels in the file's metadata."""
        with replacing(path) as temporary:
            save_file(self.tensors(), temporary, metadata={"mixture_version": version})

    def tensors(self) -> dict[str, Array]:
        """What contracts.MIXTURE_TENSORS names."""
        values = (self.theta_, self.weights_, np.array([self.reliability_variance_]))
        return {n: np.ascontiguousarray(v, np.float32) for n, v in zip(MIXTURE_TENSORS, values, strict=True)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote: a mixture that infers the posterior of any worker, but knows none.

        Raises:
            BadData: no such file, not safetensors, or a tensor is missing.
        """
        try:
            tensors = load_file(path)
            theta, weights, variance = (tensors[name] for name in MIXTURE_TENSORS)
        except (OSError, SafetensorError, KeyError) as error:
            raise BadData(f"{path}: no mixture of coterie ({error}); run `coterie cluster` again") from error
        mixture = cls(len(weights), reliability_variance=float(variance[0]))
        mixture.theta_, mixture.weights_ = theta, weights.astype(np.float64)
        mixture.n_features_in_, mixture.reliability_variance_ = theta.shape[1], float(variance[0])
        mixture.responsibilities_, mixture.log_reliability_ = np.zeros((0, len(weights))), np.zeros(0)
        return mixture

    def infer(self, votes: VoteSet) -> tuple[Array, Array]:
        """Posterior [n_workers, K] and log reliability [n_workers] of any workers, new ones too, from their votes.

        The rewards and weights are as fitted. A worker without votes gets the weights and 0.
        """
        self._check(votes, votes.n_workers)
        posterior, log_beta = np.tile(self.weights_, (votes.n_workers, 1)), np.zeros(votes.n_workers)

        def look(workers: slice, part: Votes) -> None:
            margins = self.theta_ @ part.x.T
            for _ in range(_INFER_STEPS):
                beta = np.exp(log_beta[workers]).astype(np.float32)[part.worker]
                shares = _responsibilities(_evidence(part, beta * margins), self.weights_, part.present)
                slopes = reliability_slopes(log_beta[workers], margins, shares, part)
                log_beta[workers], _ = reliability_step(
                    log_beta[workers], slopes, shares, part.present, self.reliability_variance_, centered=False
                )
            posterior[workers] = shares

        for _ in votes.each(look):
            pass
        return posterior, log_beta

    def _posterior(self, votes: VoteSet, log_beta: Array) -> Array:
        """Posterior [n_workers, K] given the reliabilities."""
        posterior = np.tile(self.weights_, (votes.n_workers, 1))

        def look(workers: slice, part: Votes) -> None:
            logits = np.exp(log_beta[workers]).astype(np.float32)[part.worker] * (self.theta_ @ part.x.T)
            posterior[workers] = _responsibilities(_evidence(part, logits), self.weights_, part.present)

        for _ in votes.each(look):
            pass
        return posterior

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] of the probability averaged over the worker's coteries, for workers numbered as in `fit`."""
        self._check(votes, len(self.log_reliability_))
        logits = np.exp(self.log_reliability_)[votes.worker] * (self.theta_ @ votes.x.T)
        shares = np.log(np.maximum(self.responsibilities_.T[:, votes.worker], 1e-300))
        above, below = (logsumexp(shares - np.logaddexp(0, sign * logits), axis=0) for sign in (-1, 1))
        return np.asarray(above - below)


def spectral_labels(votes: Votes, theta: Array, n_coteries: int, precision: float, seed: int) -> Array:
    """Coteries to start from, [n_workers]: k-means of the workers' tastes in the leading directions of difference."""
    tastes, directions, _ = taste_directions(votes, theta, n_coteries - 1, precision)
    plane = tastes @ directions
    labels = np.zeros(votes.n_workers, np.intp)
    distinct = len(np.unique(plane, axis=0))
    means = KMeans(min(n_coteries, distinct), n_init=10, random_state=seed)
    labels[votes.present] = means.fit_predict(plane, sample_weight=np.sqrt(votes.counts[votes.present]))
    return labels


def _evidence(votes: Votes, logits: Array) -> Array:
    """log P(votes of i | coterie k), [n_workers, K], of logits [K, n]."""
    return -np.stack([votes.sum_by_worker(votes.weighted(log_loss(row, votes.y))) for row in logits], axis=1)


def _responsibilities(evidence: Array, weights: Array, present: Array) -> Array:
    return np.where(present[:, None], softmax(np.log(weights) + evidence, axis=1), weights)


def _weights(responsibilities: Array, present: Array) -> Array:
    counts = responsibilities[present].sum(axis=0) + 1.0
    return np.asarray(counts / counts.sum())
