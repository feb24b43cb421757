"""The data report: what to know about the comparisons before believing anything learned from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coterie.contracts import SPLITS
from coterie.ingest.duplicates import Flags
from coterie.ingest.identifiers import Digests, Numbers, first_64_bits
from coterie.ingest.splits import Hashes

Counts = np.ndarray[Any, np.dtype[np.integer[Any]]]

_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_ALIKE = 20  # comparisons from which on "always the same side" is worth a word


class DataReport:
    """Gathers the report while the comparisons are written; keeps about 20 bytes a row."""

    def __init__(self) -> None:
        # Of each row: worker, pair, side of the pair, no tie, position known, first one chosen.
        self._rows: list[tuple[np.ndarray[Any, Any], ...]] = []
        self._confident = self._ranked = 0
        self._length = np.zeros(2, dtype=np.int64)  # different lengths, the longer one chosen
        self._characters = np.zeros(2, dtype=np.int64)  # of the chosen, of the rejected

    def update(self, rows: pa.RecordBatch, workers: Numbers, chosen: Digests, rejected: Digests) -> None:
        """Add rows of a COMPARISON table, with the number of each one's worker and the digests of chosen_id and rejected_id."""
        strict, shown = rows["label"].to_numpy() == 1, rows["shown_first"]
        known = pc.is_valid(shown).to_numpy(zero_copy_only=False) & strict
        first = pc.fill_null(pc.equal(shown, "chosen"), False).to_numpy(zero_copy_only=False) & known
        pair, side = first_64_bits(chosen ^ rejected), first_64_bits(chosen) < first_64_bits(rejected)
        self._rows.append((workers, pair, side, strict, known, first))
        long, short = (pc.utf8_length(rows[name]).to_numpy() for name in ("chosen", "rejected"))
        self._characters += (int(long.sum()), int(short.sum()))
        self._length += (int((strict & (long != short)).sum()), int((strict & (long > short)).sum()))
        self._confident += len(rows) - rows["confidence"].null_count
        self._ranked += len(rows) - rows["ranking_id"].null_count

    def result(self, prompts: Counts, comparisons: Counts) -> dict[str, Any]:
        """The report; `prompts` and `comparisons` are their numbers in each split."""
        workers, pair, side, strict, known, first = (np.concatenate(column) for column in zip(*self._rows, strict=True))
        del self._rows
        rows, per_worker = len(workers), np.bincount(workers)
        shown, shown_chosen = (np.bincount(workers[some], minlength=len(per_worker)) for some in (known, first))
        alike = (shown >= _ALIKE) & ((shown_chosen == 0) | (shown_chosen == shown))
        positions, different, longer = int(shown.sum()), *map(int, self._length)
        report = {
            "comparisons": rows,
            "workers": len(per_worker),
            "prompts": int(prompts.sum()),
            "ties": rows - int(strict.sum()),
            "with_confidence": self._confident,
            "from_rankings": self._ranked,
            "comparisons_per_worker": {name: float(np.quantile(per_worker, at)) for name, at in _QUANTILES.items()}
            | {"mean": rows / len(per_worker)},
            "agreement": _agreement(pair[strict], side[strict], workers[strict]),
            "length_bias": {
                "comparisons": different,
                "longer_chosen": longer / different if different else None,
                "mean_characters_chosen": int(self._characters[0]) / rows,
                "mean_characters_rejected": int(self._characters[1]) / rows,
            },
            "position_bias": {
                "comparisons": positions,
                "first_chosen": int(shown_chosen.sum()) / positions if positions else None,
            },
            "workers_always_one_side": int(alike.sum()),
            "splits": {
                name: {"comparisons": int(number), "prompts": int(prompts[at])}
                for at, (name, number) in enumerate(zip(SPLITS, comparisons, strict=True))
            },
        }
        return report | {"warnings": _warnings(report)}


def _agreement(pair: Hashes, side: Flags, worker: Numbers) -> dict[str, Any]:
    """How often two workers who voted on one pair chose the same response; ties are left out before.

    A pair with a votes one way and b the other holds C(a, 2) + C(b, 2) agreeing couples of C(a + b, 2),
    from which the couples are taken off that one worker makes with himself: each contradiction is one.
    """
    order = np.argsort(pair)
    same = pair[order[1:]] == pair[order[:-1]]
    pairs, shared = len(pair) - int(same.sum()), np.zeros(len(pair), dtype=bool)
    shared[1:] = same
    shared[:-1] |= same
    rows = order[shared]
    rows = rows[np.lexsort((worker[rows], pair[rows]))]
    pair, side, worker = pair[rows], side[rows], worker[rows]
    start = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]][: len(pair)])
    # Duplicates are gone, so two votes of one worker on one pair are one each way.
    contradicts = (pair[1:] == pair[:-1]) & (worker[1:] == worker[:-1])
    contradictions = int(contradicts.sum())
    votes = np.diff(np.r_[start, len(pair)])
    one = np.add.reduceat(side.astype(np.int64), start) if len(start) else votes
    other = votes - one
    agreeing = int((one * (one - 1) // 2 + other * (other - 1) // 2).sum())
    couples = int((votes * (votes - 1) // 2).sum()) - contradictions
    return {
        "pairs": pairs,
        "shared_pairs": len(start),
        "couples": couples,
        "rate": agreeing / couples if couples else None,
        "contradictions": contradictions,
    }


def _warnings(report: dict[str, Any]) -> list[str]:
    per_worker, workers = report["comparisons_per_worker"], report["workers"]
    found = []
    if report["prompts"] < 3:
        found.append("fewer than three prompts: nothing is held out, so no quality can be measured; bring more")
    if workers == 1:
        found.append("one worker: there is nobody to differ from, so one reward is all that can be learned")
    elif per_worker["max"] == 1:
        found.append("one comparison a worker: tastes cannot be told from chance")
    elif per_worker["median"] < 5:
        found.append(f"half of the workers have at most {per_worker['median']:g} comparisons: their tastes stay vague")
    if report["workers_always_one_side"]:
        found.append(
            f"workers with {_ALIKE} comparisons or more who always chose the one shown first, or always the other: "
            f"{report['workers_always_one_side']}; probably they did not read"
        )
    if report["ties"] == report["comparisons"]:
        found.append("every comparison is a tie: nothing can be learned")
    for bias, name in (("length_bias", "longer_chosen"), ("position_bias", "first_chosen")):
        share, number = report[bias][name], report[bias]["comparisons"]
        if share is not None and number >= 100 and abs(share - 0.5) > 0.2:
            what = "longer response" if bias == "length_bias" else "response shown first"
            found.append(f"the {what} was chosen in {share:.0%} of comparisons: models may learn that instead")
    return found


def data_report_markdown(metrics: dict[str, Any]) -> str:
    """The report as Markdown, for people and for the pipeline's user interface."""
    per_worker, agreement = metrics["comparisons_per_worker"], metrics["agreement"]
    length, position = metrics["length_bias"], metrics["position_bias"]
    keyed = metrics["pseudonyms"] == "keyed"
    facts = {
        "Workers": f"{metrics['workers']:,}" + ("" if keyed else " (ids as they came, no pseudonyms)"),
        "Comparisons": f"{metrics['comparisons']:,}",
        "Comparisons a worker": f"median {per_worker['median']:g}, "
        f"from {per_worker['min']:g} to {per_worker['max']:g}; "
        f"middle half {per_worker['p25']:g} to {per_worker['p75']:g}",
        "Prompts": f"{metrics['prompts']:,}",
        "Rows read": f"{metrics['rows']:,}",
        "Refused": f"{metrics['refused']:,} ({metrics['refused'] / metrics['rows']:.1%})",
        "Exact duplicates dropped": f"{metrics['duplicates']:,}",
        "Ties": f"{metrics['ties']:,}",
        "Agreement of two workers on a pair": f"{_percent(agreement['rate'])} "
        f"({agreement['shared_pairs']:,} of {agreement['pairs']:,} pairs have several votes)",
        "Workers against themselves": f"{agreement['contradictions']:,} pairs voted both ways by one worker",
        "Longer response chosen": f"{_percent(length['longer_chosen'])} of {length['comparisons']:,}",
        "Response shown first chosen": f"{_percent(position['first_chosen'])} of {position['comparisons']:,}",
    }
    lines = [
        "# Data report",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in facts.items()),
        "",
    ]
    lines += ["## Splits, by whole prompts", "", "| split | comparisons | prompts |", "|---|---|---|"]
    lines += [f"| {name} | {s['comparisons']:,} | {s['prompts']:,} |" for name, s in metrics["splits"].items()]
    lines += ["", "## Sources", "", "| source | format | rows | refused |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(s['source'])} | {s['format']} | {s['rows']:,} | {s['refused']:,} |" for s in metrics["sources"]
    ]
    if metrics["refused_by_reason"]:
        lines += ["", "## Refused", "", "| reason | rows |", "|---|---|"]
        lines += [f"| {_cell(reason)} | {number:,} |" for reason, number in metrics["refused_by_reason"].items()]
    if metrics["warnings"]:
        lines += ["", "## To keep in mind", "", *(f"- {warning}" for warning in metrics["warnings"])]
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
