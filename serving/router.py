"""The router: a KServe transformer that finds out whose taste is asked for, and asks the predictor.

It makes the worker's pseudonym with the key that ingest used, looks the profiles up, and hands on how to score. It needs
no torch. Every fallback to the global reward is flagged in the answer and counted by its reason.

In a process of its own, as in a cluster (KServe gives the last three):

    python -m serving.router --profiles /mnt/profiles --model_name coterie --predictor_host HOST --http_port 8080
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import grpc
import httpx
import orjson
from kserve import InferResponse
from kserve.constants.constants import PredictorProtocol

from coterie.config import ServeSettings
from coterie.contracts import (
    WORKER_TENSORS,
    Instance,
    Manifest,
    Prediction,
    PredictRequest,
    PredictResponse,
    Route,
    RoutedInstance,
    RoutedRequest,
)
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.routing import Profile, ProfileSource, choose, fall_back, policy_of, route
from coterie.uplift import holdout
from serving import tensors
from serving.asking import Refusal, RemotePredictor
from serving.doors import REQUEST_ID
from serving.failures import Failure, Overloaded, TooLate, Unavailable
from serving.metrics import ANSWERS, ENTROPY, FALLBACKS
from serving.protocol import Model

if TYPE_CHECKING:
    from serving.predictor import Predictor

log = logging.getLogger("coterie.serving")

_MANIFEST_SECONDS = 30.0  # between two looks at which bundle the predictor serves
_RETRY_SECONDS = 0.5
_UNSETTLED_SECONDS = 5.0
_V1 = PredictorProtocol.REST_V1.value


class Router(Model):
    """Predicts for contracts.PredictRequest.

    Args:
        name: of the model in the URL; a predictor elsewhere has the same.
        key: ingest's pseudonym key; None where worker ids are used as they came.
        profiles: where profiles are looked up.
        predictor: a predictor in this process; without one KServe's `--predictor_host` is asked, in the protocol that
            `--predictor_protocol` names.
        settings: age past which a profile is stale, and deadline.
        held_out: share of requests that the global reward answers for comparison's sake (coterie.uplift).
        clock: the present, with a time zone.

    The router is not ready when its key is not the one that the bundle's workers were named with: everybody would be a
    stranger without anybody noticing.
    """

    request = PredictRequest
    inputs = WORKER_TENSORS

    def __init__(
        self,
        name: str,
        key: bytes | None,
        profiles: ProfileSource,
        predictor: Predictor | None = None,
        settings: ServeSettings | None = None,
        held_out: float = 0.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(name)
        self.key, self.profiles, self.predictor, self.clock = key, profiles, predictor, clock
        self._settings, self._holdout = settings or ServeSettings(), held_out
        self._max_age = timedelta(days=self._settings.profile_max_age_days)
        self._key_fingerprint = fingerprint(key) if key else None
        self._seen: Manifest | None = None  # of a predictor elsewhere
        self._remote: RemotePredictor | None = None
        self.ready = True  # KServe registers no other; `healthy` says whether it is

    @property
    def manifest(self) -> Manifest | None:
        """Of the bundle that answers; None before the predictor told."""
        return self._seen if self.predictor is None else self.predictor.manifest

    def refusal(self, manifest: Manifest) -> str | None:
        """Why a bundle must not answer here: its workers were named with another key. None if it may."""
        if manifest.key_fingerprint in (None, self._key_fingerprint):
            return None
        return (
            f"the pseudonym key (fingerprint {self._key_fingerprint or 'none'}) is not the one that the bundle's workers "
            f"were named with ({manifest.key_fingerprint}): everybody would be a stranger. Serve with ingest's key, or a "
            "bundle made with this one."
        )

    async def healthy(self) -> bool:
        """Ready when the predictor is, or has been, and the key is ingest's."""
        manifest = self.manifest
        if not self.ready or manifest is None or self.refusal(manifest) is not None:
            return False
        return self.predictor is None or await self.predictor.healthy()

    async def watch(self, url: str, follow: Callable[[Manifest], Awaitable[bool]] | None = None) -> None:
        """Learn at `url` which bundle a predictor elsewhere serves, again and again; ends when it is cancelled.

        Args:
            url: where the predictor tells.
            follow: called with each new bundle's manifest, and again soon until it returns True.
        """
        followed = None
        while True:
            manifest = await self.meet(url)
            version = manifest.model_version
            if follow is not None and version != followed:
                followed = version if await follow(manifest) else None
            await asyncio.sleep(_MANIFEST_SECONDS if follow is None or followed else _UNSETTLED_SECONDS)

    async def meet(self, url: str) -> Manifest:
        """Learn at `url` which bundle a predictor elsewhere serves, as soon as it tells."""
        while True:
            try:
                async with httpx.AsyncClient(timeout=5) as client:
                    answer = await client.get(url)
                seen = Manifest.model_validate_json(answer.raise_for_status().content)
                break
            except (httpx.HTTPError, ValueError) as error:
                log.log(
                    logging.DEBUG if self._seen else logging.INFO, "no word of the predictor: %s", type(error).__name__
                )
            await asyncio.sleep(_RETRY_SECONDS)
        if self._seen is None or seen.model_version != self._seen.model_version:
            if refusal := self.refusal(seen):
                log.error("NOT READY: %s", refusal)
            else:
                log.info("bundle %s answers", seen.model_version[:12])
        self._seen = seen
        return seen

    async def preprocess(self, payload: PredictRequest, headers: dict[str, str] | None = None) -> RoutedRequest:
        """Replace each worker by the routes that their profiles open."""
        instances = await self._routed(payload.instances)
        # Everything in it was validated already.
        return RoutedRequest.model_construct(instances=instances, explain=payload.explain, next_pair=payload.next_pair)

    async def predict(
        self, payload: RoutedRequest, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> list[Prediction]:
        """Ask the predictor. Raises Overloaded, TooLate, or Unavailable where it does not answer."""
        if self.predictor is not None:
            return await self.predictor.predict(payload)
        passed = {"x-request-id": REQUEST_ID.get() or "none"}
        if headers and "authorization" in headers:
            passed["authorization"] = headers["authorization"]
        try:
            return await self._ask(payload, passed)
        except TimeoutError:
            raise TooLate(f"The predictor took longer than {self._settings.request_seconds:g} s.") from None
        except Refusal as error:
            raise _said(error.status, error.retry_after) from error
        except grpc.RpcError as error:
            raise _said(_HTTP.get(error.code(), 500), None) from error
        except aiohttp.ClientError as error:
            log.error("the predictor does not answer: %s: %s", type(error).__name__, error)
            raise Unavailable("The predictor does not answer.", retry_after=1) from error

    async def _ask(self, payload: RoutedRequest, passed: dict[str, str]) -> list[Prediction]:
        """Ask a predictor elsewhere, in the protocol that KServe's arguments name."""
        protocol = self.predictor_config.protocol
        if protocol == PredictorProtocol.GRPC_V2.value:
            tensor = tensors.write_request(self.name, payload, binary=True)
            answer = await asyncio.wait_for(super().predict(tensor, passed), self._settings.request_seconds)
            return tensors.read_response(answer)
        if self._remote is None:
            path = f"v1/models/{self.name}:predict" if protocol == _V1 else f"v2/models/{self.name}/infer"
            url = f"{self.predictor_config.predictor_base_url}/{path}"
            self._remote = RemotePredictor(url, self._settings.request_seconds)
        if protocol == _V1:
            said = await self._remote.ask(payload.model_dump_json().encode(), passed)
            return PredictResponse.model_validate_json(said).predictions
        document, _ = tensors.write_request(self.name, payload, binary=False).to_rest()
        said = await self._remote.ask(orjson.dumps(document), passed)
        return tensors.read_response(InferResponse.from_bytes(said, len(said)))

    async def close(self) -> None:
        """End the connections to a predictor elsewhere."""
        if self._remote is not None:
            await self._remote.close()

    async def postprocess(
        self, result: list[Prediction], headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> list[Prediction]:
        """Count whose reward served, and what was scored globally by reason."""
        for prediction in result:
            ANSWERS.labels(prediction.source).inc()
            if prediction.reason is not None:
                FALLBACKS.labels(prediction.reason).inc()
            if prediction.posterior is not None and len(prediction.posterior) > 1:
                ENTROPY.observe(_entropy(prediction.posterior))
        return result

    async def policy(self, worker_id: str | None) -> tuple[str | None, Route]:
        """Which policy answers a person, None where the bundle holds none; and by which route.

        Raises:
            Unavailable: the router is not ready.
        """
        manifest = self.manifest
        if manifest is None or not await self.healthy():
            raise Unavailable(f"The model {self.name} is not ready.")
        [routed] = await self._routed([Instance.model_construct(worker_id=worker_id, prompt="", responses=[""])])
        taken = choose(routed.routes, manifest.mixture_version, manifest.coteries)
        if taken.reason is not None:
            FALLBACKS.labels(taken.reason).inc()
        return policy_of(manifest.policies, taken.coterie) if manifest.policies else None, taken

    async def _routed(self, instances: list[Instance]) -> list[RoutedInstance]:
        manifest = self.manifest
        key = self.key if manifest is not None and manifest.key_fingerprint else None
        names = [pseudonym(key, i.worker_id) if i.worker_id is not None else None for i in instances]
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        known = dict(zip(wanted, await self.profiles.get(wanted), strict=True)) if wanted else {}
        now = self.clock()
        routed = []
        for instance, name in zip(instances, names, strict=True):
            comparisons, routes = instance.comparisons, [fall_back("no-worker")]
            if name is not None:
                routes = self._routes(known[name], now)
                personal = bool(comparisons) or any(taken.source != "global" for taken in routes)
                if personal and holdout(name, REQUEST_ID.get(), self._holdout)[0]:
                    comparisons, routes = [], [fall_back("holdout")]
            routed.append(
                RoutedInstance.model_construct(
                    prompt=instance.prompt, responses=instance.responses, comparisons=comparisons, routes=routes
                )
            )
        return routed

    def _routes(self, profiles: tuple[Profile, ...] | None, now: datetime) -> list[Route]:
        if profiles is None:
            return [fall_back("profiles-unavailable")]
        if not profiles:
            return [fall_back("unknown-worker")]
        return [route(profile, profile.mixture_version, now, self._max_age) for profile in profiles]


_HTTP = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def _said(status: int, retry_after: str | None) -> Failure:
    """What a router says of a predictor that refused."""
    if status == 429:
        after = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
        return Overloaded("The predictor has too many texts waiting. Try again later.", after)
    if status == 504:
        return TooLate("The predictor took too long. Ask fewer or shorter texts at once.")
    log.error("the predictor answered %s", status)
    if status == 503:
        return Unavailable("The predictor is not ready.", retry_after=1)
    return Unavailable("The predictor failed; its log says why.", retry_after=1)


def _entropy(posterior: list[float]) -> float:
    return -sum(p * math.log(p) for p in posterior if p > 0) / math.log(len(posterior))


if __name__ == "__main__":
    from serving.server import router_command

    router_command()
