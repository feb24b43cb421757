"""What a reader hands on: votes that are fit to use, and refusals with a reason that a person can act on."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from coterie.contracts import SPLITS

MAX_TEXT = 1_000_000  # characters of one text
MAX_WORKER_ID = 512  # characters, as in a request to the server
MAX_RANKING = 64  # responses of one ranking


class Vote(NamedTuple):
    """One worker's answer to "which of these two?", oriented chosen over rejected."""

    worker: str  # the pseudonym
    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0  # .5: a tie, in which chosen and rejected are just the order of the source
    prompt_id: str | None = None  # None: made of the prompt's content
    ranking_id: str | None = None
    shown_first: str | None = None
    confidence: float | None = None
    split: str | None = None  # the source's own
    created_at: datetime | None = None


class Votes(NamedTuple):
    """Votes in columns, in the order of Vote's fields; an optional column that no row fills is None."""

    worker: Sequence[str]
    prompt: Sequence[str]
    chosen: Sequence[str]
    rejected: Sequence[str]
    label: Sequence[float]
    prompt_id: Sequence[str | None] | None = None
    ranking_id: Sequence[str | None] | None = None
    shown_first: Sequence[str | None] | None = None
    confidence: Sequence[float | None] | None = None
    split: Sequence[str | None] | None = None
    created_at: Sequence[datetime | None] | None = None


class Refused(Exception):
    """A row cannot be used; the text is the reason."""


class Unreadable(NamedTuple):
    """In place of a record that could not even be parsed."""

    reason: str


class Refusal(NamedTuple):
    """A refused row."""

    line: int
    reason: str
    record: object


def check_text(text: object, name: str) -> str:
    """Return `text`. Raises Refused unless it is a non-empty string, not too long, in valid Unicode."""
    if not isinstance(text, str):
        raise Refused(f"{name} is missing" if is_missing(text) else f"{name} is not text but {_kind(text)}")
    if not text or text.isspace():
        raise Refused(f"{name} is empty")
    return check_unicode(text, name)


def check_unicode(text: str, name: str) -> str:
    """Return `text`. Raises Refused where it is over a million characters or holds half a surrogate pair."""
    if len(text) > MAX_TEXT:
        raise Refused(f"{name} is over {MAX_TEXT:,} characters long")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(f"{name} is not valid Unicode") from None
    return text


def check_pair(prompt: object, chosen: object, rejected: object) -> tuple[str, str, str]:
    """Return the three texts. Raises Refused where one cannot be used or the responses are the same.

    An empty prompt is accepted (some sources compare bare texts), a missing one is not.
    """
    prompt = check_unicode(prompt, "prompt") if isinstance(prompt, str) else check_text(prompt, "prompt")
    chosen, rejected = check_text(chosen, "chosen"), check_text(rejected, "rejected")
    if chosen == rejected:
        raise Refused("the two responses are identical")
    return prompt, chosen, rejected


def check_pairs(prompts: Sequence[Any], chosen: Sequence[Any], rejected: Sequence[Any]) -> None:
    """Pass where `check_pair` accepts every row as it is.

    Raises:
        Refused, TypeError, UnicodeError: it does not; which row and why is for `check_pair` to say.
    """
    for texts in (prompts, chosen, rejected):
        whole = "".join(texts)
        if not whole.isascii():
            whole.encode()
        if len(whole) > MAX_TEXT and max(map(len, texts)) > MAX_TEXT:
            raise Refused("a text is too long")
    for texts in (chosen, rejected):
        if not all(texts) or any(map(str.isspace, texts)):
            raise Refused("a response is empty")
    if any(map(operator.eq, chosen, rejected)):
        raise Refused("two responses are identical")


def check_worker(value: object) -> str:
    """A worker id as text; whole numbers are accepted. Raises Refused where there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a whole-number column with gaps arrives as floats
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise Refused("no worker id")
    if not isinstance(value, str):
        raise Refused(f"the worker id is not text but {_kind(value)}")
    if len(value) > MAX_WORKER_ID:
        raise Refused(f"the worker id is over {MAX_WORKER_ID} characters long")
    return check_unicode(value, "worker id")


_LABELS: dict[object, float] = {
    **dict.fromkeys((1, "1", "1.0", "chosen", "first", "a", "A"), 1.0),
    **dict.fromkeys((0, "0", "0.0", "rejected", "second", "b", "B"), 0.0),
    **dict.fromkeys((0.5, "0.5", ".5", "tie"), 0.5),
}


def check_label(value: object) -> float:
    """1: the chosen one is better, 0: the rejected one, .5: a tie; also in words (chosen, first, a, tie)."""
    try:
        return _LABELS[value]
    except (KeyError, TypeError):
        raise Refused("the label is not 1, 0, 0.5, chosen, rejected, first, second, a, b or tie") from None


def check_identifier(value: object, name: str) -> str | None:
    """An optional id of the source (prompt, ranking) as text."""
    if type(value) is str:
        return check_unicode(value, name) if value else None
    if is_missing(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Refused(f"{name} is neither text nor a whole number but {_kind(value)}")


def check_confidence(value: object) -> float | None:
    """An optional confidence between 0 (a guess) and 1 (certain)."""
    if is_missing(value) or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise Refused("the confidence is not a number between 0 and 1")
    return number


def check_shown_first(value: object) -> str | None:
    """Which response was shown first (or on the left): "chosen", "rejected", or not known."""
    if is_missing(value) or value == "":
        return None
    if isinstance(value, str) and value in ("chosen", "rejected"):
        return value
    raise Refused('shown_first is neither "chosen" nor "rejected"')


def check_split(value: object) -> str | None:
    """The source's own split of the prompt: train, validation or test."""
    if is_missing(value) or value == "":
        return None
    if isinstance(value, str) and value in SPLITS:
        return value
    raise Refused(f"the split is not one of {', '.join(SPLITS)}")


def check_time(value: object) -> datetime | None:
    """An optional time: ISO 8601 (UTC where it names no zone), seconds since 1970, or a timestamp."""
    if is_missing(value) or value == "":
        return None
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            time = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, datetime):
            time = value
        else:
            raise ValueError
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise Refused("created_at is neither ISO 8601 nor seconds since 1970") from None


def is_missing(value: object) -> bool:
    """Whether a table's cell holds nothing: null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}.get(
        type(value), type(value).__name__
    )
