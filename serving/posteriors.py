"""Where people stand by their feedback: what the predictor computes, and how a router without torch asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import httpx
from fastapi import APIRouter
from pydantic import BaseModel, Field

from coterie.errors import BackendUnavailable, BadData
from coterie.feedback.evidence import Evidence, Place

if TYPE_CHECKING:
    from coterie.feedback.posteriors import Posteriors

PATH = "/v1/posteriors"
_TOO_MUCH = (400, 413, 422)
_PATIENCE = 60.0  # seconds: people who have said much are encoded anew after a restart of the predictor


class Question(BaseModel):
    """Body of a request."""

    mixture_version: str
    people: list[Evidence] = Field(min_length=1, max_length=256)


class Answer(BaseModel):
    """Body of an answer: the people's places, in their order; none where the predictor serves another mixture."""

    mixture_version: str
    places: list[Place]


def routes(serving: Callable[[], Posteriors]) -> APIRouter:
    """The predictor's side, by the bundle that serves when a question comes. One is worked on at a time."""
    router, turn = APIRouter(), asyncio.Lock()

    @router.post(PATH)
    async def posteriors(question: Question) -> Answer:
        """Infer places by this predictor's mixture."""
        infer = serving()
        if question.mixture_version != infer.mixture_version:
            return Answer(mixture_version=infer.mixture_version, places=[])
        async with turn:
            places = await asyncio.to_thread(infer, question.people)
        return Answer(mixture_version=infer.mixture_version, places=places)

    return router


class RemotePosteriors:
    """The router's side: feedback.posteriors.Infer over HTTP.

    Args:
        url: of the predictor, as http://host:port.
        mixture_version: of the profiles that feedback comes on top of.
        headers: of every request (doors.bearer).
    """

    def __init__(self, url: str, mixture_version: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self._client = httpx.Client(base_url=url, timeout=_PATIENCE, headers=dict(headers))
        self._version = mixture_version

    def __call__(self, people: Sequence[Evidence]) -> list[Place]:
        """The places of people.

        Raises:
            BackendUnavailable: the predictor does not answer, or serves another mixture (yet, or already).
            BadData: it does not take so much at once, or not this.
        """
        question = Question(mixture_version=self._version, people=list(people))
        try:
            response = self._client.post(
                PATH, content=question.model_dump_json(), headers={"content-type": "application/json"}
            )
            if response.status_code in _TOO_MUCH:
                raise BadData(f"the predictor refuses what {len(people)} people have said ({response.status_code})")
            response.raise_for_status()
            answer = Answer.model_validate_json(response.content)
        except (httpx.HTTPError, ValueError) as error:
            raise BackendUnavailable(f"the predictor infers no posteriors: {type(error).__name__}: {error}") from error
        if answer.mixture_version != self._version:
            raise BackendUnavailable(f"the predictor serves mixture {answer.mixture_version}, not {self._version}")
        return answer.places
