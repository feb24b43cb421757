"""Whose reward answers a request: the person's own profile, or the global reward with the reason for it.

A profile is used only when it is whole, fresh and made with the very mixture that the bundle serves: a posterior
means nothing beside another mixture. Everything else falls back to the global reward. A fallback is never an error, and
never another coterie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np

from coterie.contracts import GLOBAL, PolicyGate, Reason, Route

MAX_AGE = timedelta(days=90)
"""Age past which a profile is stale, unless the server was told otherwise; also the time to live in Feast."""


@dataclass(frozen=True)
class Profile:
    """What is known about one worker: a row of contracts.PROFILE.

    `posterior` has one probability a coterie [K], `embedding` the worker's place along the directions of taste [rank].
    """

    worker_id: str
    embedding: tuple[float, ...]
    reliability: float
    comparisons: int
    coterie: int
    posterior: tuple[float, ...]
    mixture_version: str
    event_timestamp: datetime


class ProfileSource(Protocol):
    """Where profiles come from."""

    async def get(self, worker_ids: Sequence[str]) -> list[tuple[Profile, ...] | None]:
        """Each worker's profiles, one a mixture that is online: none for a stranger, None where the store failed or missed
        its deadline."""
        ...


def fall_back(reason: Reason) -> Route:
    """The global reward, and why."""
    return Route(source="global", reason=reason)


def route(profile: Profile | None, mixture_version: str, now: datetime, max_age: timedelta = MAX_AGE) -> Route:
    """Decide who answers for a worker whose profile was looked up.

    Args:
        profile: what the store holds of this worker; None if nothing.
        mixture_version: the mixture of the bundle that will score.
        now: the present, with a time zone.
        max_age: age past which a profile says nothing about its worker any more.
    """
    if profile is None:
        return fall_back("unknown-worker")
    if profile.mixture_version != mixture_version:
        return fall_back("other-mixture")
    if now - profile.event_timestamp > max_age:
        return fall_back("stale-profile")
    if not is_posterior(profile.posterior) or not 0 <= profile.coterie < len(profile.posterior):
        return fall_back("damaged-profile")
    return Route(
        source="profile",
        coterie=profile.coterie,
        posterior=list(profile.posterior),
        embedding=list(profile.embedding),
        mixture_version=profile.mixture_version,
    )


def choose(routes: Sequence[Route], mixture_version: str, coteries: int, rank: int | None = None) -> Route:
    """The route that a predictor takes of those offered: the first that `confirm` leaves as it is, else the global reward.

    The reason is one that concerns the predictor's own mixture, if there is any: that there are profiles of others as well
    says less.
    """
    confirmed = [confirm(given, mixture_version, coteries, rank) for given in routes]
    for taken in confirmed:
        if taken.source != "global":
            return taken
    return next((taken for taken in confirmed if taken.reason != "other-mixture"), confirmed[0])


def confirm(given: Route, mixture_version: str, coteries: int, rank: int | None = None) -> Route:
    """The route as the predictor takes it: its own mixture decides, whoever chose the route.

    Args:
        given: the route of a request.
        mixture_version: the mixture that the predictor serves.
        coteries: its number of coteries.
        rank: length of an embedding, where people are served by theirs.
    """
    if given.source == "global":
        return given
    if given.mixture_version != mixture_version:
        return fall_back("other-mixture")
    posterior = given.posterior or []
    if len(posterior) != coteries or not is_posterior(posterior) or given.coterie not in range(coteries):
        return fall_back("damaged-profile")
    embedding = given.embedding or []
    if rank is not None and not (len(embedding) == rank and np.isfinite(embedding).all()):
        return fall_back("damaged-profile")
    return given


def policy_of(gates: Sequence[PolicyGate], coterie: int | None) -> str:
    """The policy that the gates let answer people of a coterie, or a stranger (None): start, global or coterie-<k>.

    A coterie without a gate is served as strangers are.
    """
    by_coterie = {gate.coterie: gate.serves for gate in gates}
    own = None if coterie is None else by_coterie.get(coterie)
    if own == "own":
        return f"coterie-{coterie}"
    return GLOBAL if by_coterie.get(None) == "own" and own != "start" else "start"


def is_posterior(values: Sequence[float]) -> bool:
    """Whether `values` are probabilities that sum to one, to the precision of the float32 that they are stored in."""
    probabilities = np.asarray(values, dtype=float)
    return bool(
        len(probabilities)
        and np.isfinite(probabilities).all()
        and (probabilities >= 0).all()
        and abs(probabilities.sum() - 1) < 1e-3
    )
