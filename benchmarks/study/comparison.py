"""coterie and its peers on the same splits (benchmarks/peers/protocol.py), and what the published protocol's leak is worth.

Three kinds of tasks. "real": a real data set under one seed of the split into prompts, with a third of the workers new in
turn, for as many turns as the task says. "simulated": one data set of benchmarks.settings, with a quarter of the workers new
and a part of the training prompts for validation. "leak": the protocol under which LoRe and its followers report (docs/method,
section 7), half of the workers new, at most 150 training comparisons a seen worker and 50 a new one, nothing calibrated; once
as published, where a pair is held out but its responses are seen in other pairs, also by the tuning, and once leak-free.
Both are judged on the same votes, half of the pairs of the test prompts, and every worker has as many training votes in both:
as published, the other half of those pairs takes the place of as many votes on other prompts.

Differences are a method's less coterie's, or less pooled + reliability's: a positive one of log-loss says that the method is
worse. Intervals of real data are of the bootstrap over workers and prompts, averaged over seeds without becoming narrower;
those of simulated data are over data sets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import peers
from benchmarks.peers.every import OURS, POOLED, REFERENCE
from benchmarks.peers.protocol import (
    SEEN,
    SHOTS,
    Split,
    Tally,
    confront,
    some_prompts,
    tallies,
    turns,
    worst_tenth,
)
from benchmarks.rows import Row, Task
from benchmarks.settings import SETTINGS, UKP, draw, together
from benchmarks.study.data import FILES, available, ready, real
from benchmarks.study.intervals import LEVEL, over_data_sets, over_splits
from benchmarks.study.tables import Draw, Figures, grid, picture
from benchmarks.verdicts import macro
from coterie.bootstrap import TwoWayBootstrap
from coterie.discovery import Votes
from coterie.discovery.selection import split_groups
from coterie.discovery.votes import Array
from coterie.report.words import nats, number, points, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Beside other methods"
_HERE = Path(__file__).parent
SOURCES = (
    Path(peers.__file__).parent,
    _HERE.parent / "settings.py",
    _HERE.parent / "real.py",
    _HERE / "data.py",
    Path(__file__),
)
DATA = tuple(file for files in FILES.values() for file in files)

FOLDS = 3  # of the workers: a third is new at a time
REPLICATES = 1000
VALIDATION = 3 / 7  # of the prompts that are not for training, as ingest has it by default
REAL = {"tldr": ((0, 1, 2), 3), "ukpconvarg1": ((0,), 1)}  # seeds, and thirds that are new in turn
REAL_FULL = {"tldr": (tuple(range(10)), FOLDS), "ukpconvarg1": ((0, 1, 2), FOLDS)}
DRAWS, DRAWS_FULL = 4, 20
SIMULATED = ("groups", "continuous", "careless", "unequal", "null", "planted")
SMALL = {"workers": 100, "comparisons_per_worker": 60}  # without --full, and without the real texts
SIMULATED_SEEDS, SIMULATED_SEEDS_FULL = 3, 10
NEW, SIMULATED_VALIDATION = 0.25, 0.15  # of the workers, and of the training prompts
LEAK = {"tldr": (0, 1), "ukpconvarg1": (0,)}
LEAK_FULL = {"tldr": tuple(range(10)), "ukpconvarg1": (0, 1, 2)}
MOST_SEEN, MOST_NEW = 150, 50  # training comparisons of a worker, as published
LEAST = {"ukpconvarg1": 50, "tldr": 1}  # comparisons of the workers whom the leak is measured on
TEN = "10"  # shots, that a target is about
QUANTITIES = ("log_loss", "accuracy")


def tasks(full: bool) -> list[Task]:
    """The largest first."""
    there, draws = available(), DRAWS_FULL if full else DRAWS
    real_ones = REAL_FULL if full else REAL
    todo: list[Task] = [
        ["real", name, seed, real_ones[name][1], draws]
        for name in sorted(there, reverse=True)
        for seed in real_ones[name][0]
    ]
    todo += [
        ["leak", name, seed, draws]
        for name in sorted(there, reverse=True)
        for seed in (LEAK_FULL if full else LEAK)[name]
    ]
    settings = [name for name in SIMULATED if SETTINGS[name].texts is None or (full and UKP.is_file())]
    seeds = range(1, (SIMULATED_SEEDS_FULL if full else SIMULATED_SEEDS) + 1)
    return todo + [["simulated", name, seed, full, draws] for seed in seeds for name in settings]


def prepare() -> None:
    """Ingest and encode the texts."""
    for name in available():
        ready(name, {*REAL_FULL[name][0], *LEAK_FULL[name]})
    if UKP.is_file():
        draw(SETTINGS["planted"])


def measure(task: Task) -> Row:
    """The figures of one task."""
    kind, *rest = task
    kinds: dict[str, Callable[..., Row]] = {"real": _real, "leak": _leak, "simulated": _simulated}
    return kinds[kind](*rest)


def _real(name: str, seed: int, turns_taken: int, draws: int) -> Row:
    train, others = real(name, seed)
    held = some_prompts(others, VALIDATION, seed)
    split = Split(train, others.subset(held), others.subset(~held))
    fold = np.random.default_rng(seed).permutation(train.n_workers) % FOLDS
    into = tallies(split.test)
    told = [confront(split, fold == turn, into, draws, seed) for turn in range(turns_taken)]
    bootstrap = TwoWayBootstrap(split.test, REPLICATES, LEVEL, seed)
    audiences = {name: _estimates(split.test, tally, bootstrap) for name, tally in into.items() if tally.judged.any()}
    return {"audiences": audiences, "fits": told}


def _estimates(test: Votes, tally: Tally, bootstrap: TwoWayBootstrap) -> Figures:
    """Of an audience: how many workers and test votes it has, and of each method its quality, and its differences."""
    judged, decided = tally.judged, tally.judged & (test.y != 0.5)
    everybody = np.ones(test.n_workers, bool)

    def estimate(values: Array, valid: Array) -> Figures:
        return bootstrap.estimate(values, valid, everybody).model_dump()

    def against(reference: str, name: str) -> Figures:
        return {
            "log_loss": estimate(tally.log_loss(name) - tally.log_loss(reference), judged),
            "accuracy": estimate(tally.right(name) - tally.right(reference), decided),
        }

    methods = {
        name: {
            "log_loss": estimate(tally.log_loss(name), judged),
            "accuracy": estimate(tally.right(name), decided),
            "worst_tenth": worst_tenth(test, tally.right(name), decided),
            "less coterie": against(OURS, name),
            "less reliability": against(REFERENCE, name),
        }
        for name in tally.sums
    }
    return {"workers": len(np.unique(test.worker[judged])), "votes": int(judged.sum()), "methods": methods}


def _simulated(name: str, seed: int, full: bool, draws: int) -> Row:
    data = draw(SETTINGS[name].model_copy(update={"seed": seed} | ({} if full else SMALL)))
    held = some_prompts(data.train, SIMULATED_VALIDATION, seed)
    split = Split(data.train.subset(~held), data.train.subset(held), data.test)
    new = np.zeros(data.train.n_workers, bool)
    new[np.random.default_rng(seed).permutation(len(new))[: round(NEW * len(new))]] = True
    into = tallies(data.test)
    told = confront(split, new, into, draws, seed)
    audiences = {name: _values(data.test, tally) for name, tally in into.items() if tally.judged.any()}
    return {"audiences": audiences, "fits": [told]}


def _values(test: Votes, tally: Tally) -> Figures:
    """As `_estimates`, without intervals and differences."""
    rows = tally.judged
    judged = test.subset(rows)
    methods = {
        name: {
            "log_loss": macro(judged, tally.log_loss(name)[rows]),
            "accuracy": macro(judged, tally.right(name)[rows]),
            "worst_tenth": worst_tenth(test, tally.right(name), rows),
        }
        for name in tally.sums
    }
    return {"workers": int(judged.present.sum()), "votes": len(judged), "methods": methods}


def _leak(name: str, seed: int, draws: int) -> Row:
    train, others = real(name, seed)
    votes = together([train, others])
    often = np.flatnonzero(votes.counts >= LEAST[name])
    votes = votes.of_workers(often)
    test_prompts = np.unique(others.prompt[~some_prompts(others, VALIDATION, seed)])
    rng = np.random.default_rng(seed)
    new = np.zeros(votes.n_workers, bool)
    new[rng.permutation(votes.n_workers)[: votes.n_workers // 2]] = True
    pair = pairs(votes)
    asked = np.isin(votes.prompt, test_prompts)
    half = rng.permutation(pair.max() + 1) % 2 == 0
    judged, shown = asked & half[pair], asked & ~half[pair]
    test, arms = votes.subset(judged), {}
    most = np.where(new, MOST_NEW, MOST_SEEN)
    for arm, first in (("leak-free", None), ("published", shown)):
        # As published a pair is what is held out, inside the tuning as well.
        unit = votes if first is None else Votes(votes.x, votes.y, votes.worker, pair, votes.n_workers)
        kept = training(votes, ~asked, first, most, np.random.default_rng(seed))
        nothing = votes.subset(np.zeros(len(votes), bool))
        arms[arm] = tallies(test)
        confront(Split(unit.subset(kept), nothing, test), new, arms[arm], draws, seed, calibrate=False)
    bootstrap = TwoWayBootstrap(test, REPLICATES, LEVEL, seed)
    return {
        "audiences": {
            name: _leaked(test, arms, name, bootstrap)
            for name in arms["published"]
            if arms["published"][name].judged.any()
        }
    }


def pairs(votes: Votes) -> Array:
    """The number of each vote's pair of responses, [n]: who compared the same two, in whatever order, have the same."""
    anywhere = Votes(votes.x, votes.y, votes.worker, np.zeros_like(votes.prompt), votes.n_workers)
    return np.asarray(split_groups(anywhere)[0]).ravel()


def training(votes: Votes, free: Array, leaking: Array | None, most: Array, rng: np.random.Generator) -> Array:
    """[n] bool: training votes, of each worker as many as are `free` [n] and at most `most` [n_workers]. Those that are
    `leaking` [n] come first, the free ones are drawn at random."""
    size = np.minimum(votes.sum_by_worker(free.astype(float)), most)
    usable = free if leaking is None else free | leaking
    last = (~usable).astype(float) + (0 if leaking is None else 0.5 * ~leaking)
    return np.asarray(usable & (turns(votes, rng, last) < size[votes.worker]))


def _leaked(test: Votes, arms: dict[str, dict[str, Tally]], audience: str, bootstrap: TwoWayBootstrap) -> Figures:
    """Accuracy and log-loss of each method in both arms, and what the leak adds, on the same test votes."""
    one, other = (arms[arm][audience] for arm in ("published", "leak-free"))
    judged, everybody = one.judged & other.judged, np.ones(test.n_workers, bool)
    decided = judged & (test.y != 0.5)

    def estimate(values: Array, valid: Array) -> Figures:
        return bootstrap.estimate(values, valid, everybody).model_dump()

    methods = {
        name: {
            "published": {
                "accuracy": estimate(one.right(name), decided),
                "log_loss": estimate(one.log_loss(name), judged),
            },
            "leak-free": {
                "accuracy": estimate(other.right(name), decided),
                "log_loss": estimate(other.log_loss(name), judged),
            },
            "worth": {
                "accuracy": estimate(one.right(name) - other.right(name), decided),
                "log_loss": estimate(one.log_loss(name) - other.log_loss(name), judged),
            },
        }
        for name in one.sums
    }
    return {"workers": len(np.unique(test.worker[judged])), "votes": int(judged.sum()), "methods": methods}


def summary(rows: list[Row]) -> Figures:
    """By kind of task and data set: audiences, and in them what each method reached and how it differs."""
    told: Figures = {"real": {}, "simulated": {}, "leak": {}, "targets": {}}
    for kind, combine in (("real", _over_seeds), ("simulated", _over_simulated), ("leak", _over_seeds)):
        for name in dict.fromkeys(row["task"][1] for row in rows if row["task"][0] == kind):
            same = [row for row in rows if row["task"][:2] == [kind, name]]
            audiences = [a for a in same[0]["audiences"] if all(a in row["audiences"] for row in same)]
            told[kind][name] = {"runs": len(same), "audiences": {}}
            for audience in audiences:
                parts = [row["audiences"][audience] for row in same]
                told[kind][name]["audiences"][audience] = {
                    "workers": float(np.mean([part["workers"] for part in parts])),
                    "votes": float(np.mean([part["votes"] for part in parts])),
                    "methods": combine([part["methods"] for part in parts]),
                }
            if kind != "leak":
                told[kind][name]["found"] = [fit["found"] for row in same for fit in row["fits"]]
    for name, figures in told["real"].items():
        told["targets"] |= judge(name, figures)
    return told


def _over_seeds(parts: list[Any]) -> Any:
    """Estimates in the same places, combined one by one; the mean of plain numbers."""
    first = parts[0]
    if isinstance(first, dict) and "level" in first:
        return over_splits(parts)
    if isinstance(first, dict):
        return {key: _over_seeds([part[key] for part in parts]) for key in first}
    known = [part for part in parts if part is not None]
    return float(np.mean(known)) if known else None


def _over_simulated(parts: list[Figures]) -> Figures:
    """Means over data sets, and differences with their intervals over these."""

    def each(name: str, quantity: str) -> Array:
        return np.array([part[name][quantity] for part in parts])

    def less(name: str, other: str) -> Figures:
        return {
            quantity: over_data_sets((each(name, quantity) - each(other, quantity)).tolist()) for quantity in QUANTITIES
        }

    return {
        name: {quantity: over_data_sets(each(name, quantity).tolist()) for quantity in QUANTITIES}
        | {
            "worst_tenth": float(np.mean(each(name, "worst_tenth").astype(float))),
            "less coterie": less(name, OURS),
            "less reliability": less(name, REFERENCE),
        }
        for name in parts[0]
    }


def judge(name: str, figures: Figures) -> dict[str, bool]:
    """Demands on a real data set in words, and whether they are met."""
    told, audiences = {}, figures["audiences"]

    def better(audience: str, quantity: str) -> list[str]:
        """The methods that are surely better than coterie."""
        signs = {"log_loss": 1, "accuracy": -1}
        found = []
        for method, reached in audiences[audience]["methods"].items():
            against = reached["less coterie"][quantity]
            if against["low"] is not None and max(signs[quantity] * against[end] for end in ("low", "high")) < 0:
                found.append(method)
        return found

    told[f"{name}: no method's log-loss is surely lower for seen workers"] = not better("seen", "log_loss")
    if any(found["verdict"] != "one-taste" for found in figures["found"]):
        against = audiences["seen"]["methods"][OURS]["less reliability"]["log_loss"]
        told[f"{name}: log-loss surely lower than that of {REFERENCE}, as the test finds differing tastes"] = (
            against["high"] is not None and against["high"] < 0
        )
    if TEN in audiences:
        lower = not better(TEN, "log_loss") and not better(TEN, "accuracy")
        told[f"{name}: no method is surely better for new workers at {TEN} shots"] = lower
    return told


def markdown(summary: Figures) -> str:
    """Tables of each data set, seen and new workers; what the leak is worth."""
    parts = [
        "Every method sees the same votes on the same features, and chooses among its candidates on the same item-disjoint "
        "splits of the training votes. Differences are the method's less coterie's: a positive log-loss (in nats) is worse."
    ]
    for kind, title in (("real", "real annotators"), ("simulated", "simulated annotators, mean over data sets")):
        for name, figures in summary[kind].items():
            verdicts = ", ".join(
                dict.fromkeys(f"{found['verdict']} (p = {found['p_value']:.2g})" for found in figures["found"])
            )
            parts.append(f"### {name}, {title}\n\ncoterie found: {verdicts}.")
            parts.append(_table(figures["audiences"]))
            if kind == "real":
                parts.append(picture(f"comparison-{name}", f"log-loss of new workers over shots, {name}"))
    for name, figures in summary["leak"].items():
        audiences = {a: f for a, f in figures["audiences"].items() if a in (SEEN, TEN, str(MOST_NEW))}
        head = ["method"] + [f"{_people(a)}: published, leak-free, worth of the leak" for a in audiences]
        lines = []
        for method in next(iter(audiences.values()))["methods"]:
            cells = [method]
            for told in audiences.values():
                arms = told["methods"][method]
                reached = (share(arms[arm]["accuracy"]["value"]) for arm in ("published", "leak-free"))
                cells.append(", ".join([*reached, points(arms["worth"]["accuracy"])]))
            lines.append(cells)
        parts.append(
            f"### What the published protocol's leak is worth, {name}\n\nAccuracy on the same votes, as published and "
            f"leak-free, and the difference in points; nothing is calibrated.\n\n{grid(head, lines)}"
        )
    return "\n\n".join(parts)


def _people(audience: str) -> str:
    return "seen" if audience == SEEN else f"new, {audience} shots"


def _table(audiences: Figures) -> str:
    head = ["method", "accuracy, seen", "worst tenth"]
    head += [f"{_people(a)} ({number(told['workers'])} workers): log-loss, accuracy" for a, told in audiences.items()]
    lines = []
    for method, reached in audiences[SEEN]["methods"].items():
        cells = [method, share(reached["accuracy"]["value"]), share(reached["worst_tenth"])]
        for told in audiences.values():
            mine = told["methods"][method]
            if method == OURS:
                cells.append(f"{mine['log_loss']['value']:.4f}, {share(mine['accuracy']['value'])}")
            else:
                cells.append(
                    ", ".join((nats(mine["less coterie"]["log_loss"]), points(mine["less coterie"]["accuracy"])))
                )
        lines.append(cells)
    return grid(head, lines)


def plots(summary: Figures) -> dict[str, Draw]:
    """Of each real data set, log-loss of new workers over shots, less that of the pooled reward."""
    return {f"comparison-{name}": _curves(figures["audiences"]) for name, figures in summary["real"].items()}


def _curves(audiences: Figures) -> Draw:
    shots = [k for k in SHOTS if str(k) in audiences]

    def drawn(axes: Axes) -> None:
        for method in audiences[SEEN]["methods"]:
            reached = [audiences[str(k)]["methods"] for k in shots]
            values = [m[method]["log_loss"]["value"] - m[POOLED]["log_loss"]["value"] for m in reached]
            width = 2.4 if method == OURS else 1.1
            axes.plot(range(len(shots)), values, marker="o", markersize=3, linewidth=width, label=method)
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.set_xlabel("comparisons of a new worker")
        axes.set_ylabel("log-loss − pooled's, nats")
        axes.legend(fontsize=7, ncols=2)

    return drawn
