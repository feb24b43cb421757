"""The router: a KServe transformer that finds out whose taste is asked for, and asks the predictor.

It makes the worker's pseudonym with the key that ingest used, looks the profile up, and hands on how to score. It needs
no torch. Every fallback to the global reward is flagged in the answer and counted by its reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from kserve.errors import InvalidInput, ModelNotReady
from prometheus_client import Counter

from coterie.contracts import Instance, Manifest, PredictRequest, Route, RoutedInstance, RoutedRequest
from coterie.errors import BackendUnavailable
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.routing import MAX_AGE, Profile, ProfileSource, fall_back, route
from serving.protocol import Model, parse

log = logging.getLogger("coterie.serving")

FALLBACKS = Counter("coterie_fallbacks", "Instances scored by the global reward, by reason", ["reason"])
_LOOKUPS = 32  # lookups that may wait for the profile store at once


class Router(Model):
    """V1 predict: {"instances": [contracts.Instance]} to {"predictions": [contracts.Prediction]}.

    Args:
        name: of the model in the URL.
        manifest: of the bundle that the predictor serves.
        key: ingest's pseudonym key; None where worker ids are used as they came.
        profiles: where profiles are looked up.
        predictor: a predictor in this process; without one KServe's `--predictor_host` is asked over HTTP.
        max_age: age past which a profile is stale.
        clock: the present, with a time zone.

    The router is not ready when its key is not the one that the bundle's workers were named with: everybody would be a
    stranger without anybody noticing.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        key: bytes | None,
        profiles: ProfileSource,
        predictor: Model | None = None,
        max_age: timedelta = MAX_AGE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(name)
        self.manifest, self.key, self.profiles, self.predictor = manifest, key, profiles, predictor
        self.max_age, self.clock = max_age, clock
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="profiles")
        self.key_agrees = (fingerprint(key) if key else None) == manifest.key_fingerprint
        if not self.key_agrees:
            log.error(
                "NOT READY: the pseudonym key (fingerprint %s) is not the one that the bundle's workers were named "
                "with (%s): everybody would be a stranger. Serve with ingest's key, or a bundle made with this one.",
                fingerprint(key) if key else "none",
                manifest.key_fingerprint or "none",
            )

    async def healthy(self) -> bool:
        """Ready when the key is ingest's, and the predictor of this process is."""
        return self.ready and self.key_agrees and (self.predictor is None or await self.predictor.healthy())

    async def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Validate the request and replace each worker by a route. Raises InvalidInput."""
        request = parse(PredictRequest, payload)
        routes = await self._routes(request.instances)
        routed = [
            RoutedInstance(prompt=instance.prompt, responses=instance.responses, route=chosen)
            for instance, chosen in zip(request.instances, routes, strict=True)
        ]
        return RoutedRequest(instances=routed).model_dump()

    async def predict(
        self, payload: dict[str, Any], headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> Any:
        """Ask the predictor. Raises ModelNotReady (503) where it does not answer."""
        if self.predictor is not None:
            answer, _ = await self.predictor(payload, headers)
            return answer
        try:
            return await super().predict(payload, headers)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 400:
                raise InvalidInput("The predictor refused the request as this router made it; upgrade both.") from error
            log.error("the predictor answered %s", error.response.status_code)
            raise ModelNotReady(self.name, "The predictor failed; its log says why.") from error
        except httpx.HTTPError as error:
            log.error("the predictor does not answer: %s: %s", type(error).__name__, error)
            raise ModelNotReady(self.name, "The predictor does not answer.") from error

    async def postprocess(
        self, result: Any, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> Any:
        """Count what was scored globally, by reason."""
        for prediction in result["predictions"]:
            if prediction["source"] == "global":
                FALLBACKS.labels(prediction["reason"]).inc()
        return result

    async def _routes(self, instances: list[Instance]) -> list[Route]:
        names = [pseudonym(self.key, i.worker_id) if i.worker_id is not None else None for i in instances]
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        known: dict[str, Profile | None] | None = {}
        if wanted:
            try:
                loop = asyncio.get_running_loop()
                known = dict(
                    zip(wanted, await loop.run_in_executor(self._threads, self.profiles.get, wanted), strict=True)
                )
            except BackendUnavailable as error:
                log.warning("no profiles, the global reward serves: %s", error)
                known = None
        now = self.clock()
        routes = []
        for name in names:
            if name is None:
                routes.append(fall_back("no-worker"))
            elif known is None:
                routes.append(fall_back("profiles-unavailable"))
            else:
                routes.append(route(known[name], self.manifest.mixture_version, now, self.max_age))
        return routes
