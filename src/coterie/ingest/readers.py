"""What the readers of all formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, Protocol

from coterie.ingest.pseudonyms import pseudonym
from coterie.ingest.sources import ROWS, Block, Blocks
from coterie.ingest.validation import Refusal, Refused, Unreadable, Vote, Votes, check_worker

# Column names under which worker ids are found, the first that is there.
WORKER_COLUMNS = (
    "worker",
    "worker_id",
    "annotator",
    "annotator_id",
    "user_id",
    "rater",
    "rater_id",
    "labeler",
    "labeler_id",
    "participant_id",
    "evaluator",
    "evaluator_id",
    "user",
)


_ODD = (Refused, LookupError, TypeError, ValueError)  # what operations on columns raise for a record that is not plain
_PIECE = 64  # records


class Naming:
    """From raw worker ids to their names in the result: pseudonyms with `key`, the ids themselves without."""

    def __init__(self, key: bytes | None) -> None:
        self._name = cache(lambda worker: pseudonym(key, check_worker(worker)))

    def __call__(self, worker: object) -> str:
        """The name of one worker. Raises Refused where the id cannot be used."""
        return self._name(worker if type(worker) is str else check_worker(worker))

    def column(self, workers: list[Any]) -> list[str]:
        """The names of a column of workers. Raises Refused where an id cannot be used."""
        return list(map(self._name if set(map(type, workers)) == {str} else self, workers))


class Reader(Protocol):
    """Turns the records of one format into votes. The worker id leaves it as a pseudonym only."""

    worker_column: str
    columns: tuple[str, ...]  # top-level columns that it reads; a refused row is kept with these

    def read(self, blocks: Blocks) -> Iterator[Votes | Refusal]:
        """Yield the votes, in order and some at a time, and a refusal for each record that cannot be used."""
        ...


def each(
    blocks: Blocks, columns: Callable[[list[Any]], Votes], votes: Callable[[dict[str, Any]], list[Vote]]
) -> Iterator[Votes | Refusal]:
    """Read the records of each block by `columns` where they are all plain, the odd ones one by one by `votes`.

    Args:
        columns: the votes of plain records, the same that `votes` makes of each. Where one is odd it raises one of
            `_ODD`, and need not say which it is, or why.
        votes: the votes of one record. Raises Refused with the reason.
    """
    for block in blocks:
        try:
            plain = columns(block.records)
        except _ODD:
            yield from _in_pieces(block, columns, votes)
        else:
            yield plain


def _in_pieces(
    block: Block, columns: Callable[[list[Any]], Votes], votes: Callable[[dict[str, Any]], list[Vote]]
) -> Iterator[Votes | Refusal]:
    """Read a block that holds odd records, so that most of the others are still read by columns."""
    parts: list[Votes] = []
    for start in range(0, len(block.records), _PIECE):
        lines, records = block.lines[start : start + _PIECE], block.records[start : start + _PIECE]
        try:
            parts.append(columns(records))
        except _ODD:
            for item in in_columns(_one_by_one(zip(lines, records, strict=True), votes)):
                if isinstance(item, Votes):
                    parts.append(item)
                else:
                    yield item
    if parts:
        sizes = [len(part.worker) for part in parts]
        yield Votes._make(_joined(column, sizes) for column in zip(*parts, strict=True))


def _joined(parts: Sequence[Sequence[Any] | None], sizes: list[int]) -> list[Any] | None:
    if all(part is None for part in parts):
        return None
    filled = ([None] * size if part is None else part for part, size in zip(parts, sizes, strict=True))
    return list(chain.from_iterable(filled))


def in_columns(items: Iterable[Vote | Refusal]) -> Iterator[Votes | Refusal]:
    """Put votes together, at most `ROWS` at a time."""
    pending: list[Vote] = []
    for item in items:
        if isinstance(item, Refusal):
            yield item
            continue
        pending.append(item)
        if len(pending) == ROWS:
            yield Votes(*zip(*pending, strict=True))
            pending = []
    if pending:
        yield Votes(*zip(*pending, strict=True))


def _one_by_one(
    rows: Iterable[tuple[int, Any]], votes: Callable[[dict[str, Any]], list[Vote]]
) -> Iterator[Vote | Refusal]:
    for line, record in rows:
        try:
            if type(record) is not dict:
                raise Refused(record.reason if isinstance(record, Unreadable) else "not a JSON object")
            yield from votes(record)
        except Refused as refused:
            yield Refusal(line, str(refused), record)
