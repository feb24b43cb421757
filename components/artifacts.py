"""What a component does around its stage: paths out of artifacts, figures into the artifacts that the Kubeflow UI draws."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError

SECRETS_FOLDER = "/etc/coterie"  # on a cluster: a file for each environment variable that a secret holds


def run(stage: Callable[..., dict[str, Any]], *, metrics: Any = None, **arguments: Any) -> dict[str, Any]:
    """Call `stage` with artifacts turned into paths; log its scalar figures as metrics; return all its figures.

    A CoterieError ends the component with its message and exit code alone: the Kubeflow UI shows the last lines of a
    failed step, and a traceback would hide them.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for file in sorted(Path(SECRETS_FOLDER).glob("[A-Z]*")):
        os.environ.setdefault(file.name, file.read_text(encoding="utf-8").strip())
    try:
        figures = stage(**{name: _plain(value) for name, value in arguments.items()})
    except CoterieError as error:
        logging.getLogger("coterie").error("%s", error)
        raise SystemExit(error.exit_code) from error
    if metrics is not None:
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics.log_metric(name, float(value))
    return figures


def show(artifact: Any, text: str) -> None:
    """Write the text of a Markdown artifact."""
    Path(artifact.path).write_text(text, encoding="utf-8")


def ending(title: str, state: str, error: str | None) -> str:
    """How a run has ended, in words; `state` is Kubeflow's."""
    if state == "SUCCEEDED":
        return f"**{title}** is done. What it found is in the report: output `page` of the step report.\n"
    why = f": {error}" if error else ""
    words = f"**{title}** has ended as {state}{why}."
    return f"{words} The last lines of the step that failed say why; a new run takes finished steps from the cache.\n"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return Path(value.path) if hasattr(value, "path") and hasattr(value, "uri") else value
