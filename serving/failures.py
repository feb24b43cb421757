"""Requests that are not answered: one type, its HTTP and gRPC status, and words that leak nothing."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from grpc import StatusCode
from kserve import errors
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

log = logging.getLogger("coterie.serving")

_SHOWN = 5  # problems of one request that are told at once


class Failure(Exception):
    """A request that is not answered, with the reason in words; `cause` is what the metrics count it as."""

    http, status_code, cause = 500, StatusCode.INTERNAL, "failed"

    def __init__(self, words: str, retry_after: float | None = None) -> None:
        super().__init__(words.encode(errors="replace").decode())  # names of fields may hold lone surrogates
        self.retry_after = retry_after


class Refused(Failure):
    """The request itself is wrong."""

    http, status_code, cause = 400, StatusCode.INVALID_ARGUMENT, "refused"


class Unauthorized(Failure):
    """No token, or a wrong one."""

    http, status_code, cause = 401, StatusCode.UNAUTHENTICATED, "unauthorized"


class NotFound(Failure):
    """There is no such model."""

    http, status_code, cause = 404, StatusCode.NOT_FOUND, "not-found"


class BundleRefused(Failure):
    """A bundle that was to be loaded; the one before serves on."""

    http, status_code, cause = 422, StatusCode.FAILED_PRECONDITION, "bundle-refused"


class Overloaded(Failure):
    """More waits already than may."""

    http, status_code, cause = 429, StatusCode.RESOURCE_EXHAUSTED, "overloaded"


class Unavailable(Failure):
    """Not ready yet, or something behind does not answer."""

    http, status_code, cause = 503, StatusCode.UNAVAILABLE, "unavailable"


class TooLate(Failure):
    """The request's time is over."""

    http, status_code, cause = 504, StatusCode.DEADLINE_EXCEEDED, "too-late"


def failure(error: Exception) -> Failure:
    """What the asker is told of an exception; one that nobody foresaw goes to the log whole."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, errors.InvalidInput | errors.UnsupportedProtocol):
        return Refused(error.reason)
    if isinstance(error, errors.ModelNotFound):
        return NotFound(error.reason)
    if isinstance(error, errors.ModelNotReady | errors.ServerNotReady | errors.ServerNotLive):
        return Unavailable(error.error_msg)
    if isinstance(error, NotImplementedError):
        return NotFound("There is no such operation here. Ask :predict, or /infer without a version.")
    log.error("a request failed", exc_info=error)
    return Failure("The request could not be answered. The server's log says why.")


def response(error: Exception) -> JSONResponse:
    """The same as an HTTP response, in the form that KServe's own errors have."""
    said = failure(error)
    headers = {} if said.retry_after is None else {"retry-after": str(max(1, math.ceil(said.retry_after)))}
    return JSONResponse({"error": str(said)}, status_code=said.http, headers=headers)


def handle(app: FastAPI) -> None:
    """Say what FastAPI itself refuses in the same form; every other exception reaches the door (serving/doors.py)."""

    async def unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        return response(Refused(in_words([problem | {"loc": problem["loc"][1:]} for problem in error.errors()])))

    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(HTTPException, refused)


def in_words(problems: list[Any]) -> str:
    """Pydantic's problems: which instance, which field, what is wrong with it, never what was in it."""
    lines = []
    for problem in problems[:_SHOWN]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in problem["loc"])
        hint = "there is no such field" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        lines.append(f"{place.lstrip('.') or 'body'}: {hint}")
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(dict.fromkeys(lines)) + more
