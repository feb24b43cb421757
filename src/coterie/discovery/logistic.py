"""Numerics that the members share: logistic loss in float32, Newton steps with a cap, each worker's reliability.

Why float32, a cap and Newton rather than L-BFGS: docs/method, section 4. A gradient is compared with the tolerance as
in scikit-learn's LogisticRegression: the largest component of the gradient of the *mean* penalised log-loss.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from coterie.discovery.votes import CHUNK_ROWS, Array, Votes, VoteSet, in_threads

LOGIT_CAP = 4.0  # largest change of a logit in one Newton step
_ROWS = 2048  # rows of x that are scaled at a time: they stay in the cache


def log_loss(logits: Array, y: Array | float) -> Array:
    """-y log p - (1 - y) log(1 - p) with p = sigmoid(logits), elementwise; y is 1, or .5 for a tie."""
    loss: Array = np.maximum(logits, 0) - y * logits + np.log(1 + np.exp(-np.abs(logits)))
    return loss


def residual(logits: Array, y: Array) -> Array:
    """y - sigmoid(logits); tanh is the fastest overflow-free way to it."""
    return y - (0.5 + 0.5 * np.tanh(0.5 * logits))


def curvature(logits: Array) -> Array:
    """p (1 - p)."""
    return 0.25 - 0.25 * np.tanh(0.5 * logits) ** 2


def gram(x: Array, weights: Array) -> Array:
    """sum_j weights_j x_j x_j^T, [d, d] float64; weights [n] are not negative."""
    root = np.sqrt(weights, dtype=np.float32)

    def part(first: int, end: int) -> Array:
        total = np.zeros((x.shape[1], x.shape[1]))
        for start in range(first, end, _ROWS):
            rows = slice(start, min(start + _ROWS, end))
            scaled = x[rows] * root[rows, None]
            total += scaled.T @ scaled
        return total

    firsts = range(0, len(x), CHUNK_ROWS)
    if len(firsts) <= 2:
        return part(0, len(x))
    return np.asarray(sum(in_threads(lambda first: part(first, min(first + CHUNK_ROWS, len(x))), firsts)))


def mean_hessian(votes: VoteSet, theta: Array) -> Array:
    """The Hessian of the mean log-loss at theta [d], estimated on the votes' probe."""
    probe = votes.probe
    return gram(probe.x, probe.weighted(curvature(probe.x @ theta.astype(np.float32)))) / len(votes)


def newton_step(x: Array, weights: Array, scale: Array, gradient: Array, precision: float) -> tuple[Array, Array]:
    """One step uphill, and the Hessian that it is taken with: sum_j weights_j x_j x_j^T + precision I.

    The rows are a probe's (sub-sampled Newton: the gradient is exact, so that only the rate of convergence feels it). The
    step is shortened until no logit scale_j x_j.step of them changes by more than LOGIT_CAP.

    Args:
        x: [n, d].
        weights: [n], curvatures; rows of weight 0 cost nothing.
        scale: [n], what multiplies x_j.theta in a logit.
        gradient: [d].
        precision: of the prior.
    """
    rows = weights > 0
    if not rows.all():
        x, weights, scale = x[rows], weights[rows], scale[rows]
    hessian = gram(x, weights)
    hessian[np.diag_indices_from(hessian)] += precision
    step: Array = cho_solve(cho_factor(hessian), gradient)
    largest = float(np.abs(scale * (x @ step.astype(np.float32))).max(initial=0))
    return step * min(1.0, LOGIT_CAP / max(largest, 1e-12)), hessian


def reliability_slopes(log_reliability: Array, margins: Array, weights: Array, votes: Votes) -> tuple[Array, Array]:
    """Gradient and Gauss-Newton curvature of the log-likelihood by each log beta_i, two [n_workers].

    Args:
        log_reliability: [n_workers].
        margins: [K, n], theta_k.x_j.
        weights: [n_workers, K], how much of a worker belongs to each margin.
        votes: of these workers.
    """
    beta = np.exp(log_reliability).astype(np.float32)[votes.worker]
    gradient, hessian = np.zeros(votes.n_workers), np.zeros(votes.n_workers)
    for k, margin in enumerate(margins):
        logits = beta * margin
        gradient += weights[:, k] * votes.sum_by_worker(votes.weighted(residual(logits, votes.y) * logits))
        hessian += weights[:, k] * votes.sum_by_worker(votes.weighted(curvature(logits) * logits**2))
    return gradient, hessian


def reliability_step(
    log_reliability: Array,
    slopes: tuple[Array, Array],
    weights: Array,
    present: Array,
    variance: float,
    centered: bool = True,
) -> tuple[Array, float]:
    """One step of log beta_i under log beta_i ~ N(0, variance).

    The reliabilities of a coterie and the length of its theta share one scale. `centered` leaves that scale to theta: the
    step has mean 0 over each coterie. Alternating without it crawls along the shared direction.

    Args:
        log_reliability: [n_workers].
        slopes: of `reliability_slopes`.
        weights: [n_workers, K], how much of a worker belongs to each coterie.
        present: [n_workers], who has votes.

    Returns:
        The new log_reliability, and the largest component of the (constrained) gradient of the log posterior.
    """
    gradient = np.where(present, slopes[0] - log_reliability / variance, 0.0)
    hessian = slopes[1] + 1 / variance
    if centered:
        gradient[present] -= multipliers(gradient[present], hessian[present], weights[present])
    updated = np.clip(log_reliability + np.clip(gradient / hessian, -1, 1), -4, 4)
    if centered:
        updated[present] -= updated[present].mean()
    return updated, float(np.abs(gradient).max())


def multipliers(gradient: Array, hessian: Array, weights: Array) -> Array:
    """What to subtract from a gradient [n] so that the step gradient / hessian sums to 0 under each of K weights [n, K].

    These are the constraints' Lagrange multipliers, spread over the n components by their weights.
    """
    scaled = weights / hessian[:, None]
    if weights.shape[1] == 1:
        share = float(scaled[:, 0] @ gradient) / max(float(scaled[:, 0] @ weights[:, 0]), 1e-300)
        return np.asarray(share * weights[:, 0])
    return np.asarray(weights @ np.linalg.lstsq(weights.T @ scaled, scaled.T @ gradient, rcond=1e-9)[0])
