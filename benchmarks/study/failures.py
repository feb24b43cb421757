"""The failures that arXiv 2601.20760 names, made to happen, and the diagnostics that catch them.

Poor clusters, too little data and over-clustering, and what else passes for groups. Each is a kind of annotators among whom a
pipeline that asks nothing (benchmarks/study/naive.py) makes groups all the same. Beside it, coterie on the same votes, and what each
of its diagnostics says of the naive pipeline's groups. Where that pipeline happens to be right, none should say anything.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import settings, verdicts
from benchmarks.rows import Row, Task
from benchmarks.study import intervals, naive
from benchmarks.study.intervals import over_data_sets
from benchmarks.study.naive import FAILURES
from benchmarks.study.tables import Draw, Figures, grid, picture
from coterie import simulation
from coterie.discovery.discover import LEVEL
from coterie.discovery.stability import STABLE
from coterie.report.drawing import COLOURS
from coterie.report.words import interval, points, share, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "When groups are none, and what says so"
SOURCES = (
    *(Path(str(module.__file__)) for module in (naive, intervals, settings, verdicts)),
    Path(simulation.__file__).parent,
)
DATA: tuple[Path, ...] = ()

CATCHES = {  # by what each diagnostic says that the naive pipeline's groups are none, or that nobody knows
    "the test": "does not reject one taste",
    "half-split ARI": f"below {STABLE:g}: k-means of two halves of the votes, on joint embeddings, does not find the same groups",
    "gates": "most groups' rewards do not surely beat everybody's",
    "the choice of K": "another number of coteries than the naive pipeline's",
}


def tasks(full: bool) -> list[Task]:
    """[failure, seed]."""
    return [[name, seed] for seed in range(1, 21 if full else 7) for name in FAILURES]


def prepare() -> None:
    """Nothing is shared: all is drawn."""


def measure(task: Task) -> Row:
    """The naive pipeline, coterie and the diagnostics on one data set."""
    return naive.measure(task)


def caught(row: Row) -> dict[str, bool]:
    """Which diagnostics give warning."""
    told = row["diagnostics"]
    return {
        "the test": told["p_value"] is not None and told["p_value"] >= LEVEL,
        "half-split ARI": told["half_split_ari"] is not None and told["half_split_ari"] < STABLE,
        "gates": 2 * told["gates_closed"] > told["gates"],
        "the choice of K": row["ours"]["coteries"] != FAILURES[row["task"][0]].groups,
    }


def summary(rows: list[Row]) -> Figures:
    """Of every failure: what it costs either pipeline, and how often each diagnostic catches it."""
    told: dict[str, Figures] = {}
    targets = {}
    for name, failure in FAILURES.items():
        its = [row for row in rows if row["task"][0] == name]
        if not its:
            continue
        warned = [caught(row) for row in its]
        figures: Figures = {
            "why": failure.why,
            "workers": failure.settings.workers,
            "comparisons": failure.settings.comparisons_per_worker,
            "groups": failure.groups,
            "data_sets": len(its),
            "pooled_accuracy": float(np.mean([row["pooled_accuracy"] for row in its])),
            **{who: _quality([row[who] for row in its]) for who in ("naive", "ours", "oracle")},
            "on_training_votes": _quality([row["naive"]["on_training_votes"] for row in its]),
            "silhouette": _mean([row["naive"]["silhouette"] for row in its]),
            "ari": {who: _mean([row[who]["ari"] for row in its]) for who in ("naive", "ours")},
            "half_split_ari": {
                "naive": _mean([row["diagnostics"]["half_split_ari"] for row in its]),
                "ours": _mean([row["diagnostics"]["half_split_ari_ours"] for row in its]),
            },
            "gates": [sum(row["diagnostics"][n] for row in its) for n in ("gates_closed", "gates")],
            "confidence": _mean([row["ours"]["confidence"] for row in its]),
            **{of: _count([row["ours"][of] for row in its]) for of in ("verdict", "coteries", "ships")},
            "caught": {diagnostic: sum(one[diagnostic] for one in warned) for diagnostic in CATCHES},
            "caught_by_any": sum(any(one.values()) for one in warned),
        }
        told[name] = figures
        if failure.control:
            targets[f"{name}: no diagnostic gives warning in most data sets"] = 2 * figures["caught_by_any"] <= len(its)
        else:
            targets[f"{name}: caught by a diagnostic in every data set"] = figures["caught_by_any"] == len(its)
        if (low := figures["ours"]["log_loss"]["low"]) is not None:
            targets[f"{name}: what is shipped is not worse than pooled beyond the interval"] = low <= 0
    return {"failures": told, "targets": targets}


def _quality(parts: list[Row]) -> Figures:
    return {name: over_data_sets([part[name] for part in parts]) for name in ("log_loss", "accuracy")}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _count(values: list[Any]) -> dict[str, int]:
    return {str(value): values.count(value) for value in sorted(set(values))}


def markdown(summary: Figures) -> str:
    """What either pipeline costs, how good the naive groups look, and what gives warning."""
    told = summary["failures"].items()
    costs = [
        [
            f"{name}: {figures['why']}",
            f"{figures['workers']} × {figures['comparisons']}",
            str(figures["groups"]),
            *(interval(figures[who]["log_loss"], 1000, 0, sign=True) for who in ("naive", "ours", "oracle")),
            *(points(figures[who]["accuracy"]) for who in ("naive", "ours", "oracle")),
        ]
        for name, figures in told
    ]
    looks = [
        [
            name,
            points(figures["on_training_votes"]["accuracy"]),
            _told(figures["silhouette"]),
            _told(figures["ari"]["naive"]),
            _told(figures["ari"]["ours"]),
            "; ".join(f"{verdict} {n}" for verdict, n in figures["verdict"].items()),
            "; ".join(f"{k} in {n}" for k, n in figures["coteries"].items()),
            share(figures["confidence"], 0),
        ]
        for name, figures in told
    ]
    warnings = [
        [
            name,
            *(f"{n} of {figures['data_sets']}" for n in figures["caught"].values()),
            f"{figures['caught_by_any']} of {figures['data_sets']}",
            _told(figures["half_split_ari"]["naive"]),
            _told(figures["half_split_ari"]["ours"]),
            "{} of {}".format(*figures["gates"]),
        ]
        for name, figures in told
    ]
    meaning = "; ".join(f"{name}: {what}" for name, what in CATCHES.items())
    return "\n\n".join(
        [
            "The naive pipeline: each worker's taste by itself, k-means into the number of groups that it is told, a reward for "
            "each group from its own votes; no test, no choice, no reliability, no gate. Differences to plain pooled on held-out "
            "prompts, log-loss in thousandths of a nat (negative is better) and accuracy in points, with intervals of 95 % over "
            "data sets. The oracle is told the truth. In the last row nothing is wrong, and no diagnostic should give warning.",
            picture(
                "failures", "Held-out log-loss of the naive pipeline and of coterie, less that of one pooled reward"
            ),
            grid(
                ["annotators", "workers × comparisons", "naive K"]
                + [f"log-loss: {who}" for who in ("naive", "coterie", "oracle")]
                + [f"points: {who}" for who in ("naive", "coterie", "oracle")],
                costs,
            ),
            "What looks good all the same: the accuracy that the naive rewards gain on the votes they were fitted to. ARI is to "
            "the true groups, where there are several.",
            grid(
                [
                    "annotators",
                    "naive, training votes, points",
                    "silhouette",
                    "ARI: naive",
                    "ARI: coterie",
                    "coterie's verdict",
                    "coteries",
                    "confidence",
                ],
                looks,
            ),
            f"What gives warning, in how many data sets ({meaning}):",
            grid(
                ["annotators", *CATCHES, "any of them", "half-split ARI: naive", "coterie's", "gates that stay closed"],
                warnings,
            ),
        ]
    )


def _told(value: float | None) -> str:
    return "" if value is None else signed(value, 2).removeprefix("+")


def plots(summary: Figures) -> dict[str, Draw]:
    """Log-loss of either pipeline against one pooled reward."""
    return {"failures": partial(_draw, summary["failures"])}


def _draw(failures: dict[str, Figures], ax: Axes) -> None:
    for i, (who, label, marker) in enumerate(
        (("naive", "naive", "s"), ("ours", "coterie", "o"), ("oracle", "oracle", "D"))
    ):
        told = [figures[who]["log_loss"] for figures in failures.values()]
        values, low, high = (
            1000 * np.array([one["value"] if one[end] is None else one[end] for one in told])
            for end in ("value", "low", "high")
        )
        at = np.arange(len(told)) + 0.2 * (i - 1)
        ax.errorbar(
            values, at, xerr=[values - low, high - values], fmt=marker, color=COLOURS[i], label=label, capsize=2
        )
    ax.axvline(0, color="#555555", linewidth=0.8)
    ax.set_yticks(np.arange(len(failures)), list(failures))
    ax.invert_yaxis()
    ax.set_xlabel("log-loss − pooled's, 1/1000 nat (left is better)")
    ax.legend(fontsize=8)
