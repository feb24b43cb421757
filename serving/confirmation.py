"""Whether what was deployed is what answers: golden scores, asked through the Service."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from pydantic import ValidationError

from coterie.contracts import Manifest, Prediction, PredictResponse
from coterie.errors import RunFailed
from coterie.golden import disagreement

log = logging.getLogger("coterie.serving")

MODEL = "coterie"

_IN_A_ROW = 5  # answers of the new bundle until it is believed that no other answers
_PAUSE = 0.5  # seconds between two questions
_PASSING = (429, 502, 503, 504)
_ANY_QUESTION = [{"prompt": "Shall we?", "responses": ["Yes.", "No."]}]


def confirm(
    service: str, manifest: Manifest | None, golden: Sequence[Mapping[str, Any]], deadline: float
) -> tuple[str, str]:
    """Ask golden scores through the Service until only the new bundle answers; its model and mixture version.

    Args:
        service: address of the router.
        manifest, golden: of the bundle; None and none of one on a claim, which only its pods see.
        deadline: by time.monotonic.

    Raises:
        RunFailed: scores come out otherwise, the question is refused, or others still answer at `deadline`.
    """
    from serving.doors import bearer, load_token  # imports KServe

    if manifest is None:
        log.info(
            "the bundle is on a claim, which this step does not see: that its golden scores are right, its pods say"
        )
    in_a_row, last, versions = 0, "nobody answered", set[str]()
    predictions: list[Prediction] | None = None
    # A connection for each question, so that every replica has its turn.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(headers=bearer(load_token(os.environ)), timeout=30, limits=limits) as asking:
        while in_a_row < _IN_A_ROW:
            if time.monotonic() > deadline:
                raise RunFailed(f"{service}: {last}. See the logs of the router and the predictor.")
            predictions, last = _ask(asking, service, golden or _ANY_QUESTION)
            if predictions is None:
                in_a_row = 0
            else:
                before, versions = versions, {prediction.model_version for prediction in predictions}
                expected = {manifest.model_version} if manifest else before or versions
                in_a_row = in_a_row + 1 if versions == expected else 0
                if manifest is not None and in_a_row:
                    _check(service, predictions, golden, exact=manifest.reward == "head")
                last = f"the bundle {', '.join(sorted(versions))} answers, not {', '.join(sorted(expected))}"
            if in_a_row < _IN_A_ROW:
                time.sleep(_PAUSE)
    assert predictions is not None
    return predictions[0].model_version, predictions[0].mixture_version


def _check(service: str, predictions: Sequence[Prediction], golden: Sequence[Mapping[str, Any]], exact: bool) -> None:
    """Raises RunFailed: the scores are not the golden ones."""
    told = [
        {"global": one.by_global, "coteries": list(zip(*(k.scores for k in one.coteries), strict=True))}
        for prediction in predictions
        if (one := prediction.explanation) is not None
    ]
    if (off := disagreement(golden, told, exact)) is not None:
        raise RunFailed(
            f"{service}: {off}, so that other scores are served than the bundle was judged by. Serve with the images that made "
            "it, or make it again."
        )


def _ask(
    asking: httpx.Client, service: str, questions: Sequence[Mapping[str, Any]]
) -> tuple[list[Prediction] | None, str]:
    """Answers to questions of nobody in particular; or None, and why there are none yet."""
    url = f"{service}/v1/models/{MODEL}:predict"
    instances = [{"prompt": one["prompt"], "responses": one["responses"]} for one in questions]
    try:
        answer = asking.post(url, json={"instances": instances, "explain": True})
    except httpx.HTTPError as error:
        return None, f"no answer ({type(error).__name__}: {error})"
    if answer.status_code in _PASSING:
        return None, f"{answer.status_code} {answer.text[:300]}"
    try:
        return PredictResponse.model_validate_json(answer.raise_for_status().content).predictions, ""
    except (httpx.HTTPStatusError, ValidationError) as error:
        token = " Give this step the router's COTERIE_TOKEN." if answer.status_code == 401 else ""
        raise RunFailed(f"{url} answered {answer.status_code}: {answer.text[:300]}.{token}") from error
