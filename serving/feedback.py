"""The router's feedback endpoint: votes in, committed before they are acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import kserve
import orjson
from fastapi import APIRouter, Request, Response
from kserve.errors import InvalidInput, ModelNotReady
from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse
from prometheus_client import Counter

from coterie.config import FeedbackSettings
from coterie.errors import BackendUnavailable, BadData, Conflict, StorageFull
from coterie.feedback.database import Database
from coterie.feedback.evidence import Infer
from coterie.feedback.intake import read_body, read_comparisons
from coterie.feedback.journal import Journal, Outcome, Overloaded
from coterie.feedback.relay import Published, Relay
from coterie.routing import Profile

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger("coterie.serving")

MODEL = "coterie-feedback"
PATH = "/v1/feedback"
COMPARISONS = Counter(
    "coterie_feedback_comparisons", "Comparisons sent as feedback, by what became of them", ["outcome"]
)
_LARGE = 65_536  # bytes of a body that is read off the event loop
_PATIENCE = 30.0  # seconds that a request waits for its commit


class Feedback:
    """Takes votes, and keeps the profiles of those who vote up to date. Before the first `follow` none are taken.

    Args:
        settings: the database, the daily cap, the share that is held out.
    """

    def __init__(self, settings: FeedbackSettings) -> None:
        self._settings = settings
        self._key: bytes | None = None
        self.database: Database | None = None
        self._relay: Relay | None = None
        self._journal: Journal | None = None

    @property
    def opened(self) -> bool:
        """Whether votes are taken."""
        return self._journal is not None

    def follow(
        self,
        key: bytes | None,
        published: Published | None,
        infer: Infer,
        push: Callable[[Sequence[Profile]], None],
    ) -> None:
        """Take votes for the mixture that serves from now on; the first time the database is opened.

        Args:
            key: ingest's pseudonym key; None where worker ids are used as they came.
            published: the profiles that feedback comes on top of; None: there are none, votes are stored and wait.
            infer: places by their mixture.
            push: puts profiles online (`push_to`).

        Raises:
            BadConfiguration, BadData, BackendUnavailable: as feedback.database.Database.
        """
        self._key = key
        if self._relay is not None:
            self._relay.follow(published, infer, push)
            return
        self.database = Database(self._settings.database)
        self._relay = Relay(self.database, published, infer, push)
        self._journal = Journal(self.database, self._settings.daily_cap, self._settings.most_waiting, self._relay.wake)
        self._relay.start()

    def close(self) -> None:
        """Commit what waits; what is not online yet stays in the outbox."""
        if self._journal is not None and self._relay is not None and self.database is not None:
            self._journal.close()
            self._relay.close()
            self.database.close()

    async def take(self, records: list[Any]) -> list[Outcome]:
        """Store comparisons; they are committed when this returns.

        Raises:
            BadData, Conflict: as feedback.intake.read_comparisons and feedback.journal.Journal. Nothing was stored.
            BackendUnavailable, StorageFull, Overloaded: not stored, or not known to be; the same request may be sent again.
        """
        try:
            if self._journal is None:
                raise BackendUnavailable("the feedback database is not open yet")
            done = self._journal.submit(read_comparisons(records, self._key, self._settings.holdout))
            outcomes = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(done)), _PATIENCE)
        except BaseException as error:
            COMPARISONS.labels(_OUTCOMES.get(type(error), "failed")).inc(max(1, len(records)))
            if isinstance(error, TimeoutError):
                raise BackendUnavailable("The database takes too long. Send the same request again.") from error
            raise
        for outcome in outcomes:
            COMPARISONS.labels(outcome.status if outcome.counts else "over-cap").inc()
        return outcomes


_OUTCOMES: dict[type[BaseException], str] = {BadData: "refused", Conflict: "conflict", Overloaded: "overloaded"}


def push_to(store: FeatureStore) -> Callable[[Sequence[Profile]], None]:
    """Puts profiles into Feast's online store."""
    from feature_repo.store import push

    def pushing(profiles: Sequence[Profile]) -> None:
        try:
            push(store, profiles)
        except Exception as error:  # whatever the store's backend raises
            raise BackendUnavailable(f"Feast took no profiles: {type(error).__name__}: {error}") from error

    return pushing


def routes(feedback: Feedback) -> APIRouter:
    """POST /v1/feedback: one comparison, or {"comparisons": [...]}."""
    router = APIRouter()

    @router.post(PATH)
    async def take(request: Request) -> Response:
        """Store votes, and answer when they are committed."""
        body = await request.body()
        try:
            records = read_body(body) if len(body) < _LARGE else await asyncio.to_thread(read_body, body)
            outcomes = await feedback.take(records)
        except BadData as error:
            return _refusal(400, str(error))
        except Conflict as error:
            return _refusal(409, str(error))
        except Overloaded as error:
            return _refusal(429, str(error), retry=1)
        except StorageFull as error:
            log.error("feedback was not stored: %s", error)
            return _refusal(507, "The feedback database is full; nothing was stored. Send it again later.", retry=60)
        except BackendUnavailable as error:
            log.error("feedback was not stored: %s", error)
            words = "The feedback database does not take votes now. Send the same request again: it counts once."
            return _refusal(503, words, retry=1)
        except Exception:
            log.exception("feedback was not stored")
            return _refusal(500, "The votes could not be stored. The server's log says why.")
        return Response(orjson.dumps({"comparisons": outcomes}), media_type="application/json")

    return router


def _refusal(status: int, words: str, retry: int | None = None) -> Response:
    headers = {} if retry is None else {"retry-after": str(retry)}
    return Response(orjson.dumps({"error": words}), status, headers, "application/json")


class FeedbackModel(kserve.Model):  # type: ignore[misc]
    """The same over the Open Inference Protocol, REST and gRPC: input "comparison" BYTES [n], each a JSON object; output
    "outcome" BYTES [n]."""

    def __init__(self, feedback: Feedback) -> None:
        super().__init__(MODEL)
        self._feedback = feedback
        self.ready = True

    async def healthy(self) -> bool:
        """Ready when votes are taken."""
        return bool(self.ready) and self._feedback.opened

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: Any = None
    ) -> InferResponse:
        """Store votes. Raises InvalidInput (400), also of a conflict; ModelNotReady (503)."""
        if not isinstance(payload, InferRequest):
            raise InvalidInput(f"Send this model the Open Inference Protocol, or JSON to {PATH}.")
        records = [_record(raw) for raw in _documents(payload.inputs)]
        try:
            outcomes = await self._feedback.take(records)
        except (BadData, Conflict) as error:
            raise InvalidInput(str(error)) from None
        except BackendUnavailable as error:
            log.error("feedback was not stored: %s", error)
            raise ModelNotReady(MODEL, "The feedback database does not take votes now. Send them again.") from error
        output = InferOutput("outcome", [len(outcomes)], "BYTES", [orjson.dumps(one).decode() for one in outcomes])
        return InferResponse(payload.id or "", MODEL, [output])


def _documents(inputs: list[InferInput]) -> list[Any]:
    if [one.name for one in inputs] != ["comparison"] or inputs[0].datatype != "BYTES":
        raise InvalidInput('Send one input, "comparison", of BYTES: a JSON object each.')
    try:
        return list(inputs[0].as_numpy().reshape(-1))
    except ValueError:
        raise InvalidInput("comparison: its shape is not that of its data.") from None


def _record(raw: Any) -> Any:
    try:
        return orjson.loads(raw)
    except (orjson.JSONDecodeError, TypeError):
        raise InvalidInput("comparison: not a JSON object.") from None
