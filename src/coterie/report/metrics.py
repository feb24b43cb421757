"""metrics.json of a run: one schema that other programs read, assembled from what the stages wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from coterie.contracts import ASSIGNMENT, Metrics


def assemble_metrics(
    stages: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Assemble contracts.Metrics.

    Args:
        stages: folders by stage: ingest, encode, embed, cluster, evaluate, and the rewards by name.
        records: stage.json of each of them.
        versions: of the libraries that shaped the result.
    """
    data, clustered, evaluated = (read(stages[name]) for name in ("ingest", "cluster", "evaluate"))
    metrics = Metrics(
        seed=int(records["ingest"]["settings"]["seed"]),
        versions=dict(versions),
        data={name: int(data[name]) for name in ("workers", "comparisons", "refused")},
        heterogeneity=clustered.get("heterogeneity"),
        selection=clustered["selection"] | {"ships": evaluated["ships"]},  # as the gates left it
        heldout=evaluated["heldout"],
        stability={name: value for name, value in clustered["stability"].items() if value is not None},
        worst=evaluated["worst"],
        calibration=evaluated["calibration"],
        coteries=evaluated["coteries"],
        truth=_against_truth(stages["ingest"] / "truth.json", stages["cluster"] / "assignments.parquet"),
        seconds={name: float(record["seconds"]) for name, record in records.items()},
        peak_memory={name: int(record["peak_memory"]) for name, record in records.items()},
    )
    return metrics.model_dump(mode="json")


def read(folder: Path) -> dict[str, Any]:
    """metrics.json of a stage."""
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


def _against_truth(truth: Path, assignments: Path) -> dict[str, float] | None:
    """Simulated annotators only: how well the coteries are the groups that the simulation made."""
    if not truth.is_file():
        return None
    known = json.loads(truth.read_text(encoding="utf-8"))
    table = ASSIGNMENT.read(assignments, ["worker_id", "coterie"])
    groups = np.array([known["workers"][worker]["group"] for worker in table["worker_id"].to_pylist()])
    found = {"groups": float(len(known["groups"])), "oracle_accuracy": float(known["oracle_accuracy"])}
    if (groups >= 0).all():  # else the planted tastes are continuous
        found["ari"] = float(adjusted_rand_score(groups, table["coterie"].to_numpy()))
    return found
