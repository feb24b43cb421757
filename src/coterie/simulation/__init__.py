"""Simulated annotators with known tastes over texts whose differences a reader can see.

Who sees which pair, in which order, what they like and how they vote is all drawn from one seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from coterie.contracts import replacing
from coterie.simulation.annotators import Annotators, draw_annotators
from coterie.simulation.comparisons import Pairs, made_up_pairs, planted_pairs
from coterie.simulation.settings import SimulationSettings

__all__ = ["SimulationSettings", "simulate", "write_simulation"]

_BEGIN = np.datetime64("2025-01-01T00:00:00", "s")  # the first vote; a minute later the next


def simulate(settings: SimulationSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Simulate preferences.

    Returns:
        The rows, in the order of time: worker, prompt, prompt_id, chosen, rejected, shown_first ("chosen" or
        "rejected"), created_at (ISO 8601).
        The truth: setting, settings, seed; attributes, the names of what tastes are about; groups, each with its
        name in words, number of workers and taste by attribute; workers, each with group (-1 where tastes are
        continuous), reliability and taste in the order of the attributes; expected_accuracy and oracle_accuracy, the
        share of votes that the worker's own true taste gets right in expectation and in this draw. Tastes are in
        logits a standard deviation of the attribute.

    Raises:
        BadData: the texts to plant tastes on cannot be read. BadConfiguration: the accuracy cannot be reached.
    """
    rng = np.random.default_rng(settings.seed)
    pairs = made_up_pairs(settings, rng) if settings.texts is None else planted_pairs(settings.texts, rng)
    people = draw_annotators(settings.setting, settings.groups, len(pairs.workers), pairs.attributes, rng)
    people = people.scaled(settings.accuracy, pairs.worker, pairs.differences)
    first_wins = people.votes(pairs.worker, pairs.differences, rng)
    return _rows(pairs, first_wins, rng), _truth(settings, pairs, people, first_wins)


def write_simulation(settings: SimulationSettings, out: Path) -> dict[str, int]:
    """Write `out`/preferences.jsonl and `out`/truth.json; return how many comparisons and workers there are."""
    rows, truth = simulate(settings)
    with replacing(out / "preferences.jsonl") as temporary, temporary.open("wb") as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in rows)
    with replacing(out / "truth.json") as temporary:
        temporary.write_bytes(orjson.dumps(truth, option=orjson.OPT_INDENT_2))
    return {"comparisons": len(rows), "workers": len(truth["workers"])}


def _rows(pairs: Pairs, first_wins: np.ndarray[Any, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    order = rng.permutation(len(first_wins))
    shown = rng.random(len(first_wins)) < 0.5  # whether the chosen one was shown first
    times = np.datetime_as_string(_BEGIN + 60 * np.arange(len(order)), unit="s").tolist()
    return [
        {
            "worker": pairs.workers[worker],
            "prompt": pairs.prompts[row],
            "prompt_id": pairs.prompt_ids[row],
            "chosen": pairs.first[row] if wins else pairs.second[row],
            "rejected": pairs.second[row] if wins else pairs.first[row],
            "shown_first": "chosen" if chosen_first else "rejected",
            "created_at": f"{time}Z",
        }
        for row, worker, wins, chosen_first, time in zip(
            order.tolist(),
            pairs.worker[order].tolist(),
            first_wins[order].tolist(),
            shown.tolist(),
            times,
            strict=True,
        )
    ]


def _truth(
    settings: SimulationSettings, pairs: Pairs, people: Annotators, first_wins: np.ndarray[Any, Any]
) -> dict[str, Any]:
    utilities = people.utilities(pairs.worker, pairs.differences)
    margins = people.reliability[pairs.worker] * np.abs(utilities)
    right = np.where(utilities == 0, 0.5, (utilities > 0) == first_wins)
    return {
        "setting": settings.setting,
        "settings": settings.model_dump(mode="json", exclude={"texts"}),  # a path says nothing elsewhere
        "seed": settings.seed,
        "attributes": list(pairs.attributes),
        "groups": [
            {
                "name": name,
                "workers": int((people.group == k).sum()),
                "taste": {a: round(w, 6) for a, w in zip(pairs.attributes, taste, strict=True) if w},
            }
            for k, (name, taste) in enumerate(zip(people.names, people.group_tastes.tolist(), strict=True))
        ],
        "workers": {
            worker: {
                "group": group,
                "reliability": reliability,
                "taste": [round(weight, 6) for weight in taste],
            }
            for worker, group, reliability, taste in zip(
                pairs.workers,
                people.group.tolist(),
                people.reliability.tolist(),
                people.tastes.tolist(),
                strict=True,
            )
        },
        "expected_accuracy": float(np.mean(1 / (1 + np.exp(-margins)))),
        "oracle_accuracy": float(right.mean()),
    }
