"""The figures of README.md held against the files of benchmarks/results that it links them to.

A paragraph that links a file, and what follows it up to the next such paragraph, speaks of that file. Its tables must have rows
that are made of the file, cell by cell, and every number in its sentences must be one that the file or its benchmark has, as it
would be written. A file that no reader here knows is searched for the number as such, in any unit.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import discovery, real, scale, verdicts
from coterie.discovery.discover import LEVEL
from coterie.simulation.annotators import CARELESS_SHARE

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(benchmarks/results/([\w/-]+\.json)\)")
NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?\.?\d(?:[\d,]*\d)?(?:\.\d+)?(?: ?%)?(?: \[[^\]]*\])?(?: (?:MB|GB|times|s|million)\b)?"
)
UNITS = (1, 100, 1000, 1e-3, 1e-6, 1e-9)


class Backed(NamedTuple):
    """What a file backs: rows of tables (without their first cell where that is words), and numbers in sentences."""

    rows: list[list[str]]
    numbers: list[str]


class Unbacked(NamedTuple):
    """A figure of README.md that its file does not have."""

    file: str
    figure: str


def of_ingest(told: dict[str, Any]) -> Backed:
    rows = []
    for name, figures in ((name, of) for name, of in told.items() if name.endswith(" rows")):
        programs = [figures[p] for p in ("coterie", "orjson", "pyarrow", "pandas") if p in figures]
        cells = [f"{p['rows_a_second_and_core']:,.0f} ({p['peak_memory'] / 1e6:,.0f} MB)" for p in programs]
        rows.append([name.removesuffix(" rows"), f"{figures['wanted']:,}", *cells, *[""] * (4 - len(cells))])
    return Backed(rows, [])


def of_discovery(told: dict[str, Any]) -> Backed:
    summary = told["summary"]
    times = [f"{v:.{d}f} times" for name, v in summary.items() if "times" in name for d in (0, 1)]
    sizes = [f"{v:.2f} GB" for name, v in summary.items() if name.endswith("GB")]
    return Backed([], [*times, *sizes, str(discovery.FEATURES), f"{discovery.ADAM_STEPS:,}"])


def of_scale(told: dict[str, Any]) -> Backed:
    words = {4: "four"}
    rows = []
    for n in ("1000000", "10000000"):
        embed, cluster = (told[n][stage] for stage in ("embed", "cluster"))
        spent = [f"{of['seconds']:.0f} s, {of['peak_memory'] / 1e9:.2f} GB" for of in (embed, cluster)]
        rows.append([f"{int(n):,}", *spent, f"{words[cluster['coteries']]} coteries, ARI {cluster['ari']:.2f}"])
    large, tenth = told["10000000"], told["a tenth of 10000000"]
    stages = ("embed", "cluster")
    sizes = [f"{tenth[stage]['peak_memory'] / 1e9:.2f}" for stage in stages]
    more = [f"{(large[stage]['peak_memory'] - tenth[stage]['peak_memory']) / 1e6:.0f} MB" for stage in stages]
    workers, responses = (large[of] - told["1000000"][of] for of in ("workers", "responses"))
    counts = [f"{workers:,}", f"{responses / 1e6:.1f} million"]
    return Backed(rows, [*sizes, *(f"{size} GB" for size in sizes), *more, *counts, str(scale.DIMENSION)])


def of_verdicts(told: dict[str, Any]) -> Backed:
    rows, numbers = [], []
    for name, (_, target) in verdicts.PLAN.items():
        figures = told["settings"].get(name)
        if figures is None:
            continue
        n, right = figures["data_sets"], figures["verdicts"]
        accuracy = ", ".join(f"{100 * figures['accuracy'][model]:.1f} %" for model in ("shipped", "oracle", "pooled"))
        ari = f"{figures['ari']['mean']:.2f} ({figures['ari']['min']:.2f})" if figures["ari"] else ""
        verdict = "continuous" if name == "continuous" else "coteries"
        rows.append([str(right[verdict]), ari if verdict == "coteries" else "", accuracy])
        numbers.append(str(n))
        if target is not None:
            numbers.append(str(round(target.misses * n)))
        if "null" in name:
            numbers.append(str(n - right["one-taste"]))
    return Backed(rows, [*numbers, f"{LEVEL:g}".lstrip("0"), f"{CARELESS_SHARE:.0%}".replace("%", " %")])


def of_real(told: dict[str, Any]) -> Backed:
    numbers = [str(real.MANY)]
    for runs in (told[name]["runs"] for name in real.SOURCES if name in told):
        numbers.append(f"{runs[0]['workers']:,}")
        for people in (of for run in runs for of in run["people"].values()):
            numbers.append(f"{people['workers']:,}")
            for reference in ("to reliability", "to pooled"):
                numbers.append(interval(people[reference]["shipped"]["log_loss"], 1000, "+.1f"))
    return Backed([], numbers)


def of_policies(told: dict[str, Any]) -> Backed:
    shares = [figures[of] for figures in told["texts"].values() for of in ("recovered", "own_minus_wrong_of_oracle")]
    return Backed([], [interval(one, 100, ".1f", " %") for one in shares])


def interval(told: dict[str, float], factor: float, form: str, unit: str = "") -> str:
    value, low, high = (format(factor * told[of], form) for of in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


READERS = {
    "ingest.json": of_ingest,
    "discovery.json": of_discovery,
    "scale.json": of_scale,
    "verdicts.json": of_verdicts,
    "real.json": of_real,
    "policies.json": of_policies,
}


def unbacked(readme: str, results: Path = ROOT / "benchmarks" / "results") -> list[Unbacked]:
    """The figures of a README that its files do not have, in their order."""
    missing = []
    for file, block in blocks(readme):
        told = json.loads((results / file).read_text(encoding="utf-8"))
        backed = READERS[file](told) if file in READERS else None
        if block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()[2:]]
            if backed is None:
                missing += [Unbacked(file, cell) for line in lines for cell in line[1:] if not anywhere(cell, told)]
            else:
                lines = [line for line in lines if line not in backed.rows]
                missing += [Unbacked(file, " | ".join(line)) for line in lines if line[1:] not in backed.rows]
            block = "\n".join(line[0] for line in lines)
        for number in NUMBER.findall(block):
            written = number.replace("−", "-").strip()
            found = anywhere(written, told) if backed is None else written in backed.numbers
            if not found:
                missing.append(Unbacked(file, written))
    return missing


def blocks(readme: str) -> Iterator[tuple[str, str]]:
    """The paragraphs and tables that speak of a file of results, without their links and code."""
    file = None
    for block in re.split(r"\n\s*\n", readme):
        if block.startswith("#"):
            file = None
        if links := LINK.findall(block):
            file = links[0]
        if file is not None:
            bare = re.sub(r"`[^`]*`|\]\([^)]*\)", "", block)
            yield file, bare if block.startswith("|") else " ".join(bare.split())


def anywhere(text: str, told: Any) -> bool:
    """Whether each number in a text is one of `told`, in some unit, to the digits that are shown."""
    values = list(leaves(told))
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text):
        digits = len(number.partition(".")[2])
        shown = number.replace(",", "")
        if not any(f"{abs(value) * unit:.{digits}f}" == shown for value in values for unit in UNITS):
            return False
    return True


def leaves(told: Any) -> Iterator[float]:
    """All numbers in what JSON holds."""
    if isinstance(told, dict | list):
        for value in told.values() if isinstance(told, dict) else told:
            yield from leaves(value)
    elif isinstance(told, int | float) and not isinstance(told, bool):
        yield told
