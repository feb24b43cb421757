"""What the peers that torch differentiates share: votes as tensors, their loss, and its descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from coterie.discovery.votes import Array, Votes


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


def adam(loss: Callable[[], Tensor], parameters: Iterable[Tensor], rate: float, steps: int, decay: float = 0.0) -> None:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with decoupled weight decay, its rate falling to zero along a cosine.

    Args:
        loss: of the parameters as they are, on all votes or on a batch that it draws.
    """
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()


def minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int) -> None:
    """L-BFGS on all votes at once, at most so many iterations; for objectives without a saddle where it starts.

    Args:
        loss: of the parameters as they are.
        parameters: leaves, which are changed in place.
        steps: iterations at most.
    """
    sizes = [parameter.numel() for parameter in parameters]

    def put(flat: Array) -> None:
        with torch.no_grad():
            for parameter, part in zip(parameters, torch.from_numpy(flat).float().split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))

    def objective(flat: Array) -> tuple[float, Array]:
        put(flat)
        value = loss()
        gradients = torch.autograd.grad(value, parameters)
        return value.item(), np.concatenate([gradient.numpy().ravel() for gradient in gradients]).astype(np.float64)

    start = np.concatenate([parameter.detach().numpy().ravel() for parameter in parameters]).astype(np.float64)
    options = {"maxiter": steps, "gtol": 1e-8, "ftol": 1e-8, "maxcor": 10}  # a worker's part of a mean is small
    put(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x)
