"""LoRe: each worker weighs a few basis rewards that all share (Bose et al. 2025, arXiv 2504.14439).

The paper's: r_i = softmax(w_i) . R(x), a low-rank basis R that is linear in a frozen embedding, learned with all w_i at once
by Adam on the Bradley-Terry likelihood; a penalty on the distance of every basis reward from a reference reward; for new
workers the basis stands and w is learned from their shots, without a prior, by 500 steps of Adam at 0.1.

Adapted: the reference is the head of a reward model that was trained elsewhere; here it is the pooled reward of the same
votes. Adam makes 150 steps whose rate falls, in place of 1,000 at one rate, on features of mean square one (L-BFGS would end
at the saddle where all basis rewards are alike); for new workers its 500 steps are iterations of L-BFGS. Workers start from
equal weights, and a worker without votes has the mean weights of the others: the paper's random start would be the
prediction for a stranger.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.descent import VoteTensors, adam, minimise
from benchmarks.peers.pooled import common_reward
from coterie.discovery import Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array

RATE, STEPS, SHOT_STEPS = 0.1, 150, 50
_START = 0.1  # standard deviation of the basis where it starts, around zero


class FittedSimplex(LinearReward):
    """Rewards between vertices: each worker's is a convex combination of columns.

    Args:
        weights: [n_workers, d].
        vertices: [d, K].
        mean: [K], the shares of a stranger.
    """

    def __init__(self, weights: Array, vertices: Array, mean: Array) -> None:
        super().__init__(weights)
        self.vertices = vertices
        self.mean = mean

    def adapt(self, shots: Votes) -> Reward:
        """The vertices as they are, and new workers' shares of them from their shots."""
        return LinearReward(place(shots, self.vertices, self.mean) @ self.vertices.T)


def place(shots: Votes, vertices: Array, mean: Array) -> Array:
    """Shares [n_workers, K] of the vertices [d, K] that explain the shots, from the shares of a stranger [K]."""
    start = torch.log(torch.from_numpy(mean)).clamp(min=-10).repeat(shots.n_workers, 1)
    if not len(shots):
        return np.asarray(torch.softmax(start, dim=1))
    logits, tensors = start.requires_grad_(), VoteTensors.of(shots)
    rewards = tensors.x @ torch.from_numpy(vertices)

    def loss() -> torch.Tensor:
        return tensors.loss((rewards * torch.softmax(logits, dim=1)[tensors.worker]).sum(dim=1)) / len(shots)

    minimise(loss, [logits], SHOT_STEPS)
    return np.asarray(torch.softmax(logits.detach(), dim=1))


class LoRe:
    """Low-rank reward basis with weights on the simplex."""

    name = "LoRe"
    source = "arXiv 2504.14439"
    grid: tuple[Settings, ...] = tuple({"bases": k, "pull": p} for k in (2, 5) for p in (100.0, 1e3, 1e4))

    def fit(self, train: Votes, settings: Settings, seed: int) -> FittedSimplex:
        """Fit to training votes."""
        size, pull = settings["bases"], settings["pull"]
        reference = torch.from_numpy(common_reward(train, seed).theta_)
        random, tensors = torch.Generator().manual_seed(seed), VoteTensors.of(train)
        basis = (_START * torch.randn(train.n_features, size, generator=random)).requires_grad_()
        logits = torch.zeros(train.n_workers, size, requires_grad=True)

        def loss() -> torch.Tensor:
            margin = ((tensors.x @ basis) * torch.softmax(logits, dim=1)[tensors.worker]).sum(dim=1)
            penalty = pull / 2 * (basis - reference[:, None]).square().sum()
            return (tensors.loss(margin) + penalty) / len(train)

        adam(loss, [basis, logits], RATE, STEPS)
        shares, vertices = torch.softmax(logits.detach(), dim=1).numpy(), basis.detach().numpy()
        mean = shares[train.present].mean(axis=0)
        shares[~train.present] = mean
        return FittedSimplex(shares @ vertices.T, vertices, mean)
