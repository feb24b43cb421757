"""PRISM's utterances (Kirk et al. 2024, arXiv 2404.16019): a turn's chosen response against each other of
that turn.

One row is one response: user_id, conversation_id, interaction_id (the turn), within_turn_id (its place on
the screen), user_prompt, model_response, if_chosen. The prompt is the conversation so far, with the
responses that the worker chose. prompt_id is the conversation, whose turns repeat each other's text, so
that it is held out whole; ranking_id is the turn. Rows of a turn stand together, turns in their order, as
published.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby
from typing import Any

from coterie.contracts import content_id
from coterie.ingest.conversations import transcript
from coterie.ingest.readers import Naming, in_columns
from coterie.ingest.sources import Blocks
from coterie.ingest.validation import (
    Refusal,
    Refused,
    Unreadable,
    Vote,
    Votes,
    check_identifier,
    check_text,
    check_unicode,
)

REQUIRED = frozenset({"user_id", "conversation_id", "interaction_id", "user_prompt", "model_response", "if_chosen"})
_CHOSEN = {
    True: True,
    False: False,
    "True": True,
    "False": False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}


class PrismReader:
    """Reader of PRISM's utterances."""

    worker_column = "user_id"
    columns: tuple[str, ...] = (*sorted(REQUIRED), "within_turn_id", "score")

    def __init__(self, name_worker: Naming) -> None:
        self._name_worker = name_worker
        self._conversation: str | None = None
        self._history: list[tuple[str, str]] = []
        self._seen: set[bytes] = set()  # digests of turns, to refuse one whose rows are scattered

    def read(self, blocks: Blocks) -> Iterator[Votes | Refusal]:
        """Yield the votes of the turns; a bad response is refused alone, a turn without a choice whole."""
        rows = chain.from_iterable(zip(*block, strict=True) for block in blocks)
        turns = groupby(rows, key=lambda row: _turn(row[1]))
        return in_columns(chain.from_iterable(self._turn(turn, list(members)) for turn, members in turns))

    def _turn(self, turn: str | None, members: list[tuple[int, Any]]) -> Iterator[Vote | Refusal]:
        usable: list[tuple[int, dict[str, Any], bool]] = []
        for line, record in members:
            try:
                usable.append((line, record, _check(record)))
            except Refused as refused:
                yield Refusal(line, str(refused), record)
        if not usable:
            return
        try:
            votes = self._votes(str(turn), [(record, is_chosen) for _, record, is_chosen in usable])
        except Refused as refused:
            for line, record, _ in usable:
                yield Refusal(line, str(refused), record)
        else:
            yield from votes

    def _votes(self, turn: str, responses: list[tuple[dict[str, Any], bool]]) -> list[Vote]:
        digest = bytes.fromhex(content_id(turn))
        if digest in self._seen:
            raise Refused("rows of one interaction_id do not stand together; sort by conversation_id and turn")
        self._seen.add(digest)
        best = [record for record, is_chosen in responses if is_chosen]
        if len(best) != 1:
            raise Refused(f"a turn with {len(best)} chosen responses instead of one")
        chosen = best[0]
        conversation = check_identifier(chosen["conversation_id"], "conversation_id")
        if conversation is None:
            raise Refused("conversation_id is missing")
        if conversation != self._conversation:
            self._conversation, self._history = conversation, []
        question, answer = ("user", chosen["user_prompt"]), ("assistant", chosen["model_response"])
        prompt = check_unicode(transcript([*self._history, question]), "the conversation so far")
        self._history += [question, answer]
        others = [record for record, _ in responses if record["model_response"] != answer[1]]
        if not others:
            raise Refused("no other response in the turn to compare the chosen one with")
        worker = self._name_worker(chosen["user_id"])
        return [
            Vote(
                worker,
                prompt,
                answer[1],
                other["model_response"],
                1.0,
                conversation,
                turn,
                _first(chosen, other),
            )
            for other in others
        ]


def _turn(record: Any) -> str | None:
    turn = record.get("interaction_id") if isinstance(record, dict) else None
    return turn if isinstance(turn, str) else None


def _check(record: Any) -> bool:
    """Whether the response was chosen. Raises Refused where the row cannot be used."""
    if not isinstance(record, dict):
        raise Refused(record.reason if isinstance(record, Unreadable) else "not a JSON object")
    missing = sorted(REQUIRED - record.keys())
    if missing:
        raise Refused(f"{missing[0]} is missing")
    check_text(record["interaction_id"], "interaction_id")
    check_text(record["user_prompt"], "user_prompt")
    check_text(record["model_response"], "model_response")
    value = record["if_chosen"]
    if not isinstance(value, bool | str) or value not in _CHOSEN:
        raise Refused("if_chosen is neither true nor false")
    return _CHOSEN[value]


def _first(chosen: dict[str, Any], other: dict[str, Any]) -> str | None:
    try:
        return "chosen" if int(chosen["within_turn_id"]) < int(other["within_turn_id"]) else "rejected"
    except (KeyError, TypeError, ValueError):
        return None
