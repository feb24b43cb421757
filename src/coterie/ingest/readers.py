"""What the readers of all formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from coterie.ingest.sources import Rows
from coterie.ingest.validation import Refusal, Refused, Unreadable, Vote

Naming = Callable[[object], str]  # from a raw worker id to the pseudonym; raises Refused

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


class Reader(Protocol):
    """Turns the records of one format into votes. The worker id leaves it as a pseudonym only."""

    worker_column: str
    columns: tuple[str, ...]  # top-level columns that it reads; a refused row is kept with these

    def read(self, rows: Rows) -> Iterator[Vote | Refusal]:
        """Yield a vote, or several, or a refusal for each record."""
        ...


def each(rows: Rows, votes: Callable[[dict[str, Any]], list[Vote]]) -> Iterator[Vote | Refusal]:
    """Apply `votes` to each record; where it raises Refused, and for what is no record, yield a refusal."""
    for line, record in rows:
        try:
            if type(record) is not dict:
                raise Refused(record.reason if isinstance(record, Unreadable) else "not a JSON object")
            yield from votes(record)
        except Refused as refused:
            yield Refusal(line, str(refused), record)
