"""Rows that are measured one by one in processes of their own, and kept as they come: what is interrupted resumes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from coterie import config, discovery
from coterie.contracts import content_id, write_text
from coterie.progress import progress
from coterie.staging import content_digest

PROCESSES = 2

Task = Any  # what JSON holds: names, numbers, and lists of them
Row = dict[str, Any]  # the figures of one task


@dataclass(frozen=True)
class Log:
    """The rows of finished tasks, a line each; those that other code has measured do not count.

    Attributes:
        path: the file.
        code: fingerprint of all code that decides a row.
    """

    path: Path
    code: str

    def rows(self) -> dict[str, Row]:
        """The rows by `key` of their task."""
        rows = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with suppress(json.JSONDecodeError):  # the last line of a killed run
                told = json.loads(line)
                if told["code"] == self.code:
                    rows[key(told["task"])] = told["row"]
        return rows

    def add(self, task: Task, row: Row) -> None:
        """Keep one more row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(task, row))

    def hold(self, rows: dict[str, Row]) -> None:
        """Keep these rows and no others; no file where there are none."""
        if rows:
            write_text(self.path, "".join(self._line(json.loads(task), row) for task, row in rows.items()))
        else:
            self.path.unlink(missing_ok=True)

    def _line(self, task: Task, row: Row) -> str:
        return json.dumps({"task": task, "code": self.code, "row": row}) + "\n"


@dataclass(frozen=True)
class Work:
    """A task, what measures it, and where its row is kept; `measure` and `task` must pickle."""

    measure: Callable[[Any], Row]
    task: Task
    log: Log


def key(task: Task) -> str:
    """A task as a key: its JSON."""
    return json.dumps(task)


def run(asked: Iterable[Work], desc: str, unit: str, seconds: float = inf, processes: int = PROCESSES) -> None:
    """Measure what the logs do not hold already; after so many seconds nothing more is begun.

    Raises whatever a task raises; the rows of those that have ended are kept.
    """
    work, ends = list(asked), time.monotonic() + seconds
    held = {log: log.rows() for log in dict.fromkeys(one.log for one in work)}
    for log, rows in held.items():
        log.hold(rows)  # without a line that a killed run has left unfinished
    todo = [one for one in work if key(one.task) not in held[one.log]]
    running: dict[Future[Row], Work] = {}
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), _start) as pool,
        progress(total=len(work), desc=desc, unit=unit) as bar,
    ):
        bar.update(len(work) - len(todo))

        def keep(finished: Iterable[Future[Row]]) -> None:
            for one in finished:
                of = running.pop(one)
                of.log.add(of.task, one.result())
                bar.update()

        for one in todo:
            if len(running) == processes:
                keep(wait(running, return_when=FIRST_COMPLETED).done)
            if time.monotonic() >= ends:
                break
            running[pool.submit(one.measure, one.task)] = one
        while running:
            keep(wait(running, return_when=FIRST_COMPLETED).done)


def _start() -> None:
    """Of each process: one thread of BLAS, and no bars of its own across the one that is shown."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}  # loaded later
    threadpool_limits(1)  # loaded already
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115


def fingerprint(sources: Sequence[Path]) -> str:
    """Of all code that decides a row: discovery, its settings, and these files or folders."""
    common = (Path(discovery.__file__).parent, Path(config.__file__))
    return content_id(*(content_digest(source) for source in (*common, *sources)))
