"""What a router hands to whoever computes where people stand; it imports nothing that does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Said(_Frozen):
    """A comparison that a person made; `weight` is that of discovery.votes.Votes."""

    prompt: str
    chosen: str
    rejected: str
    tie: bool = False
    weight: float = 1.0


class Prior(_Frozen):
    """What was published of a person: posterior [K], embedding [rank], and the training comparisons behind both."""

    posterior: list[float]
    embedding: list[float]
    reliability: float
    comparisons: int


class Evidence(_Frozen):
    """A person: what was published of them, and what they have said since."""

    said: list[Said] = Field(min_length=1)
    prior: Prior | None = None


class Place(_Frozen):
    """Where a person stands: posterior [K], embedding [rank], reliability."""

    posterior: list[float]
    embedding: list[float]
    reliability: float


Infer = Callable[[Sequence[Evidence]], list[Place]]
"""Places of people, by one mixture. Raises BackendUnavailable where somebody else computes them and does not answer."""


def weights(rankings: Sequence[str | None]) -> list[float]:
    """What each comparison of a person counts: one; of the p pairs of a ranking of m responses, 2 / m."""
    counts = Counter(rankings)
    return [1.0 if name is None else 4 / (1 + (1 + 8 * counts[name]) ** 0.5) for name in rankings]
