"""Everybody wants the same: Bradley-Terry on features, without and with a reliability for each worker."""

from __future__ import annotations

from typing import Self

import numpy as np
from sklearn.base import BaseEstimator

from coterie.discovery.logistic import (
    curvature,
    log_loss,
    newton_step,
    reliability_slopes,
    reliability_step,
    residual,
)
from coterie.discovery.votes import Array, Votes, VoteSet, one_thread
from coterie.errors import BadData


class Reward(BaseEstimator):  # type: ignore[misc]
    """What the members of the family share: how held-out votes are judged."""

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] that the chosen response is preferred, for workers numbered as in `fit`."""
        raise NotImplementedError

    def losses(self, votes: Votes) -> Array:
        """Mean log-loss of each worker, [n_workers]; NaN for a worker without votes."""
        total = votes.sum_by_worker(votes.weighted(log_loss(self.decision_function(votes), votes.y)))
        size = votes.sum_by_worker(votes.weighted(np.ones(len(votes), np.float32)))
        return np.where(votes.present, total / np.maximum(size, 1e-12), np.nan)

    def score(self, votes: Votes) -> float:
        """Minus the log-loss, macro over workers (each worker counts once); higher is better."""
        return -float(np.nanmean(self.losses(votes)))

    def _check(self, votes: VoteSet, n_workers: int) -> None:
        if votes.n_features != self.n_features_in_ or votes.n_workers != n_workers:
            raise BadData(
                f"votes of {votes.n_workers} workers and {votes.n_features} features given to a {type(self).__name__} "
                f"fitted on {n_workers} workers and {self.n_features_in_} features"
            )


class ReliabilityReward(Reward):
    """P(chosen > rejected | i) = sigmoid(beta_i x.theta), log beta_i ~ N(0, tau^2), theta ~ N(0, I / precision).

    Newton steps of theta and of all beta_i at once, until both gradients are below `tol`. log beta has mean 0 over
    the workers who vote, which fixes the scale that beta and theta share.

    Args:
        precision: of the prior around 0 of each component of theta, in comparisons' worth of log-likelihood.
        reliability_variance: tau^2; 0 makes everybody equally reliable (see PooledReward).
        tol: largest component of the gradient of the mean penalised log-loss at which to stop.
        max_iter: Newton steps at most.

    Attributes:
        theta_: [d] float32.
        log_reliability_: [n_workers], log beta_i; 0 for a worker without votes.
        n_iter_: Newton steps taken.
        gradient_: the largest component of the gradient of the mean penalised log-loss where it stopped.
    """

    def __init__(
        self, precision: float = 10.0, reliability_variance: float = 0.25, tol: float = 1e-4, max_iter: int = 100
    ) -> None:
        self.precision = precision
        self.reliability_variance = reliability_variance
        self.tol = tol
        self.max_iter = max_iter

    @one_thread()
    def fit(self, votes: VoteSet, y: None = None) -> Self:
        """Fit to votes."""
        theta, log_beta = np.zeros(votes.n_features), np.zeros(votes.n_workers)
        everybody, probe, count = np.ones((votes.n_workers, 1)), votes.probe, len(votes)
        slopes = np.zeros(votes.n_workers), np.zeros(votes.n_workers)

        def look(workers: slice, part: Votes) -> Array:
            margins = part.x @ theta.astype(np.float32)
            beta = np.exp(log_beta[workers]).astype(np.float32)[part.worker]
            if self.reliability_variance > 0:
                ones = everybody[: part.n_workers]
                slopes[0][workers], slopes[1][workers] = reliability_slopes(
                    log_beta[workers], margins[None], ones, part
                )
            return np.asarray(part.x.T @ part.weighted(beta * residual(beta * margins, part.y)))

        for iteration in range(1, self.max_iter + 1):
            gradient = votes.total(look) - self.precision * theta
            updated, beta_gradient = log_beta, 0.0
            if self.reliability_variance > 0:
                updated, beta_gradient = reliability_step(
                    log_beta, slopes, everybody, votes.present, self.reliability_variance
                )
            self.n_iter_ = iteration
            self.gradient_ = max(float(np.abs(gradient).max()), beta_gradient) / count
            if self.gradient_ <= self.tol and (iteration > 2 or not self.reliability_variance):
                break
            beta = np.exp(log_beta).astype(np.float32)[probe.worker]
            weights = probe.weighted(curvature(beta * (probe.x @ theta.astype(np.float32))) * beta**2)
            theta = theta + newton_step(probe.x, weights, beta, gradient, self.precision)[0]
            log_beta = updated
        self.n_features_in_ = votes.n_features
        self.theta_ = theta.astype(np.float32)
        self.log_reliability_ = log_beta
        return self

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] that the chosen response is preferred, for workers numbered as in `fit`."""
        self._check(votes, len(self.log_reliability_))
        return np.exp(self.log_reliability_).astype(np.float32)[votes.worker] * (votes.x @ self.theta_)


class PooledReward(ReliabilityReward):
    """Bradley-Terry: one theta, everybody equally reliable; logistic ridge regression without an intercept.

    Args:
        precision: of the prior around 0 of each component of theta.
        tol: largest component of the gradient of the mean penalised log-loss at which to stop.
        max_iter: Newton steps at most.
    """

    def __init__(self, precision: float = 10.0, tol: float = 1e-4, max_iter: int = 100) -> None:
        super().__init__(precision=precision, reliability_variance=0.0, tol=tol, max_iter=max_iter)
