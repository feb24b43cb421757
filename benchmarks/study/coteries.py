"""Quality over the number of coteries, 1 to 8: clusters of two-stage and of joint embeddings, and the mixture.

The experiment of arXiv 2601.20760 on frozen features. Two-stage: every worker's own taste is estimated by itself (slopes around
the pooled reward), and then clustered. Joint: embeddings and rewards are learned together (low rank), and then clustered. Both
by k-means and by Ward's hierarchical clustering; the rewards of the clusters are fitted alike, with the same priors. The
mixture finds groups and rewards at once. Beside them, what coterie chooses by itself and ships.

All is judged on prompts that nothing was fitted to, macro over workers, as the difference to pooled + reliability.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import settings, verdicts
from benchmarks.rows import Row, Task
from benchmarks.settings import SETTINGS, UKP
from benchmarks.study import curves, data, intervals
from benchmarks.study.curves import CLUSTERINGS, METHODS
from benchmarks.study.data import FILES
from benchmarks.study.intervals import comparisons_an_arm, over_data_sets, over_splits
from benchmarks.study.tables import RESULTS, Draw, Figures, grid, picture, results
from coterie import simulation
from coterie.contracts import Estimate
from coterie.report.drawing import COLOURS, MARKERS
from coterie.report.words import interval, number, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "How many coteries, and found how"
SOURCES = (
    *(Path(str(module.__file__)) for module in (curves, data, intervals, settings, verdicts)),
    Path(simulation.__file__).parent,
)
DATA = tuple(file for files in FILES.values() for file in files)

CLOSE = 0.005  # nats that what is shipped may be behind the best method and number in hindsight
_SHOWN = (2, 4, 8)
_NONE = Estimate(value=0.0, low=0.0, high=0.0).model_dump()  # what one coterie differs by: it is pooled + reliability
_SPLITS = 5  # seeds of the split of real data


def tasks(full: bool) -> list[Task]:
    """[setting or data set, seed]; seeds of simulated settings from 1, as 0 is that of coterie's own draws."""
    simulated = (
        [name for name in SETTINGS if not name.startswith("small")] if full else ["groups", "continuous", "null"]
    )
    if not UKP.is_file():
        simulated = [name for name in simulated if SETTINGS[name].setting != "planted"]
    drawn: list[Task] = [[name, seed] for seed in range(1, 11 if full else 5) for name in simulated]
    return [[name, seed] for seed in range(_SPLITS if full else 3) for name in data.available()] + drawn


def prepare() -> None:
    """Read and encode the real texts."""
    for name in data.available():
        data.ready(name, range(_SPLITS))


def measure(task: Task) -> Row:
    """Every method and number of coteries on one data set, and what coterie ships."""
    return curves.measure(task)


def summary(rows: list[Row]) -> Figures:
    """Of every setting: each method and number with its interval, the best in hindsight, and what was chosen."""
    of_setting: dict[str, list[Row]] = {}
    for row in rows:
        of_setting.setdefault(row["task"][0], []).append(row)
    told = {name: _of_setting(name, its) for name, its in of_setting.items()}
    targets = {}
    for name, figures in told.items():
        if (picked := figures["automatic"]) and picked["behind"]["high"] is not None:
            words = (
                f"{name}: what is shipped is at most {1000 * CLOSE:g} thousandths of a nat behind the best in hindsight"
            )
            targets[words] = picked["behind"]["high"] <= CLOSE
            targets[f"{name}: what is shipped is not worse than pooled + reliability beyond the interval"] = (
                picked["log_loss"]["low"] <= 0
            )
    return {"settings": told, "targets": targets}


def _of_setting(name: str, rows: list[Row]) -> Figures:
    over = over_splits if name in FILES else lambda told: over_data_sets([one["value"] for one in told])

    def merged(parts: list[Row]) -> Figures:
        return {key: over([part[key] for part in parts]) for key in ("log_loss", "accuracy")}

    sizes = list(rows[0]["methods"][METHODS[0]])
    methods = {}
    for method in METHODS:
        methods[method] = {size: merged([row["methods"][method][size] for row in rows]) for size in sizes}
        for size, figures in methods[method].items():
            cells = [row["methods"][method][size] for row in rows]
            figures["smallest"] = min(cell["smallest"] for cell in cells)
            aris = [cell["ari"] for cell in cells if cell["ari"] is not None]
            figures["ari"] = float(np.mean(aris)) if aris else None
    method, size = min(
        ((m, s) for m in METHODS for s in sizes), key=lambda of: methods[of[0]][of[1]]["log_loss"]["value"]
    )
    best: Figures = {"method": method, "size": size, **methods[method][size]}
    if best["log_loss"]["value"] >= 0:
        best = {"method": "pooled + reliability", "size": "1", "log_loss": _NONE, "accuracy": _NONE}
    accuracy = float(np.mean([row["accuracy"] for row in rows]))
    figures = {
        "real": name in FILES,
        "data_sets": len(rows),
        "workers": rows[0]["workers"],
        "comparisons": int(np.mean([row["comparisons"] for row in rows])),
        "accuracy": accuracy,
        "log_loss": float(np.mean([row["log_loss"] for row in rows])),
        "pooled": merged([row["pooled"] for row in rows]),
        "methods": methods,
        "joint_less_two_stage": {
            clustering: {s: merged([row["joint_less_two_stage"][clustering][s] for row in rows]) for s in sizes}
            for clustering in CLUSTERINGS
        },
        "best": best | {"arm": _arm(accuracy, best["accuracy"]["value"])},
        "best_of_several": size,
        "automatic": None,
    }
    if all(row["automatic"] for row in rows):
        picked = [row["automatic"] for row in rows]
        reached = [0.0 if best["size"] == "1" else row["methods"][method][size]["log_loss"]["value"] for row in rows]
        behind = [one["log_loss"]["value"] - other for one, other in zip(picked, reached, strict=True)]
        figures["automatic"] = merged(picked) | {
            name: dict(Counter(str(one[name]) for one in picked)) for name in ("verdict", "coteries", "ships")
        }
        figures["automatic"]["behind"] = over_data_sets(behind)
        figures["automatic"]["arm"] = _arm(accuracy, figures["automatic"]["accuracy"]["value"])
    return figures


def _arm(accuracy: float, difference: float) -> int | None:
    """Comparisons an arm with which the difference would show, were each reward judged by other comparisons."""
    return comparisons_an_arm(accuracy, accuracy + difference)


def markdown(summary: Figures) -> str:
    """A table of the methods for every setting, and what was chosen without hindsight."""
    parts = [
        "Two-stage: each worker's taste is estimated by itself and then clustered; joint: embeddings are learned with the "
        "rewards and then clustered (arXiv 2601.20760 on frozen features). Log-loss less that of pooled + reliability, in "
        "thousandths of a nat (negative is better), over held-out prompts, each worker counted alike. Intervals of 95 %: over "
        "data sets where annotators are simulated, over workers and prompts where they are real. One "
        "coterie is pooled + reliability itself. The best number is chosen by looking at the test prompts, which nobody may. An arm is as many comparisons as each of two rewards needs for its "
        "difference in accuracy to show in 80 % of repetitions, two-sided at 5 %, when each is judged by comparisons of "
        "its own (Fleiss, Levin and Paik 2003, chapter 4).",
    ]
    for name, figures in summary["settings"].items():
        what = "split" if figures["real"] else "data set"
        parts.append(
            f"**{name}**: {figures['data_sets']} {what}{'' if figures['data_sets'] == 1 else 's'}, {number(figures['workers'])} "
            f"workers, {number(figures['comparisons'])} training comparisons; pooled + reliability is right in "
            f"{100 * figures['accuracy']:.1f} %, log-loss {figures['log_loss']:.4f}."
        )
        parts.append(grid(*_methods(figures)))
        parts.append(picture(f"coteries-{name}", f"Held-out log-loss over the number of coteries, {name}"))
        parts.append(_chosen(name, figures))
    return "\n\n".join(parts)


def _methods(figures: Figures) -> tuple[list[str], list[list[str]]]:
    shown = [size for size in map(str, _SHOWN) if size in figures["methods"]["mixture"]]
    head = ["method", *(f"K = {size}" for size in shown), "best K", "there", "accuracy, points", "an arm", "ARI"]
    lines = []
    for method, cells in figures["methods"].items():
        every = {"1": {"log_loss": _NONE, "accuracy": _NONE, "ari": None}} | cells
        best = min(every, key=lambda size: every[size]["log_loss"]["value"])
        needed = _arm(figures["accuracy"], every[best]["accuracy"]["value"])
        lines.append(
            [
                method,
                *(interval(cells[size]["log_loss"], 1000, 1, sign=True) for size in shown),
                best,
                interval(every[best]["log_loss"], 1000, 1, sign=True),
                points(every[best]["accuracy"]),
                "" if needed is None else number(needed),
                "" if every[best]["ari"] is None else f"{every[best]['ari']:.2f}",
            ]
        )
    return head, lines


def _chosen(name: str, figures: Figures) -> str:
    """What joint learning was worth, and what was chosen without hindsight."""
    size = figures["best_of_several"]
    gains = ", ".join(
        f"{interval(of[size]['log_loss'], 1000, 1, sign=True)} by {clustering}"
        for clustering, of in figures["joint_less_two_stage"].items()
    )
    joint = f"Joint less two-stage at K = {size}, the best number above 1: {gains}."
    if (picked := figures["automatic"]) is not None:
        numbers = ", ".join(f"{k} in {n}" for k, n in sorted(picked["coteries"].items()))
        found = ", ".join(f"{verdict} in {n}" for verdict, n in sorted(picked["verdict"].items()))
        return (
            f"{joint} Chosen without hindsight: verdict {found}; coteries: {numbers}. What is shipped: "
            f"{interval(picked['log_loss'], 1000, 1, sign=True)}, {points(picked['accuracy'])} points"
            f"{'' if picked['arm'] is None else ', an arm ' + number(picked['arm'])}; "
            f"{interval(picked['behind'], 1000, 1, sign=True)} to the best in hindsight."
        )
    real = results("real", RESULTS)
    if real is None or name not in real:
        return joint
    runs = real[name]["runs"]
    told = "; ".join(f"{run['verdict']}, {run['coteries']}, {run['ships']['gate']}" for run in runs)
    return f"{joint} Chosen without hindsight (verdict, coteries, what ships after the gate; benchmarks.real): {told}."


def plots(summary: Figures) -> dict[str, Draw]:
    """Log-loss over the number of coteries, a picture for every setting."""
    return {f"coteries-{name}": partial(_draw, figures["methods"]) for name, figures in summary["settings"].items()}


def _draw(methods: dict[str, Figures], ax: Axes) -> None:
    for i, (method, cells) in enumerate(methods.items()):
        values = [0.0, *(1000 * cell["log_loss"]["value"] for cell in cells.values())]
        at = [1, *map(int, cells)]
        ax.plot(at, values, color=COLOURS[i], marker=MARKERS[i], markersize=4, linewidth=1.2, label=method)
    ax.axhline(0, color="#555555", linewidth=0.8)
    ax.set(xlabel="coteries", ylabel="log-loss − pooled + reliability's, 1/1000 nat")
    ax.legend(fontsize=8)
