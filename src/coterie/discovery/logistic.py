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
    """sum_j weights_j x_j x_j^T, [d, d] float64; weights [n] are not negative, rows of weight zero cost nothing."""
    root = np.sqrt(weights, dtype=np.float32)
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _ROWS):
        rows, scale = x[start : start + _ROWS], root[start : start + _ROWS]
        if not scale.all():
            rows, scale = rows[scale > 0], scale[scale > 0]
        scaled = rows * scale[:, None]
        total += scaled.T @ scaled
    return total


def newton_step(hessian: Array, gradient: Array, x: Array, scale: Array) -> Array:
    """Solve for the step uphill and shorten it until no logit scale_j x_j.step changes by more than LOGIT_CAP."""
    step: Array = cho_solve(cho_factor(hessian), gradient)
    largest = float(np.abs(scale * (x @ step.astype(np.float32))).max(initial=0))
    return step * min(1.0, LOGIT_CAP / max(largest, 1e-12))


def reliability_step(
    log_reliability: Array, margins: Array, weights: Array, votes: Votes, variance: float, centered: bool
) -> tuple[Array, float]:
    """One Gauss-Newton step of log beta_i under log beta_i ~ N(0, variance).

    Reliability and the length of theta share one scale. `centered` fixes it: log beta has mean 0 over the workers who
    vote. Alternating without it crawls along the shared direction.

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
        gradient[present] -= multiplier(gradient[present], hessian[present])
    updated = np.clip(log_reliability + np.clip(gradient / hessian, -1, 1), -4, 4)
    if centered:
        updated[present] -= updated[present].mean()
    return updated, float(np.abs(gradient).max())


def multiplier(gradient: Array, hessian: Array) -> float:
    """The Lagrange multiplier that makes the components of the step (gradient - multiplier) / hessian sum to 0."""
    return float((gradient / hessian).sum() / (1 / hessian).sum())
