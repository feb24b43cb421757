"""A typed client of the router, synchronous and asynchronous: retries with backoff, a deadline, errors in words.

with Client("http://localhost:8080") as client:
    answer = client.score("Shall we?", ["Yes.", "No."], worker_id="w-17")
    print(answer.best, answer.source)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx
import tenacity
from pydantic import ValidationError

from coterie.config import in_words
from coterie.contracts import Example, Instance, Prediction, PredictRequest, PredictResponse
from coterie.errors import BackendUnavailable, BadConfiguration, BadData, Conflict

_AGAIN = (429, 502, 503, 504)  # what may be otherwise in a moment
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0


class _Again(BackendUnavailable):
    """An answer worth asking again for; `after` seconds, where the server says when."""

    def __init__(self, words: str, after: float | None = None) -> None:
        super().__init__(words)
        self.after = after


class _Protocol:
    """What both clients share: requests to send, answers to read, and when to ask again."""

    def __init__(self, url: str, model: str, token: str | None, timeout: float, retries: int) -> None:
        if timeout <= 0 or retries < 0:
            raise BadConfiguration(
                f"timeout={timeout}, retries={retries}: give seconds above zero, and retries or none"
            )
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}

    def _policy(self) -> dict[str, Any]:
        return {
            "retry": tenacity.retry_if_exception_type(_Again),
            "stop": tenacity.stop_after_attempt(self.retries + 1) | tenacity.stop_before_delay(self.timeout),
            "wait": _wait,
            "reraise": True,
        }

    def _asked(self, path: str, body: Mapping[str, Any], until: float) -> dict[str, Any]:
        """Arguments of one attempt; `x-request-id` finds the request in the server's log."""
        left = max(until - time.monotonic(), 1e-3)
        return {"url": f"{self.url}{path}", "json": body, "headers": self._headers, "timeout": left}

    def _read(self, response: httpx.Response) -> Any:
        if response.is_success:
            return response.json()
        try:
            words = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            words = response.text[:300]
        words = (
            f"{self.url}: {words} ({response.status_code}, request {response.headers.get('x-request-id', 'unknown')})"
        )
        if response.status_code in _AGAIN:
            after = response.headers.get("retry-after", "")
            raise _Again(words, float(after) if after.isdigit() else None)
        if response.status_code in (401, 403, 404):
            raise BadConfiguration(words)
        if response.status_code == 409:
            raise Conflict(words)
        if response.status_code < 500:
            raise BadData(words)
        raise BackendUnavailable(words)

    def _predicted(self, told: Any, asked: int) -> list[Prediction]:
        try:
            predictions = PredictResponse.model_validate(told).predictions
        except ValidationError as error:
            raise BackendUnavailable(
                f"{self.url}: no answer of a router of this version of coterie. Upgrade one."
            ) from error
        if len(predictions) != asked:
            raise BackendUnavailable(f"{self.url}: {len(predictions)} answers to {asked} questions")
        return predictions

    def _lost(self, error: httpx.TransportError) -> _Again:
        return _Again(f"{self.url} does not answer: {type(error).__name__} {error}. Check address and server.")

    def _predict_path(self) -> str:
        return f"/v1/models/{self.model}:predict"

    def _ready_path(self) -> str:
        return f"{self.url}/v2/models/{self.model}/ready"


class Client(_Protocol):
    """Asks a router, and waits for the answer.

    Args:
        url: of the router, as in http://localhost:8080.
        model: its name there.
        token: that the server asks for, if it does.
        timeout: seconds of a call, all its attempts together.
        retries: attempts after the first that failed for a reason that passes: nobody answers, 429, 502, 503, 504.
        transport: in place of the network, for tests.

    Every method raises:
        BadData: the request is refused, with the place and the problem.
        BadConfiguration: no such model, or the token is wrong.
        BackendUnavailable: no answer within the time and the retries.
    """

    def __init__(
        self,
        url: str,
        model: str = "coterie",
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, model, token, timeout, retries)
        self._http = httpx.Client(transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self, instances: Sequence[Instance], *, explain: bool = False, next_pair: bool = False
    ) -> list[Prediction]:
        """An answer to each question, in their order."""
        body = _body(instances, explain, next_pair)
        return self._predicted(self._post(self._predict_path(), body), len(instances))

    def score(
        self,
        prompt: str,
        responses: Sequence[str],
        worker_id: str | None = None,
        comparisons: Sequence[Example] = (),
    ) -> Prediction:
        """How a person likes responses to a prompt; `comparisons` they made tell of somebody who has no profile yet."""
        return self.predict([_question(prompt, responses, worker_id, comparisons)])[0]

    def feedback(self, comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Store votes (docs/feedback.md); what became of each. They are committed when this returns, and one sent again is no
        second vote.

        Raises:
            Conflict: such a comparison is stored already, with other details.
        """
        told: dict[str, Any] = self._post("/v1/feedback", {"comparisons": [dict(one) for one in comparisons]})
        return list(told["comparisons"])

    def ready(self) -> bool:
        """Whether the router can answer."""
        try:
            return self._http.get(self._ready_path(), headers=self._headers, timeout=self.timeout).is_success
        except httpx.TransportError:
            return False

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        until = time.monotonic() + self.timeout

        def attempt() -> Any:
            try:
                return self._read(self._http.post(**self._asked(path, body, until)))
            except httpx.TransportError as error:
                raise self._lost(error) from error

        return tenacity.Retrying(**self._policy())(attempt)


class AsyncClient(_Protocol):
    """`Client` for asyncio: the same methods, to be awaited."""

    def __init__(
        self,
        url: str,
        model: str = "coterie",
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, model, token, timeout, retries)
        self._http = httpx.AsyncClient(transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(
        self, instances: Sequence[Instance], *, explain: bool = False, next_pair: bool = False
    ) -> list[Prediction]:
        """As `Client.predict`."""
        body = _body(instances, explain, next_pair)
        return self._predicted(await self._post(self._predict_path(), body), len(instances))

    async def score(
        self,
        prompt: str,
        responses: Sequence[str],
        worker_id: str | None = None,
        comparisons: Sequence[Example] = (),
    ) -> Prediction:
        """As `Client.score`."""
        return (await self.predict([_question(prompt, responses, worker_id, comparisons)]))[0]

    async def feedback(self, comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As `Client.feedback`."""
        told: dict[str, Any] = await self._post("/v1/feedback", {"comparisons": [dict(one) for one in comparisons]})
        return list(told["comparisons"])

    async def ready(self) -> bool:
        """As `Client.ready`."""
        try:
            found = await self._http.get(self._ready_path(), headers=self._headers, timeout=self.timeout)
        except httpx.TransportError:
            return False
        return found.is_success

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        until = time.monotonic() + self.timeout

        async def attempt() -> Any:
            try:
                return self._read(await self._http.post(**self._asked(path, body, until)))
            except httpx.TransportError as error:
                raise self._lost(error) from error

        return await tenacity.AsyncRetrying(**self._policy())(attempt)


def _wait(state: tenacity.RetryCallState) -> float:
    """The server's Retry-After, or an exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Again) and error.after is not None:
        return error.after
    return float(tenacity.wait_exponential_jitter(_FIRST_WAIT, _LONGEST_WAIT, jitter=_FIRST_WAIT)(state))


def _question(prompt: str, responses: Sequence[str], worker_id: str | None, comparisons: Sequence[Example]) -> Instance:
    try:
        return Instance(worker_id=worker_id, prompt=prompt, responses=list(responses), comparisons=list(comparisons))
    except ValidationError as error:
        raise BadData(in_words("question", error)) from error


def _body(instances: Sequence[Instance], explain: bool, next_pair: bool) -> dict[str, Any]:
    try:
        request = PredictRequest(instances=list(instances), explain=explain, next_pair=next_pair)
    except ValidationError as error:
        raise BadData(in_words("request", error)) from error
    return request.model_dump(mode="json", exclude_defaults=True)
