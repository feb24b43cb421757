"""What a table of the study offers, and where its results lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from benchmarks.rows import Row, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "results"
OUT = RESULTS / "study"
TABLES = ("comparison", "coteries", "amounts", "failures", "policies")  # in the order of the page, and of measuring

Figures = dict[str, Any]  # what JSON holds
Draw = Callable[["Axes"], None]


class Table(Protocol):
    """A module of this package.

    Attributes:
        TITLE: of its section in docs/results.md.
        SOURCES: files and folders of benchmarks/ that decide a row; those of coterie.discovery, and coterie.config, always do.
        DATA: files that it reads. Where one is absent, `tasks` leaves out what needs it.
    """

    TITLE: str
    SOURCES: tuple[Path, ...]
    DATA: tuple[Path, ...]

    def tasks(self, full: bool) -> list[Task]:
        """What to measure, each in JSON's own types (lists, no tuples): what fits the hour, or everything."""

    def prepare(self) -> None:
        """Make what tasks share, once, before processes begin."""

    def measure(self, task: Task) -> Row:
        """The figures of one task, in JSON's own types; decided by the task and the code alone."""

    def summary(self, rows: list[Row]) -> Figures:
        """What the page says, with intervals; `rows` have their "task" and "seconds" (of processor time) as well.

        Under "targets": each demand in words, and whether it is met.
        """

    def markdown(self, summary: Figures) -> str:
        """The section, without its title, command and targets; every number is from the summary."""

    def plots(self, summary: Figures) -> dict[str, Draw]:
        """Pictures by name; `markdown` points to them by `picture`."""


def load(name: str) -> Table:
    """The table of this name."""
    return cast(Table, import_module(f"benchmarks.study.{name}"))


def results(name: str, out: Path = OUT) -> Figures | None:
    """What was measured for a table; None where nothing was."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def picture(name: str, told: str) -> str:
    """A picture of `plots` in Markdown, as seen from docs/, with words for those who do not see it."""
    return f"![{told}](../benchmarks/results/study/{name}.svg)"


def grid(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
