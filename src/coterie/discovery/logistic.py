"""Numerics that the members share: logistic loss in float32, Newton steps with a cap, each worker's reliability.

Why float32, a cap and Newton rather than L-BFGS: docs/method, section 4. A gradient is compared with the tolerance as
in scikit-learn's LogisticRegression: the largest component of the gradient of the *mean* penalised log-loss.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from coterie.discovery.votes import Array, Votes

LOGIT_CAP = 4.0  # largest change of a logit in one Newton step
_ROWS = 2048  # rows of x that are scaled at a time: they stay in the cache
_HESSIAN_ROWS = 50_000  # that make a good Hessian; at least 200 for each feature


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
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _ROWS):
        scaled = x[start : start + _ROWS] * root[start : start + _ROWS, None]
        total += scaled.T @ scaled
    return total


def mean_hessian(x: Array, theta: Array) -> Array:
    """The Hessian of the mean log-loss at theta [d], from an even sample of the rows where there are many."""
    part = x[:: _stride(len(x), x.shape[1])]
    return gram(part, curvature(part @ theta.astype(np.float32))) / len(part)


def _stride(rows: int, features: int) -> int:
    return max(1, rows // max(_HESSIAN_ROWS, 200 * features))


def newton_step(x: Array, weights: Array, scale: Array, gradient: Array, precision: float) -> tuple[Array, Array]:
    """One step uphill, and the Hessian that it is taken with: sum_j weights_j x_j x_j^T + precision I.

    Of many rows an even sample makes up the Hessian (sub-sampled Newton): the gradient is exact, so that only the rate of
    convergence feels it. The step is shortened until no logit scale_j x_j.step of the sample changes by more than
    LOGIT_CAP.

    Args:
        x: [n, d].
        weights: [n], curvatures; rows of weight 0 cost nothing.
        scale: [n], what multiplies x_j.theta in a logit.
        gradient: [d].
        precision: of the prior.
    """
    rows = np.flatnonzero(weights)
    stride = _stride(len(rows), x.shape[1])
    rows = rows[::stride]
    part = x[rows]
    hessian = stride * gram(part, weights[rows])
    hessian[np.diag_indices_from(hessian)] += precision
    step: Array = cho_solve(cho_factor(hessian), gradient)
    largest = float(np.abs(scale[rows] * (part @ step.astype(np.float32))).max(initial=0))
    return step * min(1.0, LOGIT_CAP / max(largest, 1e-12)), hessian


def reliability_step(
    log_reliability: Array, margins: Array, weights: Array, votes: Votes, variance: float, centered: bool
) -> tuple[Array, float]:
    """One Gauss-Newton step of log beta_i under log beta_i ~ N(0, variance).

    The reliabilities of a coterie and the length of its theta share one scale. `centered` leaves that scale to theta: the
    step has mean 0 over each coterie. Alternating without it crawls along the shared direction.

    Args:
        log_reliability: [n_workers].
        margins: [K, n], theta_k.x_j.
        weights: [n_workers, K], how much of a worker belongs to each margin.

    Returns:
        The new log_reliability, and the largest component of the (constrained) gradient of the log posterior.
    """
    beta = np.exp(log_reliability).astype(np.float32)[votes.worker]
    gradient = -log_reliability / variance
    hessian = np.full(votes.n_workers, 1 / variance)
    for k, margin in enumerate(margins):
        logits = beta * margin
        gradient = gradient + weights[:, k] * votes.sum_by_worker(residual(logits, votes.y) * logits)
        hessian = hessian + weights[:, k] * votes.sum_by_worker(curvature(logits) * logits**2)
    present = votes.present
    gradient[~present] = 0.0
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
    return np.asarray(weights @ np.linalg.lstsq(weights.T @ scaled, scaled.T @ gradient, rcond=1e-9)[0])
