"""report.html: one page that needs nothing else, narrow enough for a phone and for Kubeflow's frame, and for paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coterie.contracts import GLOBAL, write_text
from coterie.report import charts, words
from coterie.report.drawing import glyph
from coterie.report.metrics import read
from coterie.report.pairs import telling_pairs
from coterie.report.people import People

_TINT = 0.10  # difference in accuracy at which a cell of the matrix has its full colour
_FEATURES = 5  # of a coterie's style features that are shown
_LOSERS = 5  # workers who lost most comparisons, that are named
_TRIFLE = 0.005  # a weight that would be shown as zero
_FILTERS = ("number", "share", "signed", "points", "nats", "duration", "size", "sure", "tried")


def write_report(stages: Mapping[str, Path], metrics: Mapping[str, Any], out: Path, title: str) -> None:
    """Write the report of a run.

    Args:
        stages: folders by stage: ingest, encode, embed, cluster, evaluate, and the rewards by name.
        metrics: contracts.Metrics as a dictionary.
        out: the file.
        title: of the page.

    Raises:
        BadData: a stage's table is missing or damaged.
    """
    people, evaluated = People.load(stages), read(stages["evaluate"])
    coteries, heldout, selection = metrics["coteries"], metrics["heldout"], metrics["selection"]
    candidates = sorted(selection["candidates"], key=lambda c: (list(words.MEMBERS).index(c["member"]), c["size"]))
    shots = {int(k): point for k, point in heldout.get("unseen_by_shots", {}).items()}
    ids, several = [coterie["id"] for coterie in coteries], len(coteries) > 1
    gain = heldout["seen"]["difference_to_pooled"]["accuracy"]["value"]
    differ = selection["verdict"] != "one-taste"  # of chance, a tree looks like groups
    adapters = _adapters(stages, evaluated["matrix"]["models"], ids)
    drawn = {
        "map": charts.worker_map(people, ids),
        "dendrogram": charts.dendrogram(people, ids) if differ else None,
        "gains": charts.gains(_differences(coteries, evaluated)) if several else None,
        "selection": charts.selection(candidates),
        "newcomers": charts.newcomers(shots, gain) if selection.get("ships") != "one-reward" else None,
        "calibration": charts.calibration(evaluated.get("calibration_curve", []), evaluated["level"]),
        "adapters": charts.training(
            "adapters",
            "Training of the reward adapters",
            "log-loss, nats a comparison",
            [(told["coterie"], told["curve"]) for told in adapters],
        ),
    }
    context = {
        "title": title,
        "verdict": words.verdict_line(metrics),
        "evidence": words.evidence(metrics),
        "metrics": metrics,
        "selection": selection,
        "candidates": candidates,
        "ships": selection.get("ships"),
        "seen": heldout["seen"],
        "shots": dict(sorted(shots.items())),
        "data": read(stages["ingest"]),
        "encoder": read(stages["encode"]),
        "evaluated": evaluated,
        "gates": {gate["coterie"]: gate for gate in evaluated["gates"]},
        "several": several,
        "differ": differ,
        "glyphs": [Markup(glyph(name)) for name in ids],
        "directions": len(people.directions),
        "styles": _styles(coteries),
        "models": _models(evaluated["matrix"]["models"], ids),
        "table": _own_global_wrong(evaluated["matrix"]) if several else [],
        "adapters": adapters,
        "losers": _most_over_long(adapters),
        "pairs": telling_pairs(stages, people.posterior.mean(axis=0)) if several else None,
        # Our own charts: nothing of the data is markup in them.
        "charts": {name: None if svg is None else Markup(svg) for name, svg in drawn.items()},
    }
    write_page("report.html.j2", context, out)


def write_page(template: str, context: Mapping[str, Any], out: Path) -> None:
    """Write a page of ours to the file `out`. What is not Markup in `context` is text, and shown as it is."""
    environment = Environment(
        loader=PackageLoader("coterie.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(words, name) for name in _FILTERS}
    write_text(out, environment.get_template(template).render(context))


def _unbroken(shown: Any) -> Any:
    """A number and its percent sign stay on one line."""
    return re.sub(r"(?<=\d) %", "\u00a0%", shown) if isinstance(shown, str) and not isinstance(shown, Markup) else shown


def _differences(coteries: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A coterie's own reward minus the global and minus the wrong ones, in accuracy."""
    return [
        {
            "id": coterie["id"],
            "own_vs_global": coterie["own_vs_global"]["accuracy"],
            "own_vs_wrong": wrong["accuracy"],
        }
        for coterie, wrong in zip(coteries, evaluated["own_wrong"], strict=True)
    ]


def _models(names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """What the models of the matrix are called on the page."""
    called = {GLOBAL: "global reward"} | {f"coterie-{k}": f"reward of {name}" for k, name in enumerate(ids)}
    return [called.get(name, name) for name in names]


def _own_global_wrong(matrix: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The cells of the coterie-by-model table: accuracy, whose reward it is, and a tint by the gain over the global one."""
    rows = []
    for k, cells in enumerate(matrix["accuracy"]):
        common = cells[matrix["models"].index(GLOBAL)]["value"]
        row = []
        for model, cell in zip(matrix["models"], cells, strict=True):
            value = cell["value"]
            gain = 0.0 if value is None or common is None else value - common
            colour = "0, 114, 178" if gain > 0 else "213, 94, 0"
            row.append(
                {
                    "value": value,
                    "kind": "global" if model == GLOBAL else "own" if model == f"coterie-{k}" else "wrong",
                    "tint": f"rgba({colour}, {0.32 * min(abs(gain) / _TINT, 1):.3f})",
                }
            )
        rows.append(row)
    return rows


def _adapters(stages: Mapping[str, Path], models: Sequence[str], ids: Sequence[int]) -> list[dict[str, Any]]:
    """What the reward stages said of their adapters, the global one first; nothing where rewards are linear heads."""
    told = [{"coterie": name, **read(stages[model])} for model, name in zip(models, [None, *ids], strict=True)]
    return [figures for figures in told if "curve" in figures]


def _most_over_long(adapters: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The workers who lost most comparisons because a side was too long, and how many."""
    lost = adapters[0]["over_long_by_worker"] if adapters else {}  # a coterie's are among everybody's
    return sorted(lost.items(), key=lambda item: (-item[1], item[0]))[:_LOSERS]


def _styles(coteries: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """The largest style weights of each coterie, as bars on one scale; none where they were not measured.

    What is liked is in the words, so that its weight is above zero and less sure ones reach below it.
    """
    shown = []
    for coterie in coteries:
        told = [_liked(feature) for feature in coterie.get("style", [])[:_FEATURES]]
        shown.append([feature for feature in told if feature["weight"][0] >= _TRIFLE])
    reached = [value for features in shown for feature in features for value in feature["weight"] if value is not None]
    left, right = min([0.0, *reached]), max([0.0, *reached])

    def at(value: float) -> float:
        return float(round(100 * (value - left) / (right - left), 1))

    for features in shown:
        for feature in features:
            value, low, high = feature["weight"]
            feature |= {"zero": at(0), "at": at(value), "sure": low is not None and low > 0}
            feature |= {} if low is None else {"from": at(low), "width": round(at(high) - at(low), 1)}
    return shown


def _liked(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Words of a style feature and its weight with ends, all of them as sizes of what the words say."""
    weight = feature["weight"]
    value, low, high = weight["value"], weight["low"], weight["high"]
    if value < 0:
        value = -value
        low, high = (None, None) if low is None else (-high, -low)
    return {"words": feature["words"], "weight": (value, low, high)}
