"""Tables of preferences: CSV, TSV, Parquet, line JSON and hub data sets whose columns are ours, TRL's, or
mapped.

A row is prompt, chosen, rejected and a worker id; optional: label (1, 0, .5), confidence, shown_first,
split, prompt_id, ranking_id, created_at. Instead of chosen and rejected a row may hold `ranking`, a list of
responses, the best first, which becomes its pairs; where `ranking` is no list, it is the ranking_id. A
source's own pair_id and response ids are not read: ours are made of the content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from operator import itemgetter
from typing import Any

import orjson

from coterie.contracts import content_id
from coterie.errors import BadConfiguration, BadData
from coterie.ingest.conversations import as_texts
from coterie.ingest.readers import WORKER_COLUMNS, Naming, each
from coterie.ingest.sources import Blocks
from coterie.ingest.validation import (
    MAX_RANKING,
    Refusal,
    Refused,
    Vote,
    Votes,
    check_confidence,
    check_identifier,
    check_label,
    check_pair,
    check_pairs,
    check_shown_first,
    check_split,
    check_time,
    is_missing,
)

# Our columns and the names under which they are found without a mapping.
COLUMNS: dict[str, tuple[str, ...]] = {
    "worker_id": WORKER_COLUMNS,
    "prompt": ("prompt",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "ranking": ("ranking",),
    "label": ("label",),
    "prompt_id": ("prompt_id",),
    "ranking_id": ("ranking_id",),
    "shown_first": ("shown_first",),
    "confidence": ("confidence",),
    "split": ("split",),
    "created_at": ("created_at",),
}
_OPTIONAL: dict[str, Callable[[object], object]] = {  # in the order of Vote's fields
    "prompt_id": lambda value: check_identifier(value, "prompt_id"),
    "ranking_id": lambda value: check_identifier(value, "ranking_id"),
    "shown_first": check_shown_first,
    "confidence": check_confidence,
    "split": check_split,
    "created_at": check_time,
}
_OTHER_SIDE = {"chosen": "rejected", "rejected": "chosen", None: None}


def resolve_columns(
    found: Iterable[str], mapping: dict[str, str], where: str, *, implicit_prompt: bool, own_split: bool
) -> dict[str, str]:
    """Our column names -> theirs, for the columns that are there.

    Args:
        found: the columns of the source.
        mapping: what the settings say; it goes before the usual names.
        where: the source, for messages.
        implicit_prompt: accept rows without a prompt column (TRL's implicit prompt).
        own_split: read a column named split although no mapping asks for it. Elsewhere it is another
        program's split,
            seldom by prompt, and is left alone.

    Raises:
        BadConfiguration: the mapping names a column that we do not have.
        BadData: columns are missing.
    """
    unknown = sorted(mapping.keys() - COLUMNS.keys())
    if unknown:
        raise BadConfiguration(f"columns: {', '.join(unknown)} not known; to be mapped: {', '.join(COLUMNS)}")
    there = set(found)
    absent = sorted(theirs for theirs in mapping.values() if theirs not in there)
    if absent:
        raise BadData(f"{where}: no column {', '.join(absent)}. {_found(there)} Correct --columns.")
    columns = dict(mapping)
    for ours, names in COLUMNS.items():
        if ours in columns or (ours == "split" and not own_split):
            continue
        name = next((name for name in names if name in there), None)
        if name is not None:
            columns[ours] = name
    wanted = ["worker_id"] + ([] if implicit_prompt else ["prompt"])
    if "ranking" not in columns or "chosen" in columns or "rejected" in columns:
        wanted += ["chosen", "rejected"]
    missing = [ours for ours in wanted if ours not in columns]
    if missing:
        example = ",".join(f"{ours}=THEIR_NAME" for ours in missing)
        raise BadData(
            f"{where}: no column for {', '.join(missing)}. {_found(there)} Wanted: {', '.join(wanted)} "
            f"(worker_id is also found as {', '.join(WORKER_COLUMNS[:4])} ...). "
            f"Say which they are: --columns {example}"
        )
    return columns


def _found(columns: set[str]) -> str:
    return f"Columns found: {', '.join(sorted(columns)) or 'none'}."


class TableReader:
    """Reader of rows whose columns are known.

    Args:
        columns: our names -> theirs, from `resolve_columns`.
        name_worker: from a raw worker id to the pseudonym.
    """

    def __init__(self, columns: dict[str, str], name_worker: Naming) -> None:
        self.worker_column = columns["worker_id"]
        self.columns = tuple(dict.fromkeys(columns.values()))
        self._name_worker = name_worker
        self._prompt, self._chosen, self._rejected, self._ranking, self._label = (
            columns.get(name) for name in ("prompt", "chosen", "rejected", "ranking", "label")
        )
        optional = [(columns.get(ours), check) for ours, check in _OPTIONAL.items()]
        self._optional = optional if any(name for name, _ in optional) else []

    def read(self, blocks: Blocks) -> Iterator[Votes | Refusal]:
        """Yield the votes of each row (one, or the pairs of a ranking), or a refusal."""
        return each(blocks, self._columns, self._votes)

    def _columns(self, records: list[dict[Any, Any]]) -> Votes:
        if self._ranking:
            raise Refused("a ranking is not plain")
        workers, prompts, chosen, rejected = (
            list(map(itemgetter(name), records))
            for name in (self.worker_column, self._prompt, self._chosen, self._rejected)
        )
        check_pairs(prompts, chosen, rejected)
        details: list[Any] = [
            [check(record.get(name)) for record in records] if name else None for name, check in self._optional
        ]
        names, labels = self._name_worker.column(workers), [1.0] * len(records)
        if self._label:
            labels = [check_label(record.get(self._label, 1)) for record in records]
            votes = list(zip(chosen, rejected, labels, strict=True))
            chosen = [no if label == 0 else yes for yes, no, label in votes]
            rejected = [yes if label == 0 else no for yes, no, label in votes]
            if details and details[2]:
                shown = zip(details[2], labels, strict=True)
                details[2] = [_OTHER_SIDE[side] if label == 0 else side for side, label in shown]
            labels = [label or 1.0 for label in labels]
        return Votes(names, prompts, chosen, rejected, labels, *details)

    def _votes(self, record: dict[Any, Any]) -> list[Vote]:
        get = record.get
        worker, prompt, ranking_id = self._name_worker(get(self.worker_column)), get(self._prompt), None
        if self._prompt and is_missing(prompt):
            raise Refused("prompt is missing")  # an implicit one is a matter of the whole source, not of a row
        if self._ranking:
            ranking = get(self._ranking)
            if isinstance(ranking, str) and ranking.lstrip().startswith("["):  # a list in a CSV cell
                try:
                    ranking = orjson.loads(ranking)
                except orjson.JSONDecodeError:
                    raise Refused("the ranking is not a JSON list") from None
            if isinstance(ranking, list):
                return self._pairs(worker, prompt, ranking, record)
            ranking_id = check_identifier(ranking, "ranking")
        chosen, rejected = get(self._chosen), get(self._rejected)
        if type(prompt) is not str or type(chosen) is not str or type(rejected) is not str:
            prompt, chosen, rejected = as_texts(prompt, chosen, rejected)
        prompt, chosen, rejected = check_pair(prompt, chosen, rejected)
        details = self._details(record, ranking_id)
        label = check_label(get(self._label, 1))
        if label == 0:
            details[2] = _OTHER_SIDE[details[2]]
            return [Vote(worker, prompt, rejected, chosen, 1.0, *details)]
        return [Vote(worker, prompt, chosen, rejected, label, *details)]

    def _pairs(self, worker: str, prompt: object, ranking: list[Any], record: dict[str, Any]) -> list[Vote]:
        if not 2 <= len(ranking) <= MAX_RANKING:
            raise Refused(f"a ranking of {len(ranking)} responses; 2 to {MAX_RANKING} can be used")
        pairs = [check_pair(*as_texts(prompt, better, worse)) for better, worse in combinations(ranking, 2)]
        details = self._details(record, content_id(worker, pairs[0][0], *(str(response) for response in ranking)))
        details[2] = None  # shown_first says nothing about more than two
        return [Vote(worker, *texts, 1.0, *details) for texts in pairs]

    def _details(self, record: dict[str, Any], ranking_id: str | None) -> list[Any]:
        """Prompt id, ranking id, shown_first, confidence, split and time, in the order of Vote's fields."""
        if not self._optional:
            return [None, ranking_id, None, None, None, None]
        details = [check(record.get(name)) if name else None for name, check in self._optional]
        if details[1] is None:
            details[1] = ranking_id
        return details
