"""Where to start: the directions in which workers differ (docs/method, section 4)."""

from __future__ import annotations

import numpy as np

from coterie.discovery.logistic import mean_hessian, residual
from coterie.discovery.votes import Array, Votes


def taste_directions(votes: Votes, theta: Array, n_directions: int, precision: float) -> tuple[Array, Array, Array]:
    """Estimate the taste of every worker who votes, and the leading directions in which they differ from theta [d].

    A taste is one Newton step from theta with the pooled Hessian, under the prior N(0, I / precision), and without its
    part along theta: there, workers differ by reliability, and a start that saw it would take carelessness for taste.
    Everybody starts equally reliable, for pooled + reliability takes another taste for carelessness.

    Returns:
        Tastes [voting workers, d], orthonormal directions [d, n_directions], and the tastes' standard deviation along
        each [n_directions], workers weighted by their comparisons.
    """
    logits = votes.x @ theta.astype(np.float32)
    gradients = votes.gradients_by_worker(votes.weighted(residual(logits, votes.y)))[votes.present]
    values, vectors = np.linalg.eigh(mean_hessian(votes, theta))
    counts = votes.counts[votes.present].astype(np.float64)
    tastes = (gradients @ vectors) / (counts[:, None] * np.maximum(values, 0) + precision) @ vectors.T
    along = theta / max(float(np.linalg.norm(theta)), 1e-12)
    tastes -= np.outer(tastes @ along, along)
    weighted = tastes * np.sqrt(counts / counts.sum())[:, None]
    variances, directions = np.linalg.eigh(weighted.T @ weighted)
    leading = slice(None, -n_directions - 1, -1)
    return tastes, directions[:, leading], np.sqrt(np.maximum(variances[leading], 0))
