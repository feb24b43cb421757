"""How many workers, and how many comparisons of each, it takes: learning curves on the standard groups.

Four groups of 40/30/20/10 % (docs/method, section 8), from ten workers to ten thousand, and from five comparisons of each to five
hundred. What coterie ships is compared with pooled + reliability, above which it should be, and with the oracle, which is
told everybody's group.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import settings, verdicts
from benchmarks.rows import Row, Task
from benchmarks.settings import FeatureSettings
from benchmarks.study.intervals import over_data_sets
from benchmarks.study.tables import Draw, Figures, grid, picture
from coterie import simulation
from coterie.report.drawing import COLOURS, MARKERS
from coterie.report.words import number, points, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "How many workers, and how many comparisons of each"
SOURCES = (
    *(Path(str(module.__file__)) for module in (settings, verdicts)),
    Path(simulation.__file__).parent,
)
DATA: tuple[Path, ...] = ()

WORKERS = (10, 30, 100, 300, 1000, 3000, 10_000)
COMPARISONS = (5, 20, 50, 100, 500)
_HOUR = 60_000  # comparisons of a data set that fits the hour
_FEW = 15_000  # comparisons up to which there are several data sets in the hour
SERVED, FOUND = 0.5, 0.9  # of what the oracle gains: from which people count as served at all, and groups as found


def tasks(full: bool) -> list[Task]:
    """[workers, comparisons of each, seed]."""
    cells = sorted(((w, c) for w in WORKERS for c in COMPARISONS), key=prod)  # the quick ones first
    if full:
        return [[w, c, seed] for w, c in cells for seed in range(1, 11 if w * c <= _FEW else 4)]
    return [[w, c, seed] for w, c in cells if w * c <= _HOUR for seed in range(1, 4 if w * c <= _FEW else 2)]


def prepare() -> None:
    """Nothing is shared: all is drawn."""


def measure(task: Task) -> Row:
    """What is found in one data set, and how well it serves."""
    workers, comparisons, seed = task
    drawn = FeatureSettings(setting="groups", workers=workers, comparisons_per_worker=comparisons, seed=seed)
    return verdicts.judge(settings.draw(drawn))


def summary(rows: list[Row]) -> Figures:
    """Of every cell: verdicts, groups, and accuracies; and the fewest comparisons that do for each number of workers."""
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        workers, comparisons, _ = row["task"]
        cells.setdefault((workers, comparisons), []).append(row)
    told = [_of_cell(*amounts, its) for amounts, its in sorted(cells.items())]
    harmed = [cell for cell in told if cell["gain"]["high"] is not None and cell["gain"]["high"] < 0]
    return {
        "cells": told,
        "fewest": {
            str(workers): {
                what: next((c["comparisons"] for c in told if c["workers"] == workers and enough(c)), None)
                for what, enough in (("served", _served), ("found", _found))
            }
            for workers in dict.fromkeys(cell["workers"] for cell in told)
        },
        "targets": {
            "no amount of data at which what is shipped is surely less accurate than pooled + reliability": not harmed
        },
    }


def _of_cell(workers: int, comparisons: int, rows: list[Row]) -> Figures:
    def gains(model: str) -> list[float]:
        return [row["accuracy"][model] - row["accuracy"]["reliability"] for row in rows]

    aris = [row["ari"] for row in rows if row["coteries"] > 1]
    confidences = [row["confidence"] for row in rows if row["confidence"] is not None]
    return {
        "workers": workers,
        "comparisons": comparisons,
        "data_sets": len(rows),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "coteries": dict(Counter(str(row["coteries"]) for row in rows)),
        "ari": float(np.mean(aris)) if aris else None,
        "confidence": float(np.mean(confidences)) if confidences else None,
        "reliability": float(np.mean([row["accuracy"]["reliability"] for row in rows])),
        "gain": over_data_sets(gains("shipped")),
        "possible": over_data_sets(gains("oracle")),
        "seconds": float(np.mean([row["seconds"] for row in rows])),
    }


def _served(cell: Figures) -> bool:
    """Whether people get half of what they could, be it by their group or by their embedding."""
    return bool(cell["possible"]["value"] > 0 and cell["gain"]["value"] >= SERVED * cell["possible"]["value"])


def _found(cell: Figures) -> bool:
    """Whether groups were found in most data sets, and those who have them get most of what they could."""
    found = 2 * cell["verdicts"].get("coteries", 0) > cell["data_sets"]
    return bool(found and cell["gain"]["value"] >= FOUND * cell["possible"]["value"])


def markdown(summary: Figures) -> str:
    """The grid, the fewest comparisons, and what happens in the corner of few data."""
    amounts = sorted({cell["comparisons"] for cell in summary["cells"]})
    by = {(cell["workers"], cell["comparisons"]): cell for cell in summary["cells"]}
    lines = [
        [number(int(workers)), *(_cell(by.get((int(workers), amount))) for amount in amounts)]
        for workers in summary["fewest"]
    ]
    return "\n\n".join(
        [
            "Standard groups of 40/30/20/10 %, tastes at cosine 0.7, the true taste right in 76 %. A cell: points of accuracy "
            "that what is shipped gains over pooled + reliability, of those that the oracle gains (the same estimator told "
            "everybody's group); data sets in which coteries were found, of all; adjusted Rand index to the truth, where "
            "there were several coteries. A number in brackets is an interval of 95 % over data sets.",
            picture(
                "amounts", "Accuracy gained over pooled + reliability by comparisons of a worker, by number of workers"
            ),
            grid(["workers", *(f"{amount} comparisons each" for amount in amounts)], lines),
            f"The fewest comparisons of each worker with which what is shipped brings {SERVED:.0%} of what the oracle gains, by "
            f"whatever verdict, and with which coteries are found in most data sets and bring {FOUND:.0%} of it, among the "
            "numbers that were run:",
            grid(
                ["workers", "served", "coteries found"],
                [
                    [number(int(workers)), *("none" if least[what] is None else number(least[what]) for what in least)]
                    for workers, least in summary["fewest"].items()
                ],
            ),
            _corner(summary["cells"]),
        ]
    )


def _cell(cell: Figures | None) -> str:
    if cell is None:
        return "not run"
    ari = "" if cell["ari"] is None else f"; ARI {cell['ari']:.2f}"
    found = f"{cell['verdicts'].get('coteries', 0)}/{cell['data_sets']}"
    return f"{points(cell['gain'])} of {signed(100 * cell['possible']['value'], 1)}; {found}{ari}"


def _corner(cells: list[Figures]) -> str:
    """What happens where coteries are never found."""
    none = [cell for cell in cells if not cell["verdicts"].get("coteries")]
    if not none:
        return "There is no amount of data here at which coteries were never found."
    gains = [100 * cell["gain"]["value"] for cell in none]
    shared = sum(cell["verdicts"].get("one-taste", 0) for cell in none)
    told = ", ".join(f"{number(c['workers'])} × {c['comparisons']}" for c in none)
    return (
        f"With little data coteries were never found ({told}, workers × comparisons of each). There one reward for everybody was "
        f"shipped in {shared} of {sum(cell['data_sets'] for cell in none)} data sets, and what was shipped differed from "
        f"pooled + reliability by {signed(min(gains), 1)} to {signed(max(gains), 1)} points. The oracle shows what was there to "
        "be had by somebody who knows the groups."
    )


def plots(summary: Figures) -> dict[str, Draw]:
    """What is gained over the comparisons of a worker, a line for every number of workers, and the oracle's, dashed."""
    return {"amounts": partial(_draw, summary)}


def _draw(summary: Figures, ax: Axes) -> None:
    for i, workers in enumerate(summary["fewest"]):
        cells = [cell for cell in summary["cells"] if cell["workers"] == int(workers)]
        at = [cell["comparisons"] for cell in cells]
        gained, possible = ([100 * cell[of]["value"] for cell in cells] for of in ("gain", "possible"))
        ax.plot(at, gained, color=COLOURS[i], marker=MARKERS[i], markersize=5, label=f"{number(int(workers))} workers")
        ax.plot(at, possible, color=COLOURS[i], linewidth=0.8, linestyle="--")
    ax.axhline(0, color="#555555", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xticks(COMPARISONS, [str(amount) for amount in COMPARISONS])
    ax.minorticks_off()
    ax.set(xlabel="comparisons of each worker", ylabel="points over pooled + reliability")
    ax.legend(title="shipped; dashed: the oracle", fontsize=8, title_fontsize=8)
