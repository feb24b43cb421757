"""Tastes that vary in every direction: theta_i = theta + delta_i, delta_i ~ N(0, s^2 I) (docs/method, section 1).

The extreme of the low-rank member, U = s I: a worker's embedding is delta_i / s, and nothing is learned jointly but the
reward that all share. For many directions of taste and much data a worker; few data shrink delta_i to nothing.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from coterie.discovery.embedding import EmbeddingReward
from coterie.discovery.logistic import (
    LOGIT_CAP,
    curvature,
    gram,
    reliability_slopes,
    reliability_step,
    residual,
)
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.votes import Array, Votes, VoteSet, one_thread

_STEPS = 6  # alternations of Newton steps of delta_i and log beta_i; each step's change of a logit is capped


class SlopesReward(EmbeddingReward):
    """P(chosen > rejected | i) = sigmoid(beta_i x.(theta + delta_i)), delta_i ~ N(0, variance I), log beta_i ~ N(0, tau^2).

    theta is that of pooled + reliability; delta_i and beta_i are at their posterior mode.

    Args:
        variance: s^2, of each component of a worker's delta.
        precision: of the prior around 0 of theta, where there is no base.
        reliability_variance: tau^2, where there is no base.
        base: a fitted ReliabilityReward whose theta and tau^2 to take; None: fit one here.

    Attributes:
        theta_: [d] float32.
        basis_: [d, d] float32, s I.
        embeddings_: [n_workers, d] float32, delta_i / s; 0 for a worker without votes.
        log_reliability_: [n_workers].
        reliability_variance_: tau^2.
    """

    def __init__(
        self,
        variance: float = 0.01,
        precision: float = 10.0,
        reliability_variance: float = 0.25,
        base: ReliabilityReward | None = None,
    ) -> None:
        self.variance = variance
        self.precision = precision
        self.reliability_variance = reliability_variance
        self.base = base

    @one_thread()
    def fit(self, votes: VoteSet, y: None = None) -> Self:
        """Fit to votes."""
        base = self.base or ReliabilityReward(self.precision, self.reliability_variance).fit(votes)
        self.n_features_in_ = votes.n_features
        self.theta_, self.reliability_variance_ = base.theta_, max(base.reliability_variance, 1e-6)
        self.basis_ = np.sqrt(np.float32(self.variance)) * np.eye(votes.n_features, dtype=np.float32)
        self.embeddings_, self.log_reliability_ = self.infer(votes)
        return self

    def infer(self, votes: VoteSet) -> tuple[Array, Array]:
        """Embeddings [n_workers, d] float32 and log reliabilities [n_workers] of any workers from their votes.

        A worker without votes gets 0 and 0.
        """
        self._check(votes, votes.n_workers)
        delta = np.zeros((votes.n_workers, votes.n_features), np.float32)
        log_beta = np.zeros(votes.n_workers)

        def look(workers: slice, part: Votes) -> None:
            bounds, d, mine = np.concatenate(([0], np.cumsum(part.counts))), delta[workers], log_beta[workers]
            everybody = np.ones((part.n_workers, 1))
            pooled = part.x @ self.theta_
            own = np.zeros_like(pooled)
            for _ in range(_STEPS):
                beta = np.exp(mine).astype(np.float32)[part.worker]
                logits = beta * (pooled + own)
                gradients = part.gradients_by_worker(part.weighted(beta * residual(logits, part.y)))
                gradients = gradients - d / self.variance
                weights = part.weighted(curvature(logits) * beta**2)
                step = np.zeros_like(d)
                for i in np.flatnonzero(part.present):
                    rows = slice(bounds[i], bounds[i + 1])
                    hessian = gram(part.x[rows], weights[rows])
                    hessian[np.diag_indices_from(hessian)] += 1 / self.variance
                    step[i] = np.linalg.solve(hessian, gradients[i])
                moved = np.einsum("nd,nd->n", part.x, step[part.worker])
                largest = np.zeros(part.n_workers)
                np.maximum.at(largest, part.worker, np.abs(beta * moved))
                share = np.minimum(1.0, LOGIT_CAP / np.maximum(largest, 1e-12)).astype(np.float32)
                d += share[:, None] * step
                own += share[part.worker] * moved
                slopes = reliability_slopes(mine, (pooled + own)[None], everybody, part)
                mine[:], _ = reliability_step(
                    mine, slopes, everybody, part.present, self.reliability_variance_, centered=False
                )

        for _ in votes.each(look):
            pass
        return delta / np.sqrt(np.float32(self.variance)), log_beta

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] that the chosen response is preferred, for workers numbered as in `fit`."""
        self._check(votes, len(self.log_reliability_))
        own = np.einsum("nd,nd->n", votes.x, (self.embeddings_ @ self.basis_)[votes.worker])
        return np.asarray(
            np.exp(self.log_reliability_).astype(np.float32)[votes.worker] * (votes.x @ self.theta_ + own)
        )
