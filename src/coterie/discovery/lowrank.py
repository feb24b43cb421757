"""Tastes that vary along a few directions: theta_i = theta + U a_i, and a_i is the worker's embedding.

The joint learning of embeddings and reward is that of arXiv 2601.20760; LoRe (arXiv 2504.14439) is the
softmax-weighted relative. Here the embeddings are integrated out with the logistic bound of Jaakkola and Jordan (2000,
"Bayesian parameter estimation via variational methods"): with E z and E z^2 the moments of a logit under
q(a_i) = N(mu_i, V_i),

    -log sigmoid(z) <= log 2 cosh(xi / 2) - E z / 2,   xi^2 = E z^2,

tight at xi and quadratic in a_i, so that each worker's posterior has a closed form given xi. Maximising over a_i
instead of integrating (V_i = 0) lets the basis grow to fit each worker's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize

from coterie.discovery.embedding import EmbeddingReward
from coterie.discovery.logistic import log_loss, mean_hessian, reliability_step
from coterie.discovery.pooled import PooledReward, ReliabilityReward
from coterie.discovery.spectral import taste_directions
from coterie.discovery.votes import PILOT, Array, Votes, VoteSet, one_thread, random_workers
from coterie.errors import BadData

_SWEEPS = 2  # updates of the workers' posteriors in one evaluation of the objective; they start from the last one's
_INFER_SWEEPS = 12
_START_PASSES, _LAST_PASSES = 2, 5  # over all votes, each with _SWEEPS updates and a step of log beta
_START_PRECISION = 30.0  # shrinks the one-step tastes that U starts from
_START_LENGTH = 0.01  # of a column of U at least: 0 is a stationary point
_RESTARTS = 3  # of a line search that stalls where the workers' posteriors lag behind


@dataclass
class _Workers:
    """The variational posterior of every worker: q(a_i) = N(mean_i, covariance_i), and log beta_i."""

    mean: Array  # [n_workers, r]
    covariance: Array  # [n_workers, r, r]
    log_reliability: Array  # [n_workers]
    slopes: tuple[Array, Array]  # gradient and curvature of the bound by log beta_i, two [n_workers]

    @classmethod
    def prior(cls, n_workers: int, rank: int) -> _Workers:
        """What is known of workers before their votes."""
        eye = np.broadcast_to(np.eye(rank), (n_workers, rank, rank)).copy()
        zeros = (np.zeros(n_workers) for _ in range(3))
        return cls(np.zeros((n_workers, rank)), eye, next(zeros), (next(zeros), next(zeros)))

    def of(self, workers: slice) -> _Workers:
        """A view of some workers: what is written there is written here."""
        slopes = (self.slopes[0][workers], self.slopes[1][workers])
        return _Workers(self.mean[workers], self.covariance[workers], self.log_reliability[workers], slopes)

    def step(self, present: Array, variance: float, centered: bool) -> None:
        """A Newton step of all log beta; `centered`, with mean 0, which fixes the scale that it shares with theta and U."""
        everybody = np.ones((len(present), 1))
        self.log_reliability[:], _ = reliability_step(
            self.log_reliability, self.slopes, everybody, present, variance, centered
        )


class LowRankReward(EmbeddingReward):
    """P(chosen > rejected | i) = sigmoid(beta_i x.(theta + U a_i)), a_i ~ N(0, I), log beta_i ~ N(0, tau^2).

    theta and U are found by L-BFGS on the bound of the marginal likelihood (module docstring), with the workers'
    posteriors optimised out at every evaluation, in coordinates where the pooled Hessian is the identity. U starts
    from the leading directions of the workers' one-step taste estimates. Where there are many comparisons, it first
    converges on a random part of the workers.

    U is identified up to a rotation: its columns are orthogonal, by descending length, each one's largest entry
    positive.

    Args:
        rank: r, directions of taste.
        precision: of the prior around 0 of each component of theta.
        basis_precision: of the prior around 0 of each entry of U.
        reliability_variance: tau^2.
        base: a fitted ReliabilityReward whose theta to start from, and whose tau^2 to take; None: start from a pooled one.
        tol: largest component of the gradient of the mean penalised loss at which to stop, in the coordinates above.
        max_iter: L-BFGS iterations at most.
        seed: of the choice of workers to start on.

    Attributes:
        theta_: [d] float32.
        basis_: [d, r] float32, U.
        embeddings_: [n_workers, r] float32, a_i; 0 for a worker without votes.
        covariances_: [n_workers, r, r], of a_i given the votes.
        log_reliability_: [n_workers].
        n_iter_: L-BFGS iterations on all votes.
        gradient_: the largest component of the gradient where it stopped.
    """

    def __init__(
        self,
        rank: int = 2,
        precision: float = 10.0,
        basis_precision: float = 100.0,
        reliability_variance: float = 0.25,
        base: ReliabilityReward | None = None,
        tol: float = 1e-4,
        max_iter: int = 100,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.precision = precision
        self.basis_precision = basis_precision
        self.reliability_variance = reliability_variance
        self.base = base
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed

    @one_thread()
    def fit(self, votes: VoteSet, y: None = None) -> Self:
        """Fit to votes. Raises BadData: a rank above the number of features."""
        if not 1 <= self.rank <= votes.n_features:
            raise BadData(f"rank {self.rank} with {votes.n_features} features; ask for 1 to {votes.n_features}")
        start = self.base or PooledReward(self.precision, 10 * self.tol).fit(votes)  # where to start, no more
        theta, basis = start.theta_.astype(np.float64), None
        given = self.base.reliability_variance if self.base else self.reliability_variance
        self.reliability_variance_ = max(given, 1e-6)
        if len(votes) > 2 * PILOT:
            some = random_workers(votes, PILOT, 50 * self.rank, self.seed)
            theta, basis, _ = self._optimise(votes.of_workers(some), theta, None)
        theta, basis, workers = self._optimise(votes, theta, basis)
        rotation, lengths, _ = np.linalg.svd(basis.T @ basis)
        rotation *= np.where(lengths > 0, _signs(basis @ rotation), 1.0)
        self.n_features_in_ = votes.n_features
        self.theta_, self.basis_ = theta.astype(np.float32), (basis @ rotation).astype(np.float32)
        self.embeddings_ = (workers.mean @ rotation).astype(np.float32)
        self.covariances_ = rotation.T @ workers.covariance @ rotation
        self.log_reliability_ = workers.log_reliability
        return self

    def _optimise(self, votes: VoteSet, theta: Array, basis: Array | None) -> tuple[Array, Array, _Workers]:
        n, r = len(votes), self.rank
        hessian = mean_hessian(votes, theta)
        hessian[np.diag_indices_from(hessian)] += max(self.precision, self.basis_precision) / n
        root = cholesky(hessian, lower=True)
        if basis is None:
            # Seen from the reward of equally reliable people: with reliabilities, who wants the opposite passes for careless.
            common = PooledReward(self.precision, 10 * self.tol).fit(votes).theta_
            _, directions, spread = taste_directions(votes.loaded(), common, r, _START_PRECISION)
            basis = directions * np.maximum(spread, _START_LENGTH)
        workers, variance = _Workers.prior(votes.n_workers, r), self.reliability_variance_
        self._settle(votes, theta, basis, workers, _START_PASSES)
        precision = np.concatenate([[self.precision], np.full(r, self.basis_precision)])

        def objective(flat: Array) -> tuple[float, Array]:
            stacked = solve_triangular(root, flat.reshape(-1, r + 1), lower=True, trans="T")

            def look(those: slice, part: Votes) -> Array:
                """The bound and, behind it, its gradient [(r + 1) d]."""
                seen, mine = _Projected.of(part, stacked[:, 0], stacked[:, 1:]), workers.of(those)
                moments = _sweeps(part, seen, mine, _SWEEPS)
                value, pull = _bound(part, seen, mine, moments, variance)
                return np.concatenate([[value], (pull @ part.x).T.ravel()])

            told = votes.total(look)
            workers.step(votes.present, variance, centered=True)
            value = told[0] + 0.5 * float((precision * stacked**2).sum())
            gradient = told[1:].reshape(-1, r + 1) + precision * stacked
            return value / n, solve_triangular(root, gradient, lower=True).ravel() / n

        point = (root.T @ np.column_stack([theta, basis])).ravel()
        options = {"maxiter": self.max_iter, "gtol": self.tol, "ftol": 1e-9, "maxcor": 20}
        self.n_iter_ = 0
        for _ in range(_RESTARTS):
            found = minimize(objective, point, jac=True, method="L-BFGS-B", options=options)
            point, self.gradient_ = found.x, float(np.abs(found.jac).max())
            self.n_iter_ += int(found.nit)
            if self.gradient_ <= self.tol:
                break
        stacked = solve_triangular(root, point.reshape(-1, r + 1), lower=True, trans="T")
        theta, basis = stacked[:, 0], stacked[:, 1:]
        self._settle(votes, theta, basis, workers, _LAST_PASSES)
        return theta, basis, workers

    def _settle(self, votes: VoteSet, theta: Array, basis: Array, workers: _Workers, passes: int | None) -> None:
        """Update the workers' posteriors and reliabilities under theta and U: in so many passes with log beta centred, or
        each worker alone, without passes."""
        alone = passes is None

        def look(those: slice, part: Votes) -> None:
            seen, mine = _Projected.of(part, theta, basis), workers.of(those)
            for _ in range(_INFER_SWEEPS if alone else 1):
                _sweeps(part, seen, mine, 1 if alone else _SWEEPS)
                if alone:
                    mine.step(part.present, self.reliability_variance_, centered=False)

        for _ in range(passes or 1):
            for _ in votes.each(look):
                pass
            if not alone:
                workers.step(votes.present, self.reliability_variance_, centered=True)

    def infer(self, votes: VoteSet) -> tuple[Array, Array, Array]:
        """Embeddings [n_workers, r], their covariances and log reliabilities of any workers, new ones too, from votes.

        A worker without votes gets the prior: 0, I, 0.
        """
        self._check(votes, votes.n_workers)
        workers = _Workers.prior(votes.n_workers, self.rank)
        self._settle(votes, self.theta_, self.basis_, workers, None)
        return workers.mean, workers.covariance, workers.log_reliability

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n], moderated by the uncertainty of a_i (MacKay 1992), for workers numbered as in `fit`."""
        self._check(votes, len(self.log_reliability_))
        seen = _Projected.of(votes, self.theta_, self.basis_)
        mean, variance = _moments(votes, seen, self.embeddings_, self.covariances_)
        beta = _beta(votes, self.log_reliability_)
        return np.asarray(beta * mean / np.sqrt(1 + np.pi / 8 * beta**2 * variance))


@dataclass
class _Projected:
    """What of x the workers' posteriors depend on; float32, one pass over x."""

    margins: Array  # [n], x.theta
    loadings: Array  # [r, n], u = U^T x
    products: Array  # [r (r + 1) / 2, n], u_i u_j for i <= j

    @classmethod
    def of(cls, votes: Votes, theta: Array, basis: Array) -> _Projected:
        both = np.vstack([theta, basis.T]).astype(np.float32) @ votes.x.T
        loadings = both[1:]
        products = np.stack([loadings[i] * loadings[j] for i, j in _pairs(len(loadings))])
        return cls(both[0], loadings, products)


def _pairs(rank: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(rank) for j in range(i, rank)]


def _moments(votes: Votes, seen: _Projected, embeddings: Array, covariances: Array) -> tuple[Array, Array]:
    """Mean and variance [n] of each x.(theta + U a_i) under q; a logit is beta_i times that."""
    mean, variance = seen.margins.copy(), np.zeros_like(seen.margins)
    for m, u in zip(embeddings.T.astype(np.float32), seen.loadings, strict=True):
        mean += m[votes.worker] * u
    covariance = covariances.astype(np.float32)
    for (i, j), product in zip(_pairs(len(seen.loadings)), seen.products, strict=True):
        entry = covariance[:, i, j] if i == j else 2 * covariance[:, i, j]
        variance += entry[votes.worker] * product
    return mean, np.maximum(variance, 0)


def _beta(votes: Votes, log_reliability: Array) -> Array:
    return np.asarray(np.exp(log_reliability).astype(np.float32)[votes.worker])


def _bound_curvature(square: Array) -> tuple[Array, Array]:
    """xi [n] of E z^2 [n], and 2 lambda(xi) = tanh(xi / 2) / (2 xi), the curvature of the quadratic bound."""
    xi = np.sqrt(square + np.float32(1e-8))
    return xi, np.tanh(0.5 * xi) / (2 * xi)


def _bound(
    votes: Votes, seen: _Projected, workers: _Workers, moments: tuple[Array, Array], variance: float
) -> tuple[float, Array]:
    """The bound on minus the log marginal likelihood, up to a constant, and its gradient by the logits [r + 1, n].

    The workers' posteriors are held, as their derivatives vanish at their optimum.
    """
    beta, half = _beta(votes, workers.log_reliability), votes.y - np.float32(0.5)
    mean = beta * moments[0]
    xi, curvature = _bound_curvature(mean**2 + beta**2 * moments[1])
    fit = votes.weighted(log_loss(xi, 0.5) - half * mean).sum(dtype=np.float64)
    trace = np.einsum("irr->i", workers.covariance)
    divergence = 0.5 * (trace + (workers.mean**2).sum(axis=1) - np.linalg.slogdet(workers.covariance)[1]).sum()
    prior = 0.5 * (workers.log_reliability**2).sum() / variance
    slope, weight = votes.weighted(beta * (curvature * mean - half)), votes.weighted(curvature * beta**2)
    pull = np.empty((len(seen.loadings) + 1, len(votes)), np.float32)
    pull[0] = slope
    covariance = workers.covariance.astype(np.float32)
    for i, m in enumerate(workers.mean.T.astype(np.float32)):
        spread = sum(covariance[:, i, j][votes.worker] * u for j, u in enumerate(seen.loadings))
        pull[i + 1] = slope * m[votes.worker] + weight * spread
    return float(fit + divergence + prior), pull


def _sweeps(votes: Votes, seen: _Projected, workers: _Workers, sweeps: int) -> tuple[Array, Array]:
    """Update q(a_i) of `workers` in place, each time in closed form given the bound (so the bound falls), and the slopes
    by log beta_i.

    Returns:
        The moments under the updated posteriors, as `_moments` gives them.
    """
    r = len(seen.loadings)
    beta = _beta(votes, workers.log_reliability)
    square, slack = beta**2, votes.weighted((votes.y - np.float32(0.5)) * beta)
    mean, spread = _moments(votes, seen, workers.mean, workers.covariance)
    for _ in range(sweeps):
        weight = votes.weighted(_bound_curvature(square * (mean**2 + spread))[1] * square)
        target = slack - weight * seen.margins
        information = np.empty((votes.n_workers, r, r))
        for (i, j), product in zip(_pairs(r), seen.products, strict=True):
            information[:, i, j] = information[:, j, i] = votes.sum_by_worker(weight * product)
        information += np.eye(r)
        slope = np.stack([votes.sum_by_worker(target * u) for u in seen.loadings], axis=1)
        workers.covariance[:] = np.linalg.inv(information)
        workers.mean[:] = (workers.covariance @ slope[:, :, None])[:, :, 0]
        mean, spread = _moments(votes, seen, workers.mean, workers.covariance)
    second = weight * (mean**2 + spread)
    workers.slopes[0][:], workers.slopes[1][:] = votes.sum_by_worker(slack * mean - second), votes.sum_by_worker(second)
    return mean, spread


def _signs(columns: Array) -> Array:
    """The sign of each column's largest entry, [r]."""
    return np.where(columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])] < 0, -1.0, 1.0)
