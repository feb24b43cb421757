"""VPL: a latent variable of each worker, inferred from their votes by an encoder (Poddar et al. 2024, arXiv 2408.10075).

The paper's: an encoder reads a worker's votes, each pair by a small network, the set by self-attention and its mean, and
returns q(z | votes) = N(mean, variance); a decoder gives the reward of a response under z; both are trained on the evidence
lower bound, the log-likelihood of votes under z drawn from q less a weight times KL(q || N(0, I)). New workers are encoded.

Adapted: the decoder makes the weights of a reward that is linear in the frozen features, theta + g(z) with a network g; a
network of features and z would need more than the difference of features that a vote is, which also is what the encoder
reads of a pair. theta starts at the pooled reward of the same votes, as theirs does at a trained language model, and keeps that reward's prior.
The KL's weight is constant. Predictions are made at the mean of q, from all votes of a worker up to CONTEXT; no votes are z = 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.descent import adam, losses
from benchmarks.peers.pooled import common_reward
from coterie.discovery import Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array

RATE, DECAY = 0.02, 0.01
_WORKERS, _SET = 64, 16  # of a batch, and votes drawn of each of them, as context and again as targets
CONTEXT = 64  # votes of a worker that are encoded to predict
_AT_A_TIME = 256  # workers
_HIDDEN, LATENT = 32, 8


class _Network(nn.Module):  # type: ignore[misc]
    def __init__(self, theta: Array) -> None:
        super().__init__()
        d = len(theta)
        self.pair = nn.Sequential(
            nn.Linear(d, _HIDDEN), nn.LeakyReLU(0.2), nn.Linear(_HIDDEN, _HIDDEN), nn.LeakyReLU(0.2)
        )
        self.query, self.key, self.value = (nn.Linear(_HIDDEN, _HIDDEN) for _ in range(3))
        self.mean, self.log_variance = nn.Linear(_HIDDEN, LATENT), nn.Linear(_HIDDEN, LATENT)
        self.theta = nn.Parameter(torch.from_numpy(theta.copy()))
        self.taste = nn.Sequential(nn.Linear(LATENT, _HIDDEN), nn.LeakyReLU(0.2), nn.Linear(_HIDDEN, d, bias=False))

    def encode(self, pairs: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [b, latent] of q for pairs [b, c, d] where `given` [b, c]; one of a row at least."""
        read = self.pair(pairs)
        scores = self.query(read) @ self.key(read).transpose(1, 2) / _HIDDEN**0.5
        attended = torch.softmax(scores.masked_fill(~given[:, None, :], -torch.inf), dim=2) @ self.value(read)
        weight = given.float() / given.sum(dim=1, keepdim=True)
        of_set = (weight[:, :, None] * attended).sum(dim=1)
        return self.mean(of_set), self.log_variance(of_set)

    def decode(self, z: Tensor) -> Tensor:
        """Weights [b, d] of the rewards under z [b, latent]."""
        weights: Tensor = self.theta + self.taste(z)
        return weights


class _FittedVpl(LinearReward):
    def __init__(self, weights: Array, network: _Network) -> None:
        super().__init__(weights)
        self.network = network

    def adapt(self, shots: Votes) -> Reward:
        """The rewards under the latent variables that the shots are encoded as."""
        return LinearReward(_rewards(self.network, shots))


def _rewards(network: _Network, votes: Votes) -> Array:
    """Weights [n_workers, d] at the mean of each worker's q."""
    z = torch.zeros(votes.n_workers, LATENT)
    counts, starts, pairs = votes.counts, np.cumsum(votes.counts) - votes.counts, _oriented(votes)
    voting = np.flatnonzero(votes.present)
    with torch.no_grad():
        for first in range(0, len(voting), _AT_A_TIME):
            workers = voting[first : first + _AT_A_TIME]
            width = min(CONTEXT, int(counts[workers].max()))
            spread = np.maximum(counts[workers], width)[:, None] * np.arange(width) // width  # evenly over all of them
            given = spread < counts[workers][:, None]
            rows = starts[workers][:, None] + np.where(given, spread, 0)
            z[workers] = network.encode(pairs[rows], torch.from_numpy(given))[0]
        return np.asarray(network.decode(z))


def _oriented(votes: Votes) -> Tensor:
    """What the encoder reads, [n, d]: the difference towards the preferred response; nothing of a tie."""
    return torch.from_numpy(votes.x * (2 * votes.y - 1)[:, None])


class Vpl:
    """Variational latent users."""

    name = "VPL"
    source = "arXiv 2408.10075"
    grid: tuple[Settings, ...] = tuple({"steps": n, "kl": w} for n in (60, 240) for w in (0.001, 0.03, 0.3))

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedVpl:
        """Fit to training votes."""
        steps, kl_weight = settings["steps"], settings["kl"]
        common = common_reward(train, seed)
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = _Network(common.theta_)
            nn.init.normal_(network.taste[2].weight, std=0.01)
            x, y, pairs = torch.from_numpy(train.x), torch.from_numpy(train.y), _oriented(train)
            voting, counts = np.flatnonzero(train.present), train.counts
            starts = np.cumsum(counts) - counts

            def loss() -> Tensor:
                workers = rng.choice(voting, min(_WORKERS, len(voting)), replace=False)
                context, targets = (
                    starts[workers][:, None]
                    + (rng.random((len(workers), _SET)) * counts[workers][:, None]).astype(np.intp)
                    for _ in range(2)
                )
                sizes = rng.integers(1, np.minimum(counts[workers], _SET) + 1)
                given = torch.from_numpy(np.arange(_SET) < sizes[:, None])
                mean, log_variance = network.encode(pairs[context], given)
                z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape)
                logits = torch.einsum("bcd,bd->bc", x[targets], network.decode(z))
                divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
                prior = common.precision / 2 * network.theta.square().sum() / len(train)
                return losses(logits, y[targets]).mean() + kl_weight * divergence + prior

            adam(loss, network.parameters(), RATE, steps, DECAY)
        return _FittedVpl(_rewards(network, train), network)
