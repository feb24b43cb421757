"""Preference rows as TRL writes them: explicit or implicit prompt, plain text or lists of messages.

See TRL's documentation, "Dataset formats and types": a preference row has chosen and rejected, and the
prompt either beside them or as their common beginning; in the conversational form each is a list of
{"role", "content"}.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from coterie.ingest.validation import Refused, is_missing

_TURN = "\n\nAssistant:"  # what a response follows in transcripts written as one text


def as_texts(prompt: object, chosen: object, rejected: object) -> tuple[object, object, object]:
    """Return prompt, chosen and rejected as texts; the common beginning is the prompt where none is given.

    Lists of messages become text as `transcript` writes it. What is neither text nor messages is returned
    as it is, for validation to refuse. Raises Refused for messages without role and text, or without an
    answer after the prompt.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        first, second = [_message(m) for m in chosen], [_message(m) for m in rejected]
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
        before = first[:shared]
        if is_missing(prompt):
            prompt = transcript(before)
            if not prompt:
                raise Refused("no prompt, and chosen and rejected have no first message in common")
        elif isinstance(prompt, list):
            given = [_message(m) for m in prompt]
            prompt = transcript(before if before[: len(given)] == given else given + before)
        return prompt, transcript(first[shared:]), transcript(second[shared:])
    if isinstance(prompt, list):
        prompt = transcript([_message(m) for m in prompt])
    if is_missing(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        return split_prompt(chosen, rejected)
    return prompt, chosen, rejected


def transcript(messages: list[tuple[str, str]]) -> str:
    """Messages (role, content) as one text: a single one bare, several each after "role: "."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def split_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split off the common beginning of two texts as their prompt.

    It ends after the last turn marker where there is one; else at the last line break, or else the last
    space, so that responses that happen to begin with the same letters are not cut inside a word.
    """
    size = len(_common(chosen, rejected))
    marks = {mark: chosen.rfind(mark, 0, size) for mark in (_TURN, "\n", " ")}
    ends = (at + len(mark) for mark, at in marks.items() if at >= 0)
    end = next((end for end in ends if not chosen[:end].isspace()), None)
    if end is None:
        raise Refused("no prompt, and chosen and rejected have no beginning in common")
    return chosen[:end].rstrip(), chosen[end:].lstrip(), rejected[end:].lstrip()


def _common(a: str, b: str) -> str:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection over slices compares in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return a[:low]


def _message(message: Any) -> tuple[str, str]:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "\n".join(p["text"] for p in content)
        if isinstance(role, str) and isinstance(content, str):
            return role, content
    raise Refused("a message without role and text content")
