"""Measuring tables: rows in two processes, kept as they come, and the results that are made of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from math import inf
from pathlib import Path

from benchmarks.rows import PROCESSES, Log, Row, Task, Work, fingerprint, key, run
from benchmarks.study import render, tables
from benchmarks.study.tables import Figures
from coterie.contracts import write_text
from coterie.staging import content_digest, versions


def measured(name: str, task: Task) -> Row:
    """A row of a table, with the task and the seconds of processor time it took."""
    table, started = tables.load(name), time.process_time()
    row = table.measure(task)
    return {"task": task, "seconds": round(time.process_time() - started, 1), **row}


def measure(names: list[str], full: bool, out: Path, seconds: float = inf, processes: int = PROCESSES) -> None:
    """Measure what the logs in `out` do not hold, for so many seconds, and write the results of each table."""
    out.mkdir(parents=True, exist_ok=True)
    planned: dict[str, tuple[list[Task], Log]] = {}
    for name in names:
        table = tables.load(name)
        planned[name] = table.tasks(full), Log(out / f"{name}.jsonl", fingerprint(table.SOURCES))
        if {key(task) for task in planned[name][0]} - planned[name][1].rows().keys():
            table.prepare()
    work = [Work(partial(measured, name), task, log) for name, (todo, log) in planned.items() for task in todo]
    try:
        run(work, "study", "rows", seconds, processes)
    finally:
        for name, (todo, log) in planned.items():
            write_results(name, todo, log, full, out)


def write_results(name: str, todo: list[Task], log: Log, full: bool, out: Path) -> None:
    """`out`/<name>.json: the rows that were measured, what they say, and from what they are."""
    table, held = tables.load(name), log.rows()
    rows = [held[key(task)] for task in todo if key(task) in held]
    if todo and not rows:
        print(f"{name}: nothing measured", file=sys.stderr)
        return
    results: Figures = {
        "table": name,
        "command": f"python -m benchmarks.study {name}{' --full' if full else ''}",
        "rows_planned": len(todo),
        "rows_measured": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "revision": revision(),
        "code": log.code,
        "versions": versions(),
        "data": {path.name: content_digest(path) for path in table.DATA if path.is_file()},
        "summary": table.summary(rows),
    }
    each = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    write_text(out / f"{name}.json", f'{json.dumps(results, indent=1)[:-2]},\n "rows": [\n{each}\n ]\n}}\n')
    print(render.section(results))


def revision() -> str | None:
    """The commit, marked where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{commit}{changed}" if commit else None
