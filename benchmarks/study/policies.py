"""Do people prefer what their coterie's policy says: win rates over the number of coteries, and those of language models.

Over one to eight coteries, policies in feature space (benchmarks/study/best_of.py) answer simulated annotators, whose true tastes
judge. What language models reach, with the coteries that the pipeline found, is measured by benchmarks.policies.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import settings
from benchmarks.rows import Row, Task
from benchmarks.settings import SETTINGS
from benchmarks.study import best_of
from benchmarks.study.intervals import comparisons_an_arm, comparisons_for_rate, over_data_sets
from benchmarks.study.tables import RESULTS, Draw, Figures, grid, picture, results
from coterie import simulation
from coterie.report.drawing import COLOURS, MARKERS
from coterie.report.words import interval, number, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Do people prefer their coterie's policy"
SOURCES = (Path(best_of.__file__), Path(settings.__file__), Path(simulation.__file__).parent)
DATA: tuple[Path, ...] = ()

TRUE = {"groups": 4, "groups-2": 2, "groups-8": 8}  # coteries that are there
_SHOWN = (1, 2, 3, 4, 6, 8)


def tasks(full: bool) -> list[Task]:
    """[setting, seed]."""
    simulated = [name for name in SETTINGS if not name.startswith(("small", "planted"))]
    chosen = simulated if full else ["groups", "groups-2", "continuous", "null"]
    return [[name, seed] for seed in range(1, 21 if full else 6) for name in chosen]


def prepare() -> None:
    """Nothing is shared: all is drawn."""


def measure(task: Task) -> Row:
    """Win rates over the number of coteries on one data set."""
    return best_of.measure(task)


def summary(rows: list[Row]) -> Figures:
    """Of every setting and number of coteries: win rates with intervals, and the samples that show them."""
    told: dict[str, Figures] = {}
    for name in dict.fromkeys(row["task"][0] for row in rows):
        its = [row["wins"] for row in rows if row["task"][0] == name]
        told[name] = {"data_sets": len(its), "sizes": {size: _of_size([wins[size] for wins in its]) for size in its[0]}}
    targets = {}
    for name, size in TRUE.items():
        if name in told:
            low = told[name]["sizes"][str(size)]["own against global"]["low"]
            words = (
                f"{name}: with {size} coteries people prefer their own policy to everybody's, interval above one half"
            )
            targets[words] = low is not None and low > 0.5
    return {"settings": told, "targets": targets}


def _of_size(wins: list[dict[str, float]]) -> Figures:
    rates: Figures = {what: over_data_sets([one[what] for one in wins]) for what in wins[0]}
    own, everybody = (rates[f"{who} against start"]["value"] for who in ("own", "global"))
    return rates | {
        "more": over_data_sets([one["own against start"] - one["global against start"] for one in wins]),
        "arm": comparisons_an_arm(own, everybody),
        "sample": comparisons_for_rate(rates["own against global"]["value"]),
    }


def markdown(summary: Figures) -> str:
    """Win rates in feature space over the number of coteries, and those of language models."""
    head = ["annotators", "K", "own against everybody's", "sample", "own against a wrong one"]
    head += ["own, and everybody's, against the start", "more", "an arm"]
    lines = []
    for name, figures in summary["settings"].items():
        for size in map(str, _SHOWN):
            told = figures["sizes"][size]
            against = [f"{100 * told[f'{who} against start']['value']:.1f}" for who in ("own", "global")]
            lines.append(
                [
                    name,
                    size,
                    _percent(told["own against global"]),
                    _count(told["sample"]),
                    _percent(told.get("own against wrong")),
                    ", ".join(against),
                    interval(told["more"], 100, 1, sign=True),
                    _count(told["arm"]),
                ]
            )
    return "\n\n".join(
        [
            "In feature space: a policy answers with the best of sixteen responses by its reward, everybody is answered by the "
            "policy of their most probable coterie, and their own true taste judges. Win rates in %, intervals of 95 % over data "
            "sets. A sample is as many judged pairs as tell the win rate from one half in 80 % of repetitions, two-sided at 5 %. "
            "An arm is as many as each of two policies needs for their difference against a common start to show, which is how "
            "arXiv 2601.20760 compares them: by its own figures of 53.221 and 52.702 % against 52.133 % that takes "
            f"{_count(comparisons_an_arm(0.53221, 0.52133))} and {_count(comparisons_an_arm(0.52702, 0.52133))} an arm.",
            picture(
                "policies", "Win rate of the own coterie's policy against everybody's, over the number of coteries"
            ),
            grid(head, lines),
            _language_models(),
        ]
    )


def _percent(rate: Figures | None) -> str:
    return "" if rate is None else interval(rate, 100, 1)


def _count(size: int | None) -> str:
    return "" if size is None else number(size)


def _language_models() -> str:
    """What benchmarks.policies has measured, read from its results."""
    told = results("policies", RESULTS)
    source = "([policies.json](../benchmarks/results/policies.json), `python -m benchmarks.policies`)"
    if told is None:
        return f"Policies of language models were not measured {source}."
    parts = [_rewards(told["texts"], source)]
    best = told.get("best_of")
    if best is None:
        parts.append(
            "The results hold no win rates of language models' policies; the command measures them with the coteries that the "
            "pipeline finds, for one number of them."
        )
    else:
        head = ["judge", "people", "own against", "win rate", "at equal length", "sample, at equal length"]
        parts += [
            f"SmolLM2 with the best of {best['n']} answers to {number(best['prompts'])} titles, for the coteries that the pipeline "
            "found and no other number of them; judged by the annotators' true tastes, and by rewards fitted to held-out votes.",
            grid(head, [_win(win) for win in best["wins"]]),
        ]
    if runs := told.get("ppo"):
        risen = ", ".join(f"{signed(run['rise'], 2)} ({run['kl_end']:.1f} nats)" for run in runs)
        parts.append(
            f"PPO, mean reward over the start's in standard deviations of the start's answers, by seed: {risen}."
        )
    return "\n\n".join(parts)


def _rewards(texts: dict[str, Any], source: str) -> str:
    recovered = "; ".join(f"{name} {interval(figures['recovered'], 100, 1)}" for name, figures in texts.items())
    return f"With tastes planted on real texts {source}, coteries' rewards recover of the gap to the oracle's, in %: {recovered}."


def _win(win: dict[str, Any]) -> list[str]:
    equal = win["equal_length"]
    sample = None if equal["value"] is None else comparisons_for_rate(equal["value"])
    return [win["judge"], win["audience"], win["against"], _percent(win["raw"]), _percent(equal), _count(sample)]


def plots(summary: Figures) -> dict[str, Draw]:
    """Own against everybody's policy over the number of coteries."""
    return {"policies": partial(_draw, summary["settings"])}


def _draw(settings: dict[str, Figures], ax: Axes) -> None:
    for i, (name, figures) in enumerate(settings.items()):
        rates = [told["own against global"] for told in figures["sizes"].values()]
        values = [100 * rate["value"] for rate in rates]
        spread = [0 if rate["low"] is None else 100 * (rate["high"] - rate["value"]) for rate in rates]
        at = [int(size) for size in figures["sizes"]]
        ax.errorbar(at, values, yerr=spread, color=COLOURS[i], marker=MARKERS[i], label=name, capsize=2)
    ax.axhline(50, color="#555555", linewidth=0.8)
    ax.set(xlabel="coteries", ylabel="own policy against everybody's, %")
    ax.legend(fontsize=8)
