"""docs/results.md and its pictures, from the results: nothing is measured here, and no number is written by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study import tables
from benchmarks.study.answer import answer, real_section
from benchmarks.study.tables import OUT, TABLES, Draw, Figures
from coterie.contracts import replacing, write_text
from coterie.report.words import duration, number

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
_STYLE = {
    "svg.hashsalt": "coterie",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9dee1",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_SIZE = (6.5, 3.6)  # inches
_INTRODUCTION = (
    "Written by `python -m benchmarks.study render` from the files of `benchmarks/results/`; each table names the command "
    "that measures it. All quality is on prompts that nothing was fitted to, every worker counted alike. Pooled is one reward for "
    "everybody (Bradley-Terry on features); pooled + reliability allows for careless workers as well, and is what tastes have to "
    "beat. The real data are public and not part of this repository."
)


def write(out: Path = OUT, at: Path = PAGE) -> None:
    """Write the page, and the pictures beside the results."""
    for name in TABLES:
        if (told := tables.results(name, out)) is not None:
            for picture, draw in tables.load(name).plots(told["summary"]).items():
                save(draw, out / f"{picture}.svg")
    write_text(at, page(out))


def page(out: Path = OUT) -> str:
    """The page in Markdown."""
    found = [told for name in TABLES if (told := tables.results(name, out)) is not None]
    parts = ["# Results", _INTRODUCTION, answer(found), real_section(), *(section(told) for told in found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(told: Figures) -> str:
    """A table's section: what was measured, by which command, and whether its targets are met."""
    table, summary = tables.load(told["table"]), told["summary"]
    rows = f"{number(told['rows_measured'])} of {number(told['rows_planned'])} rows"
    lines = [
        f"## {table.TITLE}",
        f"`{told['command']}` · [{told['table']}.json](../benchmarks/results/study/{told['table']}.json) · "
        f"{rows} · {duration(told['seconds'])} of processor time · revision {told['revision'] or 'unknown'}",
        table.markdown(summary),
    ]
    if summary["targets"]:
        lines.append(
            "\n".join(f"- {what}: {'met' if met else '**missed**'}" for what, met in summary["targets"].items())
        )
    return "\n\n".join(lines)


def save(draw: Draw, path: Path) -> None:
    """Draw on one axes; the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), replacing(path) as temporary:
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.subplots())
        figure.savefig(temporary, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
