"""Run the main pipeline in-process, under kfp.local: the same components, each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from coterie import errors, stages
from coterie.backbones import cache_folder
from coterie.config import Recipe
from coterie.staging import STAGE_FILE

# Kubeflow's parameters have one type; these settings are "auto" or a number.
_AUTO_OR_NUMBER = ("embed_rank", "cluster_coteries", "reward_precision")


def run(recipe: Recipe, out: Path) -> None:
    """Run `recipe`; leave a folder a stage, metrics.json and report.html in `out`, and what was said in run.log.

    Raises:
        CoterieError: of the type that the failed stage raised, with its message.
        RunFailed: a component ended without saying why; the message names the log.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work, failure = out / ".run", out / "failure.json"
    for folder in (work, out / "joint"):  # the latter takes the place of embed, where it is
        shutil.rmtree(folder, ignore_errors=True)
    failure.unlink(missing_ok=True)
    os.environ |= {
        "COTERIE_RUN_FOLDER": str(out),
        "COTERIE_STAGE_CACHE": os.environ.get("COTERIE_STAGE_CACHE") or str(cache_folder() / "stages"),
        "COTERIE_PROGRESS": "1",
        # Coteries train side by side: OpenMP's threads that spin while they wait would take each other's cores.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(stages.repository()), os.environ.get("PYTHONPATH")])),
    }
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp")
    from kfp import local

    from pipelines.coteries import coteries

    arguments = {k: str(v) if k in _AUTO_OR_NUMBER else v for k, v in recipe.arguments().items()}
    with (out / "run.log").open("w", encoding="utf-8") as log:
        try:
            with contextlib.redirect_stdout(_Watched(log, sys.stderr)), _root_logger_kept():
                local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(work), raise_on_error=True)
                coteries(**arguments, title=recipe.title)
        except RuntimeError as error:
            raise _reason(failure, out / "run.log") from error
        finally:
            for record in sorted(work.rglob(STAGE_FILE)):
                _move(record.parent, out)
            shutil.rmtree(work, ignore_errors=True)
    for name in ("report/metrics.json", "report/report.html", "judge/policies.html"):
        if (out / name).is_file():  # there may be no policies
            shutil.copyfile(out / name, out / Path(name).name)


class _Watched(io.TextIOBase):
    """Takes what Kubeflow's local runner prints into a log, and shows a person the stages and their progress bars."""

    # The first group: what a stage says of itself. The second: a progress bar's redrawn line.
    _TOLD = re.compile(
        r"^\s*((?:rewards/|policies/)?[a-z0-9-]+: (?:started|up to date|done|warning).*)$|^\s*(.*\d+%\|.*)$"
    )

    def __init__(self, log: TextIO, screen: TextIO) -> None:
        self.log, self.screen, self.line = log, screen, ""
        self.live = screen.isatty()

    def write(self, text: str) -> int:
        self.log.write(text)
        self.log.flush()
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            told = self._TOLD.match(line)
            if told is None:
                continue
            stage, bar = told.groups()
            if stage and (self.live or not stage.endswith("started")):
                self._show(stage, "\r" if stage.endswith("started") else "\n")
            elif bar and self.live:
                self._show(bar, "\r")
        return len(text)

    def _show(self, text: str, end: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.screen.write(f"\r\x1b[K{text[:width]}{end}" if self.live else f"{text}{end}")
        self.screen.flush()

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """kfp.local leaves a handler behind that writes to the redirected output."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _reason(failure: Path, log: Path) -> errors.CoterieError:
    try:
        word = json.loads(failure.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return errors.RunFailed(f"a component ended without a reason of its own; its last lines are in {log}")
    finally:
        failure.unlink(missing_ok=True)
    kind = getattr(errors, word["type"], errors.RunFailed)
    return kind(
        f"{word['stage']}: {word['message']}".replace(f"{word['stage']}: {word['stage']}: ", f"{word['stage']}: ")
    )


def _move(folder: Path, out: Path) -> None:
    name = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))["stage"]
    target = out / name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, target)
