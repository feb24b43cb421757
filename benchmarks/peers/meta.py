"""MRM: base rewards and a start from which one gradient step reaches a worker (Cai et al. 2026, arXiv 2601.18731).

The paper's: r_i = softmax(w_i) . R(x) with K base rewards; w_i is a gradient step from a start w_0 that all share, on the
mean Bradley-Terry loss of the worker's support votes; R and w_0 are learned so that the loss on the worker's other, query
votes is small after that step (MAML; Finn et al. 2017, arXiv 1703.03400), through the step's own derivative. The robust
personalisation objective weighs the workers of a batch by sigmoid((loss - its upper quantile) / GAMMA). New workers, and
those of training, take the same step on all the votes that they have.

Adapted: base rewards are linear in the frozen features (theirs are linear layers on a frozen embedding), start at the pooled
reward of the same votes with some noise, and a ridge penalty holds them near it, without which small data are overfitted.
Half of a worker's votes are support in each batch (a share that the paper tunes per data set).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.descent import VoteTensors, adam, losses
from benchmarks.peers.pooled import common_reward
from coterie.discovery import Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array

RATE, STEPS = 0.05, 100
TAIL, GAMMA = 0.5, 0.5  # as published
_BASES, _WORKERS, _MOST = 4, 64, 32  # workers of a batch, and votes of each at most
_NOISE = 0.1


class _FittedMeta(LinearReward):
    def __init__(self, weights: Array, bases: Array, start: Array, rate: float) -> None:
        super().__init__(weights)
        self.bases = bases
        self.start = start
        self.rate = rate

    def adapt(self, shots: Votes) -> Reward:
        """One step from the start, on the shots."""
        return LinearReward(_stepped(shots, torch.from_numpy(self.bases), torch.from_numpy(self.start), self.rate))


def _step(rewards: Tensor, y: Tensor, worker: Tensor, start: Tensor, rate: float, n_workers: int) -> Tensor:
    """w [n_workers, K] after a gradient step on each worker's mean loss; of their votes: base rewards [n, K], y, worker [n]."""
    count = torch.bincount(worker, minlength=n_workers).clamp(min=1)
    own = start.expand(n_workers, -1)
    if not own.requires_grad:
        own = own.clone().requires_grad_()
    loss = (losses(_margins(rewards, own, worker), y) / count[worker]).sum()
    (gradient,) = torch.autograd.grad(loss, own, create_graph=start.requires_grad)
    return own - rate * gradient


def _margins(rewards: Tensor, own: Tensor, worker: Tensor) -> Tensor:
    return (rewards * torch.softmax(own, dim=1)[worker]).sum(dim=1)


def _stepped(votes: Votes, bases: Tensor, start: Tensor, rate: float) -> Array:
    """Weights [n_workers, d] after the step on all votes; a worker without any stays at the start."""
    tensors = VoteTensors.of(votes)
    own = _step(tensors.x @ bases, tensors.y, tensors.worker, start, rate, votes.n_workers).detach()
    return np.asarray(torch.softmax(own, dim=1) @ bases.T)


class Meta:
    """Meta-learned rewards with fast adaptation."""

    name = "MRM"
    source = "arXiv 2601.18731"
    grid: tuple[Settings, ...] = tuple({"rate": r, "precision": p} for r in (10.0, 100.0) for p in (10.0, 300.0, 1e4))

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedMeta:
        """Fit to training votes."""
        rate, precision = settings["rate"], settings["precision"]
        common = torch.from_numpy(common_reward(train, seed).theta_)[:, None]
        rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        bases = (common + _NOISE * torch.randn(len(common), _BASES, generator=random)).requires_grad_()
        start = torch.zeros(_BASES, requires_grad=True)
        x, y, voting = torch.from_numpy(train.x), torch.from_numpy(train.y), np.flatnonzero(train.present)

        def loss() -> Tensor:
            workers = rng.choice(voting, min(_WORKERS, len(voting)), replace=False)
            (support, of_support), (query, of_query) = _halves(train, workers, rng)
            own = _step(x[support] @ bases, y[support], of_support, start, rate, len(workers))
            told = losses(_margins(x[query] @ bases, own, of_query), y[query])
            each = torch.zeros(len(workers)).index_add(0, of_query, told) / torch.bincount(of_query)
            threshold = torch.sort(each.detach()).values[int((1 - TAIL) * len(each))]
            weight = torch.sigmoid((each - threshold) / GAMMA)
            return (weight * each).mean() + precision / 2 * (bases - common).square().sum() / len(train)

        adam(loss, [bases, start], RATE, STEPS)
        bases, start = bases.detach(), start.detach()
        return _FittedMeta(_stepped(train, bases, start, rate), bases.numpy(), start.numpy(), rate)


def _halves(
    votes: Votes, workers: Array, rng: np.random.Generator
) -> tuple[tuple[Array, Tensor], tuple[Array, Tensor]]:
    """Support and query rows of some workers, and whose they are (numbers within `workers`); of a single vote, both."""
    counts, starts = votes.counts[workers], (np.cumsum(votes.counts) - votes.counts)[workers]
    owner = np.repeat(np.arange(len(workers)), counts)
    place = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    rows = (starts[owner] + place)[np.lexsort((rng.random(len(owner)), owner))]  # each worker's in random order
    used = np.minimum(counts, _MOST)[owner]
    support = place < (used + 1) // 2
    query = (place < used) & (~support | (used == 1))
    return tuple((rows[half], torch.from_numpy(owner[half])) for half in (support, query))  # type: ignore[return-value]
