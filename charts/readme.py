"""The chart's README, made of the comments in values.yaml.

python -m charts.readme        # writes charts/coterie/README.md anew
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).with_name("coterie")
README = CHART / "README.md"

_HEAD = """# Chart coterie {version}

{description}. How to install, upgrade and look after it: [docs/operate.md](../../docs/operate.md).

    make images REGISTRY=registry.example/coterie            # prints the three images by digest
    helm install coterie charts/coterie -n people --create-namespace \\
      --set images.train=registry.example/coterie/coterie-train@sha256:... \\
      --set images.predictor=registry.example/coterie/coterie-predictor@sha256:... \\
      --set images.router=registry.example/coterie/coterie-router@sha256:...
    helm test coterie -n people --logs

It needs Kubernetes 1.27, KServe in Standard mode and, unless `pipelines.enabled=false`, Kubeflow Pipelines; it installs none of
them. `ci/` holds values for a small trial, for production, without a registry outside, with existing stores, and without GPUs.

This file is made of the comments in values.yaml: `python -m charts.readme`.
"""


class Value(NamedTuple):
    """A row of the table: a key with its comment, or a section of them."""

    section: str
    key: str
    default: Any
    comment: str


def read_values(text: str) -> list[Value]:
    """The values of a values.yaml with the comments (`# --`) above them, in their order."""
    values, section, comment = yaml.safe_load(text), "", ""
    path: list[str] = []
    found = []
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif match := re.match(r" *# (-- )?(.*)", line):
            starts, words = match.groups()
            comment = words if starts else f"{comment} {words}" if comment else ""
        elif match := re.match(r"( *)([A-Za-z0-9]+):", line):
            depth, key = len(match[1]) // 2, match[2]
            path = [*path[:depth], key]
            default = values
            for part in path:
                default = default[part]
            nested = line.rstrip().endswith(f"{key}:")
            if not nested or comment:
                found.append(Value(section, ".".join(path), default, comment))
            comment = ""
    return [value for value in found if not _inside(value, found)]


def _inside(value: Value, found: list[Value]) -> bool:
    """Whether a value without a comment is told by the row of a mapping above it."""
    return not value.comment and any(
        value.key.startswith(f"{other.key}.") and isinstance(other.default, dict) for other in found
    )


def readme(chart: Path = CHART) -> str:
    """The text of the README."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    lines = [_HEAD.format(version=about["version"], description=about["description"])]
    section = ""
    for value in read_values((chart / "values.yaml").read_text(encoding="utf-8")):
        if value.section != section:
            section = value.section
            lines.append(f"## {section}\n\n| value | default | |\n|---|---|---|")
        default = json.dumps(value.default).replace("|", "\\|")
        lines.append(f"| `{value.key}` | `{default}` | {value.comment.replace('|', chr(92) + '|')} |")
    return re.sub(r"\n(## )", r"\n\n\1", "\n".join(lines)).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
