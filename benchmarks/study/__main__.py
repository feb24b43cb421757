"""Measure tables, or render what was measured: see benchmarks/study/__init__.py."""

from __future__ import annotations

import argparse
from math import inf
from pathlib import Path

import benchmarks.study
from benchmarks.rows import PROCESSES
from benchmarks.study import render
from benchmarks.study.measuring import measure
from benchmarks.study.tables import OUT, TABLES


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(
        description=benchmarks.study.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}, or render; all without")
    parser.add_argument("--full", action="store_true", help="all rows, not only what two cores do in an hour")
    parser.add_argument(
        "--minutes", type=float, default=inf, help="begin nothing after these; what is missing stays so"
    )
    parser.add_argument("--processes", type=int, default=PROCESSES, help="that measure side by side")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    options = parser.parse_args()
    if unknown := set(options.tables) - {*TABLES, "render"}:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}, and render")
    if options.tables == ["render"]:
        render.write(options.out)
    elif "render" in options.tables:
        parser.error("render stands alone")
    else:
        names = options.tables or list(TABLES)
        measure(names, options.full, options.out, 60 * options.minutes, options.processes)


if __name__ == "__main__":
    main()
