"""What the peers that torch fits share: votes as tensors, and Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from coterie.discovery.votes import Votes


@dataclass(frozen=True)
class VoteTensors:
    """x [n, d], y [n], worker [n] and what each vote counts [n]."""

    x: Tensor
    y: Tensor
    worker: Tensor
    weight: Tensor

    @classmethod
    def of(cls, votes: Votes) -> Self:
        """The tensors of votes; x is not copied."""
        x, y, worker = torch.from_numpy(votes.x), torch.from_numpy(votes.y), torch.from_numpy(votes.worker).long()
        return cls(x, y, worker, torch.ones(len(y)) if votes.weight is None else torch.from_numpy(votes.weight))

    def loss(self, logits: Tensor) -> Tensor:
        """Log-loss of logits [n], summed."""
        return (self.weight * losses(logits, self.y)).sum()


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """-y log p - (1 - y) log (1 - p), elementwise."""
    return softplus(logits) - y * logits


def adam(loss: Callable[[], Tensor], parameters: Sequence[Tensor], rate: float, steps: int) -> None:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on all votes at once, its rate falling to zero along a cosine."""
    optimiser = torch.optim.Adam(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
