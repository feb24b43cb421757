"""What router and predictor share: one question in three protocols, validated in words, counted by what became of it."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar

import kserve
from kserve import InferRequest, InferResponse
from kserve.model import InferenceVerb
from pydantic import BaseModel, ValidationError

from coterie.contracts import OUTPUT_TENSORS
from serving import tensors
from serving.failures import Refused, Unavailable, failure, in_words
from serving.metrics import REQUESTS

log = logging.getLogger("coterie.serving")

Request = TypeVar("Request", bound=BaseModel)


class Model(kserve.Model):  # type: ignore[misc]
    """A KServe model that answers V1 and the Open Inference Protocol, over REST and gRPC, alike.

    Its `predict` takes a `request` and returns predictions, whatever the protocol. V1's `:explain` is `:predict` with
    explain: true.
    """

    request: ClassVar[type[BaseModel]]
    inputs: ClassVar[dict[str, tuple[str, list[int]]]]
    log_texts = False

    async def __call__(
        self, body: Any, headers: dict[str, str] | None = None, verb: InferenceVerb = InferenceVerb.PREDICT
    ) -> tuple[dict[str, Any] | InferResponse, dict[str, str]]:
        """Answer in the protocol of the question. Raises Failure."""
        cause = "answered"
        try:
            if not await self.healthy():  # of gRPC requests KServe asks this not
                raise Unavailable(f"The model {self.name} is not ready.")
            request = parse(
                self.request, tensors.read_request(body, self.inputs) if isinstance(body, InferRequest) else body
            )
            if self.log_texts:
                log.info("asked", extra={"asked": request.model_dump(mode="json", exclude_defaults=True)})
            if verb is InferenceVerb.EXPLAIN:
                request = request.model_copy(update={"explain": True})
            predictions, response_headers = await super().__call__(request, headers)
        except Exception as error:
            said = failure(error)
            cause = said.cause
            raise said from None
        finally:
            REQUESTS.labels(self.name, cause).inc()
        if isinstance(body, InferRequest):
            return tensors.write_response(self.name, body, predictions), response_headers
        return {"predictions": [prediction.model_dump() for prediction in predictions]}, response_headers

    def load(self) -> bool:
        """Nothing: KServe calls this in the event loop for a model that is not healthy."""
        return bool(self.ready)

    def validate(self, payload: Any) -> Any:
        """The payload: it was validated as it was read."""
        return payload

    def get_input_types(self) -> list[dict[str, Any]]:
        """Of the model's metadata."""
        return tensors.metadata(self.inputs)

    def get_output_types(self) -> list[dict[str, Any]]:
        """Of the model's metadata."""
        return tensors.metadata(OUTPUT_TENSORS)


def parse(kind: type[Request], payload: Any) -> Request:
    """Read the body of a V1 request.

    Raises:
        Refused: it is not what `kind` describes; says which instance and which field, never what was in them.
    """
    if not isinstance(payload, dict):
        raise Refused(
            'The body is not a JSON object. Send {"instances": [{"worker_id": ..., "prompt": ..., "responses": [...]}]}'
            " as application/json."
        )
    try:
        return kind.model_validate(payload)
    except ValidationError as error:
        # The cause holds people's texts, which no log should show.
        raise Refused(in_words(error.errors(include_url=False, include_context=False, include_input=False))) from None
