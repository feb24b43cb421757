"""OpenAI's summarize_from_feedback comparisons (Stiennon et al. 2020, arXiv 2009.01325), line JSON or the
hub's data set.

    {"info": {"id", "post" or "article", "title", "subreddit" or "site"}, "summaries": [{"text"}, {"text"}],
     "choice": 0 or 1, "worker", "extra": {"confidence": 1 to 9}}

The prompt is "r/subreddit" or the site, the title and the text; prompt_id is info.id. The first summary was
shown first. Confidence is a scale from "surely the first" (1) to "surely the second" (9), so its distance
from 5 says how sure the worker was: |confidence - 5| / 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from coterie.ingest.readers import Naming, each
from coterie.ingest.sources import Blocks
from coterie.ingest.validation import Refusal, Refused, Vote, Votes, check_identifier, check_pair, check_pairs

REQUIRED = frozenset({"info", "summaries", "choice", "worker"})


class OpenAIReader:
    """Reader of summarize_from_feedback comparisons."""

    worker_column = "worker"
    columns: tuple[str, ...] = ("info", "summaries", "choice", "worker", "extra")

    def __init__(self, name_worker: Naming) -> None:
        self._name_worker = name_worker

    def read(self, blocks: Blocks) -> Iterator[Votes | Refusal]:
        """Yield one vote or one refusal a row."""
        return each(blocks, self._columns, self._votes)

    def _columns(self, records: list[dict[str, Any]]) -> Votes:
        infos, summaries, choices, workers = (
            list(map(itemgetter(name), records)) for name in ("info", "summaries", "choice", "worker")
        )
        if set(map(type, infos)) != {dict} or set(map(type, choices)) != {int}:
            raise Refused("a row is not plain")
        texts = [(first["text"], second["text"]) for first, second in summaries]
        # A choice that is neither 0 nor 1 is an IndexError in one of the two.
        chosen = [pair[choice] for pair, choice in zip(texts, choices, strict=True)]
        rejected = [pair[1 - choice] for pair, choice in zip(texts, choices, strict=True)]
        prompts = list(map(_prompt, infos))
        check_pairs(prompts, chosen, rejected)
        return Votes(
            self._name_worker.column(workers),
            prompts,
            chosen,
            rejected,
            [1.0] * len(records),
            prompt_id=[check_identifier(info.get("id"), "info.id") for info in infos],
            shown_first=["rejected" if choice else "chosen" for choice in choices],
            confidence=[_confidence(record.get("extra")) for record in records],
        )

    def _votes(self, record: dict[str, Any]) -> list[Vote]:
        info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
        if type(info) is not dict:
            raise Refused("info is missing")
        if type(summaries) is not list or [type(summary) for summary in summaries] != [dict, dict]:
            raise Refused("summaries are not two objects")
        if type(choice) is not int or choice not in (0, 1):
            raise Refused("choice is not 0 or 1")
        texts = check_pair(_prompt(info), summaries[choice].get("text"), summaries[1 - choice].get("text"))
        worker, prompt_id = self._name_worker(record.get("worker")), check_identifier(info.get("id"), "info.id")
        shown_first = "rejected" if choice else "chosen"
        return [Vote(worker, *texts, 1.0, prompt_id, None, shown_first, _confidence(record.get("extra")))]


def _prompt(info: dict[str, Any]) -> str:
    text = info.get("post") or info.get("article")
    if type(text) is not str:
        raise Refused("info has neither post nor article")
    title, subreddit = info.get("title"), info.get("subreddit")
    if subreddit and title:
        return f"r/{subreddit}\n\n{title}\n\n{text}"
    place = f"r/{subreddit}" if subreddit else info.get("site")
    return "\n\n".join(str(part) for part in (place, title, text) if part)


def _confidence(extra: object) -> float | None:
    value = extra.get("confidence") if type(extra) is dict else None
    if value is None or value != value:  # null, or a table's NaN
        return None
    if not isinstance(value, (int, float)) or not 1 <= value <= 9:
        raise Refused("extra.confidence is not between 1 and 9")
    return abs(value - 5) / 4
