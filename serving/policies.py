"""Answers written by the policy of a person's coterie: a streaming proxy before any OpenAI-compatible server with adapters.

The server (KServe's generative runtime, vLLM with --lora-modules) holds the bundle's policies under the names that they have
there: start, global, coterie-0 ...; the router only says which of them answers.
"""

from __future__ import annotations

import logging
from typing import Any

import httpx
import orjson
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from serving.doors import REQUEST_ID
from serving.failures import NotFound, Refused, Unavailable
from serving.router import Router

log = logging.getLogger("coterie.serving")

PATH = "/openai/v1/chat/completions"
_LONGEST_USER = 512
_CONNECT_SECONDS = 5.0


def routes(router: Router, server: str, patience: float) -> APIRouter:
    """POST /openai/v1/chat/completions: `user` is the worker, and `model` becomes the policy of their coterie.

    The answer names the policy in the header x-coterie-policy, and in x-coterie-reason why it is not that of a coterie.
    Who asked stays here: the server is told no user.

    Args:
        router: that knows people.
        server: its address, as in http://host:port.
        patience: seconds for the next piece of an answer.
    """
    client = httpx.AsyncClient(base_url=server, timeout=httpx.Timeout(patience, connect=_CONNECT_SECONDS))
    api = APIRouter(on_shutdown=[client.aclose])

    @api.post(PATH)
    async def complete(request: Request) -> StreamingResponse:
        """Pass the question on, and the answer back as it comes."""
        body = _read(await request.body())
        name, route = await router.policy(body.pop("user", None))
        if name is None:
            raise NotFound("This bundle holds no policies: it scores answers and writes none.")
        told = {"content-type": "application/json", "x-request-id": REQUEST_ID.get()}
        if "authorization" in request.headers:
            told["authorization"] = request.headers["authorization"]
        asked = client.build_request(
            "POST", "/v1/chat/completions", content=orjson.dumps(body | {"model": name}), headers=told
        )
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            log.error("the policies' server does not answer: %s: %s", type(error).__name__, error)
            raise Unavailable("The policies' server does not answer.", retry_after=1) from error
        headers = {"x-coterie-policy": name, "content-type": answer.headers.get("content-type", "application/json")}
        if route.reason is not None:
            headers["x-coterie-reason"] = route.reason
        closing = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_bytes(), answer.status_code, headers, background=closing)

    return api


def _read(body: bytes) -> dict[str, Any]:
    """The question, of which only what the router needs is checked. Raises Refused."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Refused("The body is not JSON. Send a chat completion request as application/json.") from None
    if not isinstance(asked, dict):
        raise Refused("The body is not a JSON object. Send a chat completion request.")
    user = asked.get("user")
    if user is not None and not (isinstance(user, str) and 0 < len(user) <= _LONGEST_USER):
        raise Refused(f"user: give a worker id of 1 to {_LONGEST_USER} characters, or leave it out")
    if not isinstance(asked.get("messages"), list):
        raise Refused("messages: give a list of messages")
    return asked
