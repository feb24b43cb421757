"""Comparators of coterie: methods that give each worker a reward, written anew from their papers behind one interface.

All of them see the same votes on the same frozen features and return logits; all choose among EFFORT candidates by the same
rule on the same item-disjoint splits of the training votes (`chosen`). coterie itself (peers/ours.py) has one candidate: it
selects inside, on splits made alike. The list is in peers/every.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from coterie.discovery.pooled import Reward
from coterie.discovery.selection import item_splits, mean_losses
from coterie.discovery.votes import Array, Votes

Settings = Mapping[str, Any]  # a candidate, in JSON's own types
EFFORT = 6  # candidates of each peer
SPLITS = 3  # as many as coterie's own selection makes


class Fitted(Protocol):
    """What a peer learned from training votes."""

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] that the chosen response is preferred, for the workers of the training votes, those included who had
        none there."""
        ...

    def losses(self, votes: Votes) -> Array:
        """Mean log-loss of each of these workers, [n_workers], NaN without votes, as Reward has it."""
        ...

    def adapt(self, shots: Votes) -> Reward:
        """A reward for new workers, numbered as in `shots`; who has no votes there is a stranger."""
        ...


class Peer(Protocol):
    """A method with its candidate settings.

    Attributes:
        name: in a table.
        source: where it is published.
        grid: candidates.
    """

    name: str
    source: str
    grid: tuple[Settings, ...]

    def fit(self, train: Votes, settings: Settings, seed: int) -> Fitted:
        """Fit to training votes; the same input gives the same output."""
        ...


class LinearReward(Reward):
    """Every worker's own reward, linear in the features.

    Args:
        weights: [n_workers, d].
    """

    def __init__(self, weights: Array) -> None:
        self.weights = weights

    def decision_function(self, votes: Votes) -> Array:
        """Logits [n] that the chosen response is preferred."""
        return np.asarray(np.einsum("nd,nd->n", votes.x, self.weights.astype(np.float32)[votes.worker]))


Splits = Sequence[tuple[Votes, Votes]]  # to fit on, and to judge on


def inner_splits(train: Votes, seed: int) -> Splits:
    """The item-disjoint splits of training votes on which peers are tuned; none where there is nothing to hold out."""
    return [(train.subset(~held), train.subset(held)) for held in item_splits(train, SPLITS, seed)[0]]


def chosen(peer: Peer, splits: Splits, seed: int) -> Settings:
    """The candidate of least held-out log-loss, macro over workers; the middle one where nothing is held out."""
    if len(peer.grid) == 1 or not splits:
        return peer.grid[len(peer.grid) // 2]

    def loss(settings: Settings) -> float:
        fits = [peer.fit(train, settings, seed) for train, _ in splits]
        return float(np.nanmean(mean_losses(cast(list[Reward], fits), [judge for _, judge in splits])))

    return min(peer.grid, key=loss)


def tuned(peer: Peer, train: Votes, seed: int) -> Fitted:
    """The peer under its best candidate, fitted to all training votes."""
    return peer.fit(train, chosen(peer, inner_splits(train, seed), seed), seed)
