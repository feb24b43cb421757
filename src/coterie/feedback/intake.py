"""From what a person sent to rows of the feedback table: checked as ingest checks, named as ingest names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from coterie.contracts import content_id
from coterie.errors import BadData, Conflict
from coterie.ingest.identifiers import comparison_id, pair_id
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.ingest.validation import (
    MAX_WORKER_ID,
    Refused,
    check_confidence,
    check_identifier,
    check_label,
    check_pair,
    check_shown_first,
    check_worker,
)
from coterie.uplift import holdout

MOST = 1000
"""Comparisons of one request."""
SOURCE = "feedback"
FIELDS = (
    "worker_id", "prompt", "chosen", "rejected", "label", "confidence", "shown_first", "ranking_id", "comparison_id", "served",
)  # fmt: skip
_SERVED, _PERSONAL = ("request_id", "source", "reason", "scores"), ("profile", "comparisons")
_SHOWN = 5  # problems of one request that are told at once
_OTHER_SIDE = {"chosen": "rejected", "rejected": "chosen", None: None}

Row = dict[str, Any]


def read_body(body: bytes) -> list[Any]:
    """The comparisons of a body: one object, or {"comparisons": [...]}. Raises BadData in words that repeat no text."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadData(f"The body is not JSON ({error.msg}). Send a comparison as application/json.") from None
    if isinstance(payload, dict) and "comparisons" in payload:
        if extra := payload.keys() - {"comparisons"}:
            raise BadData(f"{min(extra)[:60]}: there is no such field beside comparisons.")
        payload = payload["comparisons"]
    elif isinstance(payload, dict):
        payload = [payload]
    if not isinstance(payload, list):
        raise BadData('Send a comparison {"worker_id", "prompt", "chosen", "rejected"}, or {"comparisons": [...]}.')
    return payload


def read_comparisons(records: list[Any], key: bytes | None, share: float = 0.0) -> list[Row]:
    """Rows of the feedback table, but for the time and whether they count.

    Args:
        records: as `FIELDS` names them; label is 1, 0 (the rejected one is better), .5 or in words, as ingest reads it.
        key: of the pseudonyms; None where worker ids are used as they came.
        share: of requests that the global reward answers (`holdout`).

    Raises:
        BadData: none, too many, or some that ingest would refuse; says which and why, never what was in them.
        Conflict: a comparison_id that is not the comparison's.
    """
    if not 1 <= len(records) <= MOST:
        raise BadData(f"comparisons: send 1 to {MOST} in one request, not {len(records)}.")
    rows, problems = [], []
    made_with = fingerprint(key) if key else ""
    for number, record in enumerate(records):
        try:
            rows.append(_row(record, key, made_with, share))
        except Refused as refused:
            problems.append(f"comparisons[{number}]: {refused}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BadData("; ".join(problems[:_SHOWN]) + more + ". Nothing was stored; correct them and send all again.")
    for number, (row, record) in enumerate(zip(rows, records, strict=True)):
        if record.get("comparison_id") not in (None, row["comparison_id"]):
            raise Conflict(
                f"comparisons[{number}]: its comparison_id is another comparison's. Ids are made of worker, texts and label: "
                "leave it out, or send what was acknowledged under it."
            )
    return rows


def _row(record: Any, key: bytes | None, made_with: str, share: float) -> Row:
    if not isinstance(record, dict):
        raise Refused("not an object")
    if extra := record.keys() - set(FIELDS):
        raise Refused(f"there is no field {min(extra)[:60]!r}")
    worker = pseudonym(key, check_worker(record.get("worker_id")))
    prompt, chosen, rejected = check_pair(record.get("prompt"), record.get("chosen"), record.get("rejected"))
    label, shown_first = check_label(record.get("label", 1)), check_shown_first(record.get("shown_first"))
    preferred = 0
    if label == 0:
        label, chosen, rejected, shown_first, preferred = 1.0, rejected, chosen, _OTHER_SIDE[shown_first], 1
    first, second = content_id(prompt, chosen), content_id(prompt, rejected)
    row = {
        "comparison_id": comparison_id(worker, first, second, label),
        "worker_id": worker,
        "prompt": prompt,
        "prompt_id": content_id(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "chosen_id": first,
        "rejected_id": second,
        "pair_id": pair_id(first, second),
        "label": label,
        "ranking_id": _short(check_identifier(record.get("ranking_id"), "ranking_id"), "ranking_id"),
        "shown_first": shown_first,
        "confidence": check_confidence(record.get("confidence")),
        "source": SOURCE,
        "key_fingerprint": made_with,
        **_served(record.get("served"), worker, preferred, share),
    }
    for name in ("worker_id", "prompt", "chosen", "rejected", "ranking_id", "request_id"):
        if "\0" in (row[name] or ""):  # which PostgreSQL cannot store
            raise Refused(f"{name} holds a NUL character")
    return row


def _served(served: Any, worker: str, preferred: int, share: float) -> Mapping[str, Any]:
    """How the prediction that the person saw had ranked the two responses, and in which arm of the holdout it was."""
    nothing = {"request_id": None, "arm": None, "propensity": None, "agreed": None}
    if served is None:
        return nothing
    if not isinstance(served, dict) or (served.keys() - set(_SERVED)):
        raise Refused(f"served is not an object with {', '.join(_SERVED)}")
    request = _short(check_identifier(served.get("request_id"), "served.request_id"), "served.request_id")
    scores = served.get("scores")
    if request is None or not (
        isinstance(scores, list)
        and len(scores) == 2
        and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
    ):
        raise Refused("served needs the request_id and scores: those of the chosen and of the rejected response")
    held_out, propensity = holdout(worker, request, share)
    arm = "holdout" if served.get("reason") == "holdout" else "own" if served.get("source") in _PERSONAL else None
    if arm != ("holdout" if held_out else "own"):
        arm = None  # a stranger's, whom the global reward answers anyway, or of another share than this
    margin = scores[preferred] - scores[1 - preferred]
    agreed = 0.5 if margin == 0 else float(margin > 0)
    return {"request_id": request, "arm": arm, "propensity": propensity if arm else None, "agreed": agreed}


def _short(value: str | None, name: str) -> str | None:
    if value is not None and len(value) > MAX_WORKER_ID:
        raise Refused(f"{name} is over {MAX_WORKER_ID} characters long")
    return value
