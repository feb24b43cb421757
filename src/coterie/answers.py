"""Answers to routed questions: whose reward serves, its scores, and on request why and what to ask the person next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from coterie.contracts import (
    CoterieScores,
    Explanation,
    Prediction,
    RefusedRoute,
    Route,
    RoutedInstance,
)
from coterie.discovery.newcomers import next_pair
from coterie.routing import choose, confirm
from coterie.scoring import Array, Question, Scored, Scorer, leading_coteries


class Asked(NamedTuple):
    """A routed question, and what is wanted beside its scores."""

    instance: RoutedInstance
    explain: bool = False
    next_pair: bool = False

    @property
    def texts(self) -> int:
        """Responses, and those of the comparisons: what an answer costs."""
        return len(self.instance.responses) + 2 * len(self.instance.comparisons)


def answer(scorer: Scorer, asked: Sequence[Asked]) -> list[Prediction]:
    """Answer questions together; one whose routes this bundle cannot follow falls back to the global reward.

    A person without a route of their own is placed by the comparisons that came along, if any did.
    """
    routes = [_taken(scorer, one.instance) for one in asked]
    questions = [
        Question(one.instance.prompt, one.instance.responses, route.posterior, route.embedding, one.explain)
        for one, route in zip(asked, routes, strict=True)
    ]
    manifest = scorer.bundle.manifest
    return [
        Prediction(
            scores=scored.scores.tolist(),
            best=int(np.argmax(scored.scores)),
            coterie=route.coterie,
            posterior=route.posterior,
            source=route.source,
            reason=route.reason,
            model_version=manifest.model_version,
            mixture_version=manifest.mixture_version,
            next_pair=_next_pair(scorer, one.instance, route) if one.next_pair else None,
            explanation=_explain(scorer, one.instance, route, scored) if one.explain else None,
        )
        for one, route, scored in zip(asked, routes, scorer.score_many(questions), strict=True)
    ]


def _shape(scorer: Scorer) -> tuple[str, int, int | None]:
    """Mixture, number of coteries, and rank where embeddings serve: what a route must fit."""
    manifest = scorer.bundle.manifest
    return manifest.mixture_version, manifest.coteries, manifest.rank if scorer.bundle.personal is not None else None


def _taken(scorer: Scorer, instance: RoutedInstance) -> Route:
    route = choose(instance.routes, *_shape(scorer))
    return scorer.place(instance.comparisons) if route.source == "global" and instance.comparisons else route


def _next_pair(scorer: Scorer, instance: RoutedInstance, route: Route) -> tuple[int, int] | None:
    """The two responses whose comparison would say most about this person's coterie; None where none says anything."""
    mixture = scorer.placing.mixture
    pairs = list(combinations(range(len(instance.responses)), 2))
    if not pairs or len(mixture.weights_) == 1:
        return None
    h = scorer.features([instance.prompt] * len(instance.responses), instance.responses)
    first, second = np.array(pairs).T
    posterior = mixture.weights_ if route.posterior is None else np.asarray(route.posterior)
    order, _ = next_pair(posterior, mixture.theta_, h[first] - h[second])
    return pairs[int(order[0])]


def _explain(scorer: Scorer, instance: RoutedInstance, route: Route, scored: Scored) -> Explanation:
    manifest = scorer.bundle.manifest
    gates = {gate.coterie: gate for gate in manifest.gates}
    shares: Array | None = None
    if route.posterior is not None and scorer.bundle.personal is None:
        shares = leading_coteries(np.array([route.posterior]))[0]
    confirmed = [(given, confirm(given, *_shape(scorer))) for given in instance.routes]
    return Explanation(
        by_global=scored.by_global.tolist(),
        coteries=[
            CoterieScores(
                coterie=k,
                scores=scored.by_coterie[:, k].tolist(),
                serves=gates[k].serves if k in gates else "global",
                reason=gates[k].reason if k in gates else "no gate in the bundle",
                share=None if shares is None else float(shares[k]),
            )
            for k in range(manifest.coteries)
        ],
        refused=[
            RefusedRoute(mixture_version=given.mixture_version, reason=made.reason)
            for given, made in confirmed
            if made.reason is not None
        ],
    )
