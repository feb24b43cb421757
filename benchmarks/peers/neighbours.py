"""Nearest neighbours in worker space: people who voted alike lend each other their tastes.

Collaborative filtering by users (Resnick et al. 1994, CSCW, "GroupLens"; the weights of Herlocker et al. 1999, SIGIR): what
an item is worth to somebody is the mean of what the most similar users say, weighted by similarity, around what everybody
says. Theirs are ratings of the same items; workers here hardly share one, and so both their similarity and their opinion are
those of a reward fitted to their votes alone: the ridge regression around the pooled reward (peers/own.py).
Similarity is the correlation of what two such rewards say of the training pairs. A worker is their own first neighbour.
"""

from __future__ import annotations

import numpy as np

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.own import ridge
from benchmarks.peers.pooled import common_reward
from coterie.discovery import Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array

_TINY = 1e-12


class _FittedNeighbours(LinearReward):
    """Everybody's taste, their deviation from the pooled reward, and how much it is heard.

    Args:
        weights: [n_workers, d].
        center: [d], the pooled reward.
        tastes: [n_workers, d], deviations from it.
        counts: [n_workers] votes.
        metric: [d, d], second moments of the training pairs.
        neighbours: how many are asked.
        precision: of the ridge.
    """

    def __init__(
        self, center: Array, tastes: Array, counts: Array, metric: Array, neighbours: int, precision: float
    ) -> None:
        self.center = center
        self.tastes = tastes
        self.counts = counts
        self.metric = metric
        self.neighbours = neighbours
        self.precision = precision
        super().__init__(self._asked(tastes, counts, known=True))

    def _asked(self, tastes: Array, counts: Array, known: bool) -> Array:
        """Rewards [n, d] of people with these tastes [n, d] and numbers of votes [n]; `known` people are the neighbours
        themselves and do not ask themselves twice."""

        def directed(tastes: Array) -> Array:
            length = np.sqrt(np.einsum("nd,nd->n", tastes @ self.metric, tastes))
            return np.asarray(tastes / np.maximum(length, _TINY)[:, None])

        similarity = np.maximum(directed(tastes) @ self.metric @ directed(self.tastes).T, 0)
        if known:
            np.fill_diagonal(similarity, 0)
        asked = min(self.neighbours, similarity.shape[1])
        least = -np.partition(-similarity, asked - 1, axis=1)[:, asked - 1 : asked]
        heard = np.where(similarity >= np.maximum(least, _TINY), similarity, 0) * self.counts
        own = counts.astype(np.float64)[:, None]
        total = own + heard.sum(axis=1, keepdims=True)
        return np.asarray(self.center + (own * tastes + heard @ self.tastes) / np.maximum(total, _TINY))

    def adapt(self, shots: Votes) -> Reward:
        """New workers' tastes from their shots, and those of the neighbours that they show."""
        tastes = ridge(shots, self.center, self.precision) - self.center
        return LinearReward(self._asked(tastes, shots.counts, known=False))


class Neighbours:
    """User-based collaborative filtering."""

    name = "nearest neighbours"
    source = "Resnick et al. 1994"
    grid: tuple[Settings, ...] = tuple({"neighbours": k, "precision": p} for k in (5, 20, 80) for p in (10.0, 100.0))

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedNeighbours:
        """Fit to training votes."""
        precision = settings["precision"]
        center = common_reward(train, seed).theta_.astype(np.float64)
        tastes = ridge(train, center, precision) - center
        metric = (train.x.T @ train.x).astype(np.float64) / len(train)
        return _FittedNeighbours(center, tastes, train.counts, metric, settings["neighbours"], precision)
