"""PAL: each worker's ideal point lies between prototypes that all share (Chen et al. 2024, arXiv 2406.08469).

The paper's (model B): a learned projection f puts responses into a preference space, worker i's ideal point is the mean of K
prototypes with weights softmax(w_i), and the reward is the inner product of f(response) and the ideal point, which has
length one. For new workers projection and prototypes stand, and w is learned from the shots.

Adapted: a reward that is linear in frozen features needs a linear f, whose length takes the place of the learned scale; a
multilayer f and unit-length f(response) would need more than the difference of features that a vote is. Prototypes that
depend on the prompt, as the paper's do, would need the prompt's features, which cancel in that difference: they are points.
Ridge penalties on f and on all w_i (for new workers around a stranger's) stand for the decay of AdamW, and L-BFGS on all
votes for its epochs.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from benchmarks.peers import LinearReward, Settings
from benchmarks.peers.descent import VoteTensors, minimise
from coterie.discovery import Votes
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array

STEPS, SHOT_STEPS = 100, 50
DECAY = 1.0  # of the user weights
_SPACE = 16  # dimensions of the preference space


class _FittedIdeal(LinearReward):
    def __init__(self, weights: Array, projection: Array, prototypes: Array, mean: Array) -> None:
        super().__init__(weights)
        self.projection = projection
        self.prototypes = prototypes
        self.mean = mean

    def adapt(self, shots: Votes) -> Reward:
        """Projection and prototypes as they are, and new workers' ideal points from their shots."""
        projection, prototypes = torch.from_numpy(self.projection), torch.from_numpy(self.prototypes)
        stranger = torch.from_numpy(self.mean)
        logits = stranger.repeat(shots.n_workers, 1)
        if len(shots):
            tensors, logits = VoteTensors.of(shots), logits.requires_grad_()
            projected = tensors.x @ projection

            def loss() -> torch.Tensor:
                margins = _margins(projected, prototypes, logits, tensors.worker)
                penalty = DECAY / 2 * (logits - stranger).square().sum()
                return (tensors.loss(margins) + penalty) / len(shots)

            minimise(loss, [logits], SHOT_STEPS)
        return LinearReward((_ideal(prototypes, logits.detach()) @ projection.T).numpy())


def _ideal(prototypes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Ideal points [n_workers, p] of length one."""
    return normalize(torch.softmax(logits, dim=1) @ prototypes, dim=1)


def _margins(
    projected: torch.Tensor, prototypes: torch.Tensor, logits: torch.Tensor, worker: torch.Tensor
) -> torch.Tensor:
    return (projected * _ideal(prototypes, logits)[worker]).sum(dim=1)


class Pal:
    """Prototypes of ideal points."""

    name = "PAL"
    source = "arXiv 2406.08469"
    grid: tuple[Settings, ...] = tuple(
        {"prototypes": k, "precision": p} for k in (2, 5) for p in (100.0, 1000.0, 3000.0)
    )

    def fit(self, train: Votes, settings: Settings, seed: int) -> _FittedIdeal:
        """Fit to training votes."""
        size, precision = settings["prototypes"], settings["precision"]
        random, tensors = torch.Generator().manual_seed(seed), VoteTensors.of(train)
        projection = (torch.randn(train.n_features, _SPACE, generator=random) / train.n_features).requires_grad_()
        prototypes = torch.randn(size, _SPACE, generator=random).requires_grad_()
        logits = torch.randn(train.n_workers, size, generator=random).requires_grad_()

        def loss() -> torch.Tensor:
            margins = _margins(tensors.x @ projection, prototypes, logits, tensors.worker)
            penalty = precision / 2 * projection.square().sum() + DECAY / 2 * logits.square().sum()
            return (tensors.loss(margins) + penalty) / len(train)

        minimise(loss, [projection, prototypes, logits], STEPS)
        with torch.no_grad():
            present = torch.from_numpy(train.present)
            mean = torch.log(torch.softmax(logits[present], dim=1).mean(dim=0))
            logits[~present] = mean
            weights = _ideal(prototypes, logits) @ projection.T
        return _FittedIdeal(*(t.detach().numpy() for t in (weights, projection, prototypes, mean)))
