"""report.html: one page that needs nothing else, narrow enough for Kubeflow's frame, and for paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.special import expit

from coterie.contracts import ASSIGNMENT, COMPARISON, DIFFERENCE, TEST, iterate, matrix, write_text
from coterie.report import charts, words
from coterie.report.metrics import read
from coterie.rewards import RewardHead

_PAIRS = 3  # of the pairs that divide the coteries most
_EXCERPT = 700  # characters of a text that the page shows
_TINT = 0.10  # difference in accuracy at which a cell of the matrix has its full colour


def write_report(stages: Mapping[str, Path], metrics: Mapping[str, Any], out: Path, title: str) -> None:
    """Write the report of a run.

    Args:
        stages: folders by stage: ingest, encode, embed, cluster, evaluate, and the rewards by name.
        metrics: contracts.Metrics as a dictionary.
        out: the file.
        title: of the page.
    """
    people = ASSIGNMENT.read(stages["cluster"] / "assignments.parquet")
    evaluated = read(stages["evaluate"])
    coteries = metrics["coteries"]
    several = len(coteries) > 1
    context = {
        "title": title,
        "verdict": words.verdict_line(metrics),
        "evidence": words.evidence(metrics),
        "metrics": metrics,
        "seen": metrics["heldout"]["seen"],
        "data": read(stages["ingest"]),
        "encoder": read(stages["encode"]),
        "evaluated": evaluated,
        "several": several,
        "glyphs": [Markup(charts.glyph(coterie["id"])) for coterie in coteries],
        "embedded_rank": matrix(people["embedding"]).shape[1],
        "map": _inline(
            charts.worker_map(
                matrix(people["embedding"]),
                people["coterie"].to_numpy(),
                matrix(people["posterior"]),
                people["comparisons"].to_numpy(),
            )
        ),
        "table": _own_global_wrong(evaluated["matrix"]["accuracy"]) if several else [],
        "gains": _inline(charts.gains(_differences(coteries, evaluated)) if several else None),
        "selection": _inline(charts.selection(metrics["selection"]["candidates"])),
        "pairs": _divisive_pairs(stages, len(coteries)) if several else [],
    }
    environment = Environment(
        loader=PackageLoader("coterie.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(words, name) for name in ("number", "share", "signed", "points", "nats", "duration", "size")
    }
    write_text(out, environment.get_template("report.html.j2").render(context))


def _inline(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)  # our own charts: nothing of the data is markup in them


def _differences(coteries: list[dict[str, Any]], evaluated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A coterie's own reward minus the global and minus the wrong ones, in accuracy."""
    return [
        {
            "id": coterie["id"],
            "own_vs_global": coterie["own_vs_global"]["accuracy"],
            "own_vs_wrong": wrong["accuracy"],
        }
        for coterie, wrong in zip(coteries, evaluated["own_wrong"], strict=True)
    ]


def _own_global_wrong(accuracy: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The cells of the coterie-by-model table: accuracy, whose reward it is, and a tint by the gain over the global one."""
    rows = []
    for k, cells in enumerate(accuracy):
        common = cells[0]["value"]
        row = []
        for m, cell in enumerate(cells):
            gain = cell["value"] - common
            strength = 0.0 if gain != gain else float(np.clip(abs(gain) / _TINT, 0, 1))
            colour = "0, 114, 178" if gain > 0 else "213, 94, 0"
            row.append(
                {
                    "value": cell["value"],
                    "kind": "global" if m == 0 else "own" if m == k + 1 else "wrong",
                    "tint": f"rgba({colour}, {0.32 * strength:.3f})",
                }
            )
        rows.append(row)
    return rows


def _divisive_pairs(stages: Mapping[str, Path], coteries: int) -> list[dict[str, Any]]:
    """The test pairs on which the coteries' own rewards disagree most: two texts, and each coterie's probability."""
    heads = [RewardHead.load(stages[f"coterie-{k}"]) for k in range(coteries)]
    table = DIFFERENCE.read(stages["embed"] / "differences.parquet", ["comparison_id", "split", "x"])
    table = table.filter(pc.equal(table["split"].cast(pa.string()), TEST))
    if not len(table):
        return []
    x = matrix(table["x"])
    probability = expit(np.stack([head.margin(x) for head in heads], axis=1))
    order = np.argsort(probability.min(axis=1) - probability.max(axis=1), kind="stable")[: 40 * _PAIRS]
    ids = table["comparison_id"].take(pa.array(order)).to_pylist()
    texts = _texts(stages["ingest"] / "comparisons.parquet", ids)
    pairs, prompts = [], set()
    for name, row in zip(ids, order, strict=True):
        text = texts[name]
        if text["prompt_id"] in prompts:  # one pair a prompt, so that three pairs say three things
            continue
        prompts.add(text["prompt_id"])
        pairs.append(
            {
                "prompt": _excerpt(text["prompt"]),
                "texts": (_excerpt(text["chosen"]), _excerpt(text["rejected"])),
                "first": [float(p) for p in probability[row]],
            }
        )
        if len(pairs) == _PAIRS:
            break
    return pairs


def _texts(comparisons: Path, ids: list[str]) -> dict[str, dict[str, str]]:
    """Prompt and responses of some comparisons, read a batch at a time."""
    columns = ["comparison_id", "prompt_id", "prompt", "chosen", "rejected"]
    wanted, found = pa.array(ids, pa.string()), {}
    for batch in iterate(COMPARISON.open(comparisons), columns):
        for row in batch.filter(pc.is_in(batch["comparison_id"], wanted)).to_pylist():
            found[row["comparison_id"]] = row
    return found


def _excerpt(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rsplit(None, 1)[0] + " …"
