"""Progress bars: on a terminal, and where a parent process that shows them to a person asks for them."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, *, total: float | None = None, desc: str = "", unit: str = "") -> Any:
    """A tqdm bar on standard error; silent without a terminal, unless COTERIE_PROGRESS is set."""
    watched = bool(os.environ.get("COTERIE_PROGRESS"))
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=f" {unit}" if unit else "",
        unit_scale=True,
        disable=False if watched else None,
        mininterval=0.5 if watched else 0.1,
        ascii=" #" if watched else None,
        leave=False,
    )
