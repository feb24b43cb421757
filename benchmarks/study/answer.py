"""What a reader of docs/results.md wants to know first, out of all results: who gains, how much, and when not."""

from __future__ import annotations

from benchmarks.study.tables import RESULTS, Figures, grid, results
from coterie.report.words import interval, number, points, share, signed

NAMES = {"ukpconvarg1": "UKPConvArg1 (Habernal and Gurevych 2016)", "tldr": "TL;DR (Stiennon et al. 2020)"}


def answer(tables: list[Figures]) -> str:
    """The answer in sentences, each from results that are there; and which targets were missed."""
    by = {told["table"]: told["summary"] for told in tables}
    said = [
        *_simulated(results("verdicts", RESULTS)),
        *_real(results("real", RESULTS)),
        *_amounts(by.get("amounts")),
        *_coteries(by.get("coteries")),
        *_failures(by.get("failures")),
        *_policies(by.get("policies")),
        *_targets(tables),
    ]
    return "\n".join(["## Who gains, how much, and when not", "", *(f"- {one}" for one in said)])


def _simulated(found: Figures | None) -> list[str]:
    if found is None:
        return []
    groups, nulls = found["settings"]["groups"], [n for n in found["settings"] if n.startswith("small-null")]
    accuracy = {model: 100 * groups["accuracy"][model] for model in ("shipped", "pooled", "oracle")}
    false = [
        f"{found['settings'][name]['data_sets'] - found['settings'][name]['verdicts']['one-taste']} of "
        f"{found['settings'][name]['data_sets']} ({name.removeprefix('small-')})"
        for name in nulls
    ]
    return [
        f"**Where there are groups** (four, simulated), what is shipped has {accuracy['shipped']:.1f} % of held-out "
        f"choices right, one reward for all {accuracy['pooled']:.1f} %, told the true groups {accuracy['oracle']:.1f} % "
        "([verdicts.json](../benchmarks/results/verdicts.json)).",
        f"**Where there are none**: of small data sets of one taste, {', '.join(false)} were said to differ.",
    ]


def _real(found: Figures | None) -> list[str]:
    """Of each real data set: the verdicts, and what is shipped against pooled + reliability."""
    said = []
    for name in NAMES if found is not None else ():
        if found is None or name not in found:
            continue
        runs = found[name]["runs"]
        told = [run["people"]["all"]["to reliability"]["shipped"]["log_loss"] for run in runs]
        better, worse = (sum(end is not None and sign * end > 0 for end in ends) for sign, ends in _ends(told))
        surely = f"surely better in {better}, surely worse in {worse} of {len(runs)} splits"
        verdicts = ", ".join(dict.fromkeys(run["verdict"] for run in runs))
        said.append(
            f"**{NAMES[name]}**, {number(runs[0]['workers'])} workers, {number(runs[0]['comparisons'])} comparisons: {verdicts}. What "
            f"is shipped, against pooled + reliability in thousandths of a nat (negative is better): "
            f"{'; '.join(interval(one, 1000, 1, sign=True) for one in told)}; {surely}."
        )
    return said


def _ends(told: list[Figures]) -> list[tuple[int, list[float | None]]]:
    """The ends of the intervals of a log-loss that would be beyond zero, and the sign they have then: better, worse."""
    return [(-1, [one["high"] for one in told]), (1, [one["low"] for one in told])]


def _amounts(summary: Figures | None) -> list[str]:
    if summary is None:
        return []
    said = []
    for what, words in (("served", "to bring half of what the oracle gains"), ("found", "to find the groups")):
        fewest = {number(int(workers)): least[what] for workers, least in summary["fewest"].items()}
        enough = [f"{number(least)} with {workers} workers" for workers, least in fewest.items() if least]
        if never := ", ".join(workers for workers, least in fewest.items() if not least):
            enough.append(f"no number that was run with {never}")
        said.append(f"{words}, {', '.join(enough)}")
    return [f"**Comparisons of each worker that suffice** with four groups: {'; '.join(said)}."]


def _coteries(summary: Figures | None) -> list[str]:
    if summary is None:
        return []
    said = []
    for name, figures in summary["settings"].items():
        best, picked = figures["best"], figures["automatic"]
        told = f"{name} {best['method']}, K = {best['size']}, {interval(best['log_loss'], 1000, 1, sign=True)}"
        if picked is not None:
            told += f" (what coterie chose by itself {interval(picked['log_loss'], 1000, 1, sign=True)})"
        said.append(told)
    return [
        f"**The best of all methods and numbers in hindsight**, log-loss less pooled + reliability's in thousandths of a nat: {'; '.join(said)}."
    ]


def _failures(summary: Figures | None) -> list[str]:
    if summary is None:
        return []
    said = [
        f"{name} {points(figures['naive']['accuracy'])} (coterie {points(figures['ours']['accuracy'])}; warned of in "
        f"{figures['caught_by_any']} of {figures['data_sets']} data sets)"
        for name, figures in summary["failures"].items()
    ]
    return [f"**Groups made without asking**, in points of accuracy against one pooled reward: {'; '.join(said)}."]


def _policies(summary: Figures | None) -> list[str]:
    if summary is None:
        return []
    said = []
    for name, figures in summary["settings"].items():
        size, told = max(figures["sizes"].items(), key=lambda of: of[1]["own against global"]["value"])
        said.append(f"{name} {interval(told['own against global'], 100, 1)} % with {size}")
    return [f"**Own policy against everybody's**, best of sixteen in feature space, at the best K: {'; '.join(said)}."]


def _targets(tables: list[Figures]) -> list[str]:
    if not tables:
        return []
    every = [(told["table"], *of) for told in tables for of in told["summary"]["targets"].items()]
    missed = [f"{table}, {what}" for table, what, met in every if not met]
    told = f"**{len(every) - len(missed)} of {len(every)} targets of the tables below are met**"
    return [f"{told}; missed: {'; '.join(missed)}." if missed else f"{told}."]


def real_section() -> str | None:
    """The table of benchmarks.real; None where nothing was measured."""
    found = results("real", RESULTS)
    if found is None:
        return None
    head = ["data", "split", "verdict", "p", "half-split ARI", "ships", "shipped: accuracy", "log-loss"]
    head += ["log-loss less pooled + reliability's", "less pooled's", "accuracy less pooled + reliability's"]
    lines = []
    for name in NAMES:
        for run in found[name]["runs"] if name in found else ():
            people = run["people"]["all"]
            lines.append(
                [
                    name,
                    str(run["seed"]),
                    run["verdict"],
                    f"{run['p_value']:.2g}",
                    "" if run["half_split_ari"] is None else f"{run['half_split_ari']:.2f}",
                    run["ships"]["gate"],
                    share(people["accuracy"]["shipped"]["value"]),
                    f"{people['log_loss']['shipped']['value']:.4f}",
                    interval(people["to reliability"]["shipped"]["log_loss"], 1000, 1, sign=True),
                    interval(people["to pooled"]["shipped"]["log_loss"], 1000, 1, sign=True),
                    points(people["to reliability"]["shipped"]["accuracy"]),
                ]
            )
    targets = [
        f"- {name}, split {run['seed']}: upper end {signed(1000 * max(run['target']['upper_end'].values()), 1)}, at most "
        f"{signed(1000 * run['target']['at_most'], 1)} is asked: {'met' if run['target']['met'] else '**missed**'}"
        for name in NAMES
        for run in (found[name]["runs"] if name in found else ())
        if "target" in run
    ]
    return "\n\n".join(
        [
            "## On real annotators",
            "`python -m benchmarks.real` · [real.json](../benchmarks/results/real.json)",
            "The stages under default settings, no prompt in two splits. Differences of log-loss in thousandths of a nat (negative "
            "is better), of accuracy in points, with intervals of 95 % over workers and prompts.",
            grid(head, lines),
            "\n".join(targets),
        ]
    )
