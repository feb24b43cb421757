"""Does coterie find what is there, and nothing that is not?

    python -m benchmarks.verdicts                                    everything (hours; interrupted, it resumes)
    python -m benchmarks.verdicts --only groups continuous --datasets 5

Every data set is one of benchmarks.settings under a seed of its own. The verdict, the groups and the held-out quality of
what coterie would ship are compared with the truth; beside them, fitted to the same votes: pooled, pooled + reliability,
and the oracle. Accuracy and log-loss are macro over workers, on prompts that nothing was fitted to; the adjusted Rand index
is that of the mixture as discovered, over the workers who are not careless (those who are show no taste).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from benchmarks import settings
from benchmarks.rows import PROCESSES, Log, Row, Work, fingerprint, key, run
from benchmarks.settings import SETTINGS, UKP, DataSet
from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import write_text
from coterie.discovery import PooledReward, Votes
from coterie.discovery.discover import Discovery, discover
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Array

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
MODELS = ("shipped", "pooled", "reliability", "oracle", "truth")
VERDICTS = ("one-taste", "continuous", "coteries")

Figures = dict[str, Any]  # of a setting


@dataclass(frozen=True)
class Target:
    """What a setting must reach.

    Attributes:
        verdict: the right one.
        misses: the largest share of data sets with another.
        ari: the least mean adjusted Rand index to the truth.
        points: how far the mean accuracy of what is shipped may be below the oracle's, in percentage points.
    """

    verdict: str
    misses: float
    ari: float | None = None
    points: float | None = None

    def judge(self, figures: Figures) -> dict[str, bool]:
        """Each demand in words, and whether it is met."""
        wrong = figures["data_sets"] - figures["verdicts"][self.verdict]
        allowed = round(self.misses * figures["data_sets"])
        met = {f"verdict {self.verdict}, at most {allowed} of {figures['data_sets']} others": wrong <= allowed}
        if self.ari is not None:
            met[f"ARI ≥ {self.ari}"] = figures["ari"]["mean"] >= self.ari
        if self.points is not None:
            behind = 100 * (figures["accuracy"]["oracle"] - figures["accuracy"]["shipped"])
            met[f"within {self.points:g} points of the oracle"] = behind <= self.points
        return met


_NOTHING_FOUND = Target("one-taste", misses=34 / 500)  # more is not compatible with a test of level .05
PLAN: dict[str, tuple[int, Target | None]] = {  # data sets, and what is asked of them
    "groups": (50, Target("coteries", misses=0.1, ari=0.95, points=1.0)),
    "groups-2": (20, None),
    "groups-8": (20, None),
    "continuous": (50, Target("continuous", misses=0.2, points=1.5)),
    "careless": (50, Target("coteries", misses=0.1)),
    "unequal": (20, None),
    "planted": (20, None),
    "planted-null": (20, None),
    "null": (20, None),
    "null-careless": (20, None),
    "null-unequal": (20, None),
    "small-null": (500, _NOTHING_FOUND),
    "small-null-careless": (500, _NOTHING_FOUND),
    "small-null-unequal": (500, _NOTHING_FOUND),
}


def measure(task: Sequence[Any]) -> Row:
    """Draw a data set (setting, seed), and judge what is discovered in it."""
    name, seed = task
    return {"setting": name, "seed": seed, **judge(settings.draw(SETTINGS[name].model_copy(update={"seed": seed})))}


def judge(data: DataSet) -> Row:
    """Discover what is in a data set, and compare with the truth."""
    started = time.perf_counter()
    found = discover(data.train, EmbedSettings(), ClusterSettings())
    seconds = time.perf_counter() - started
    logits = _logits(data, found)
    careful = (data.people.reliability == 1) & data.train.present
    own = found.mixture.responsibilities_.argmax(axis=1)
    return {
        "verdict": found.selection.verdict,
        "member": f"{found.selection.member} {found.selection.size}",
        "confidence": found.selection.confidence,
        "ships": found.selection.ships,
        "coteries": found.selection.coteries,
        "p_value": found.heterogeneity.p_value,
        "half_split_ari": found.stability,
        "ari": adjusted_rand_score(data.people.group[careful], own[careful]) if len(data.people.names) > 1 else None,
        "accuracy": {model: accuracy(data.test, logits[model]) for model in MODELS},
        "log_loss": {model: macro(data.test, log_loss(logits[model], data.test.y)) for model in MODELS},
        "seconds": seconds,
    }


def _logits(data: DataSet, found: Discovery) -> dict[str, Array]:
    """Of every model for the test votes, [n] each."""
    pooled = PooledReward(found.base.precision).fit(data.train)
    oracle = settings.oracle(data, found.base, found.mixture.precision)
    fitted = {"shipped": found.reward, "pooled": pooled, "reliability": found.base, "oracle": oracle}
    logits = {name: reward.decision_function(data.test) for name, reward in fitted.items()}
    return logits | {"truth": settings.truth(data.people, data.test)}


def macro(votes: Votes, values: Array) -> float:
    """Mean over workers of the mean of values [n] over a worker's votes."""
    return float((votes.sum_by_worker(values) / np.maximum(votes.counts, 1))[votes.present].mean())


def accuracy(votes: Votes, logits: Array) -> float:
    """Macro accuracy; a logit of exactly zero says nothing and is half right."""
    return macro(votes, np.where(logits == 0, 0.5, logits > 0))


def summarise(rows: list[Row], target: Target | None) -> Figures:
    """The figures of a setting."""

    def spread(name: str) -> dict[str, float] | None:
        values = [row[name] for row in rows if row[name] is not None]
        return {"mean": float(np.mean(values)), "min": min(values)} if values else None

    def count(name: str) -> dict[str, int]:
        return {str(value): n for value, n in sorted(Counter(row[name] for row in rows).items())}

    def means(name: str) -> dict[str, float]:
        return {model: float(np.mean([row[name][model] for row in rows])) for model in MODELS}

    p_values = np.array([row["p_value"] for row in rows])
    figures: Figures = {
        "data_sets": len(rows),
        "verdicts": {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS},
        "members": count("member"),
        "confidence": spread("confidence"),
        "coteries": count("coteries"),
        "ships": count("ships"),
        "ari": spread("ari"),
        "half_split_ari": spread("half_split_ari"),
        "p_value": {
            "below_.05": float((p_values < 0.05).mean()),
            "deciles": np.quantile(p_values, np.arange(0.1, 1, 0.1)).round(4).tolist(),
        },
        "accuracy": means("accuracy"),
        "log_loss": means("log_loss"),
        "seconds": float(np.mean([row["seconds"] for row in rows])),
    }
    return figures | {"targets": target.judge(figures) if target else {}}


def table(results: dict[str, Figures]) -> str:
    """The results in Markdown; accuracies in %, log-losses in nats."""
    head = "setting|data sets|one taste / continuous / coteries|p < .05|ARI, mean (min)|half-split ARI|"
    head += "|".join(f"accuracy / log-loss: {model}" for model in MODELS) + "|seconds|target"
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns)]
    for name, figures in results.items():
        ari, halves = figures["ari"], figures["half_split_ari"]
        quality = [f"{100 * figures['accuracy'][model]:.1f} / {figures['log_loss'][model]:.4f}" for model in MODELS]
        lines.append(
            [
                name,
                str(figures["data_sets"]),
                " / ".join(str(figures["verdicts"][verdict]) for verdict in VERDICTS),
                f"{figures['p_value']['below_.05']:.1%}",
                f"{ari['mean']:.2f} ({ari['min']:.2f})" if ari else "",
                f"{halves['mean']:.2f}" if halves else "",
                *quality,
                f"{figures['seconds']:.1f}",
                "; ".join(f"{what}: {'met' if met else '**missed**'}" for what, met in figures["targets"].items()),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def log_of(out: Path) -> Log:
    """The rows that this very code has measured, beside the results."""
    return Log(out.with_suffix(".jsonl"), fingerprint((Path(settings.__file__), Path(__file__))))


def main() -> None:
    """Run what is asked for, write the results, and say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PLAN), default=tuple(PLAN), metavar="SETTING")
    parser.add_argument("--datasets", type=int, help="data sets of each setting, in place of the planned number")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results of other settings that it holds are kept")
    options = parser.parse_args()
    chosen = [name for name in PLAN if name in options.only]
    planted = [name for name in chosen if SETTINGS[name].setting == "planted"]
    if planted and UKP.is_file():
        settings.draw(SETTINGS[planted[0]])  # encodes the texts, once for all processes
    elif planted:
        print(f"{', '.join(planted)}: skipped, there is no {UKP}", file=sys.stderr)
        chosen = [name for name in chosen if name not in planted]
    log = log_of(options.out)
    # Seeds from 1: 0 is that of coterie's own draws.
    tasks = [[name, seed] for name in chosen for seed in range(1, (options.datasets or PLAN[name][0]) + 1)]
    run((Work(measure, task, log) for task in tasks), "verdicts", "data sets")

    others = log.rows()
    rows = [others.pop(key(task)) for task in tasks]
    figures = {name: summarise([row for row in rows if row["setting"] == name], PLAN[name][1]) for name in chosen}
    before = json.loads(options.out.read_text(encoding="utf-8"))["settings"] if options.out.is_file() else {}
    results = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "processes": PROCESSES},
        "settings": {name: (before | figures)[name] for name in PLAN if name in before | figures},
    }
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(table(figures))
    log.hold(others)


if __name__ == "__main__":
    main()
