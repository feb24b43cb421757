"""A model for each worker: logistic ridge regression on nobody's votes but their own, or fine-tuned from the common reward.

The annotator-specific models of Davani, Diaz and Prabhakaran (2022, TACL 10, "Dealing with disagreements"): "ensemble" for
the former. On frozen features there is nothing to share but the weights: fine-tuning is a ridge penalty around the weights
of the pooled reward in place of around zero. Which of the two it is, and how strong, is tuned.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.pooled import common_reward
from coterie.discovery import Votes
from coterie.discovery.logistic import log_loss, residual
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array


def ridge(votes: Votes, center: Array, precision: float, max_iter: int = 200) -> Array:
    """Each worker's weights, [n_workers, d]: the logistic ridge regression on their votes around center [d].

    The workers' problems are separate, and one run of L-BFGS solves them together.
    """
    shape = (votes.n_workers, votes.n_features)

    def objective(flat: Array) -> tuple[float, Array]:
        delta = flat.reshape(shape)
        logits = common + np.einsum("nd,nd->n", votes.x, delta.astype(np.float32)[votes.worker])
        value = votes.weighted(log_loss(logits, votes.y)).sum(dtype=np.float64)
        pull = votes.gradients_by_worker(votes.weighted(residual(logits, votes.y)))
        return value + precision / 2 * float((delta**2).sum()), (precision * delta - pull).ravel()

    common = votes.x @ center.astype(np.float32)
    options = {"maxiter": max_iter, "gtol": 1e-3, "maxcor": 10}
    found = minimize(objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(center + found.x.reshape(shape))


class _FittedOwn(LinearReward):
    def __init__(self, weights: Array, center: Array, precision: float) -> None:
        super().__init__(weights)
        self.center = center
        self.precision = precision

    def adapt(self, shots: Votes) -> Reward:
        """Their own models, from the shots."""
        return LinearReward(ridge(shots, self.center, self.precision))


class Own:
    """Per-worker models."""

    name = "per-worker models"
    source = "Davani et al. 2022"
    grid: tuple[Settings, ...] = (
        *({"start": "zero", "precision": p} for p in (10.0, 100.0)),
        *({"start": "pooled", "precision": p} for p in (10.0, 30.0, 100.0, 300.0)),
    )

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedOwn:
        """Fit to training votes."""
        center, precision = np.zeros(train.n_features), settings["precision"]
        if settings["start"] == "pooled":
            center = common_reward(train, seed).theta_.astype(np.float64)
        return _FittedOwn(ridge(train, center, precision), center, precision)
