"""`simulated://SETTING?groups=..&workers=..&...`: annotators with known tastes."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

from coterie.errors import BadConfiguration
from coterie.ingest.sources import Source, in_blocks

SCHEME = "simulated://"


def open_simulated(url: str) -> tuple[Source, dict[str, Any]]:
    """Return the simulated rows as a source, and the truth about the workers.

    Raises:
        BadConfiguration: a setting or parameter that the simulation does not have, or one twice.
    """
    from coterie.simulation import SimulationSettings, simulate

    parts = urlsplit(url)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise BadConfiguration(f"{url}: a parameter is given twice. Remove one.")
    if "setting" in options:
        raise BadConfiguration(f"{url}: the setting stands before the question mark. Remove setting= after it.")
    rows, truth = simulate(SimulationSettings.of(setting=parts.netloc, **options))
    return Source(url, in_blocks(enumerate(rows, start=1))), truth
