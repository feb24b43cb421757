"""What router and predictor share: requests validated in words, and failures that leak nothing."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import kserve
from kserve.errors import InferenceError, InvalidInput, ModelNotFound, ModelNotReady
from kserve.model import InferenceVerb
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("coterie.serving")

Request = TypeVar("Request", bound=BaseModel)

MAX_BODY = 16 * 2**20
"""Largest request body in bytes."""
_SHOWN = 5  # problems of one request that are told at once


class Model(kserve.Model):  # type: ignore[misc]
    """A KServe model whose unexpected failures reach the log whole and the client as one sentence."""

    async def __call__(
        self, body: Any, headers: dict[str, str] | None = None, verb: InferenceVerb = InferenceVerb.PREDICT
    ) -> Any:
        """As kserve.Model: preprocess, predict, postprocess."""
        try:
            return await super().__call__(body, headers, verb)
        except (InvalidInput, InferenceError, ModelNotFound, ModelNotReady, NotImplementedError):
            raise
        except Exception as error:
            log.exception("model %s failed", self.name)
            raise InferenceError("The scores could not be computed. The server's log says why.") from error


def parse(kind: type[Request], payload: Any) -> Request:
    """Read the body of a V1 request.

    Raises:
        InvalidInput: it is not what `kind` describes; says which instance and which field, never what was in them.
    """
    if not isinstance(payload, dict):
        raise InvalidInput(
            'The body is not a JSON object. Send {"instances": [{"worker_id": ..., "prompt": ..., "responses": [...]}]}'
            " as application/json."
        )
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        # The server logs the cause of every refused request: without this it would log people's texts.
        raise InvalidInput(_in_words(error)) from None


def _in_words(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = []
    for problem in problems[:_SHOWN]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in problem["loc"])
        hint = "there is no such field" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        lines.append(f"{place.lstrip('.') or 'body'}: {hint}")
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(lines) + more


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than `limit` bytes, before it is held in memory."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on while it is within the limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(scope, receive, send)
            return
        # A chunked request declares no length: read it here, up to the limit.
        chunks: list[Message] = []
        size, more = 0, True
        while more:
            message = await receive()
            chunks.append(message)
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            if size > self.limit:
                await self._refuse(scope, receive, send)
                return
        waiting = iter(chunks)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        words = f"The body is larger than {self.limit} bytes. Send fewer or shorter texts in one request."
        response = JSONResponse({"error": words}, status_code=413, headers={"connection": "close"})
        await response(scope, receive, send)
