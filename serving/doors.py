"""What a request passes before KServe sees it, over HTTP and over gRPC: its id, its token, its size; and the log's line."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from grpc_interceptor.server import AsyncServerInterceptor
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.errors import BadConfiguration
from serving.failures import Failure, Refused, Unauthorized, failure, response
from serving.metrics import RESPONSES

log = logging.getLogger("coterie.serving")

TOKEN, TOKEN_FILE = "COTERIE_TOKEN", "COTERIE_TOKEN_FILE"
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

_ANYBODY = ("/", "/metrics", "/v2", "/v2/health/live", "/v2/health/ready")  # what probes and scrapers ask
_LONGEST_ID = 200


def load_token(environ: Mapping[str, str]) -> bytes | None:
    """The bearer token that every request must bring: COTERIE_TOKEN, or the content of COTERIE_TOKEN_FILE.

    Raises:
        BadConfiguration: the file cannot be read, or is empty.
    """
    text, file = environ.get(TOKEN, ""), environ.get(TOKEN_FILE, "")
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfiguration(f"{TOKEN_FILE}={file}: the token cannot be read: {error}") from error
        if not text:
            raise BadConfiguration(f"{TOKEN_FILE}={file}: empty. Write the token into it, or unset the variable.")
    return text.encode() or None


def bearer(token: bytes | None) -> dict[str, str]:
    """The header with which one of our servers asks another, which has the same token."""
    return {} if token is None else {"authorization": f"Bearer {token.decode()}"}


def check_token(token: bytes | None, authorization: str) -> None:
    """Raises Unauthorized: there is a token, and `authorization` is not it."""
    if token is not None and not hmac.compare_digest(authorization.encode(), b"Bearer " + token):
        raise Unauthorized("Send the header Authorization: Bearer TOKEN, with the token of this server.")


class Door:
    """ASGI middleware; what it lets pass it also answers for: an exception that nobody handled becomes words.

    Args:
        app: what follows.
        token: that every request must bring but those of probes and scrapers; None: none.
        limit: largest body in bytes; a larger one is answered with 413 before it is held in memory.
    """

    def __init__(self, app: ASGIApp, token: bytes | None, limit: int) -> None:
        self.app, self.token, self.limit = app, token, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, if it may."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _id(headers.get("x-request-id"))
        REQUEST_ID.set(request_id)
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = MutableHeaders(scope=message)
                told["x-request-id"] = request_id
                if getattr(scope["app"].state, "draining", False):
                    told["connection"] = "close"
            await send(message)

        try:
            if not (scope["method"] == "GET" and _for_anybody(scope["path"])):
                check_token(self.token, headers.get("authorization", ""))
            await self.app(scope, await self._within(receive, headers), answer)
        except Exception as error:
            if status:  # the answer has begun
                raise
            await response(error)(scope, receive, answer)
        finally:
            if scope["method"] != "GET" or status >= 400:
                RESPONSES.labels(str(status)).inc()
                said = {"path": scope["path"], "status": status, "ms": round(1000 * (time.perf_counter() - started), 1)}
                log.info("%s %s", scope["method"], scope["path"], extra=said)

    async def _within(self, receive: Receive, headers: Headers) -> Receive:
        """`receive` of a body that is within the limit. Raises Failure (413)."""
        declared = headers.get("content-length", "")
        if declared.isdigit():
            if int(declared) > self.limit:
                raise _TooLarge(self.limit)
            return receive
        # A chunked request declares no length: read it here, up to the limit.
        chunks: list[Message] = []
        size, more = 0, "transfer-encoding" in headers
        while more:
            message = await receive()
            chunks.append(message)
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            if size > self.limit:
                raise _TooLarge(self.limit)
        waiting = iter(chunks)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        return replay


class GrpcDoor(AsyncServerInterceptor):  # type: ignore[misc]
    """The same for gRPC, whose messages are limited by the server's own option."""

    def __init__(self, token: bytes | None) -> None:
        self.token = token

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Hand bytes that are no message on as None: gRPC itself would call them the server's fault."""
        handler = await super().intercept_service(continuation, handler_call_details)
        if handler is None:  # there is no such method
            return None

        def read(message: bytes) -> Any:
            try:
                return handler.request_deserializer(message)
            except DecodeError:
                return None

        return handler._replace(request_deserializer=read)

    async def intercept(
        self, method: Callable[..., Awaitable[Any]], request_or_iterator: Any, context: Any, method_name: str
    ) -> Any:
        """Call `method`, if it may be; an exception ends as a status with words."""
        headers = dict(context.invocation_metadata() or ())
        REQUEST_ID.set(_id(headers.get("x-request-id")))
        try:
            if method_name.rpartition("/")[2] not in ("ServerLive", "ServerReady", "ModelReady"):
                check_token(self.token, str(headers.get("authorization", "")))
            if request_or_iterator is None:
                raise Refused("The message is not one of the Open Inference Protocol. Send it as its .proto file says.")
            return await method(request_or_iterator, context)
        except Exception as error:
            said = failure(error)
            log.info("%s", method_name, extra={"path": method_name, "status": said.status_code.name})
            await context.abort(said.status_code, str(said))


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, logger, message, and request_id where it is of a request."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: getattr(record, key) for key in ("path", "status", "ms", "asked") if hasattr(record, key)}
        if REQUEST_ID.get():
            line["request_id"] = REQUEST_ID.get()
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _TooLarge(Failure):
    http, cause = 413, "refused"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than {limit} bytes. Send fewer or shorter texts in one request.")


def _for_anybody(path: str) -> bool:
    return path in _ANYBODY or (path.startswith(("/v1/models/", "/v2/models/")) and ":" not in path)


def _id(given: str | bytes | None) -> str:
    text = given if isinstance(given, str) else ""
    return text if 0 < len(text) <= _LONGEST_ID and text.isprintable() else uuid.uuid4().hex
