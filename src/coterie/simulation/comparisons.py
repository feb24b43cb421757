"""Comparisons to be judged: made-up texts shared between the annotators, or real ones with tastes planted on them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from coterie.contracts import COMPARISON, content_id, iterate
from coterie.encoding.style import STYLE_NAMES, style_features
from coterie.errors import BadData
from coterie.simulation.annotators import Array, Rows, draw_amounts
from coterie.simulation.settings import SimulationSettings
from coterie.simulation.texts import ATTRIBUTES, write_texts

_COLUMNS = ("worker_id", "prompt", "prompt_id", "chosen", "rejected")


@dataclass(frozen=True)
class Pairs:
    """Who judges what, before anybody has voted.

    Attributes:
        attributes: names of the d attributes that tastes are about.
        workers: ids, [w].
        worker: row in `workers` of each comparison, [m].
        prompts, prompt_ids, first, second: texts of each comparison, [m].
        differences: attributes of `first` less those of `second`, in standard deviations of a response, [m, d].
    """

    attributes: tuple[str, ...]
    workers: list[str]
    worker: Rows
    prompts: list[str]
    prompt_ids: list[str]
    first: list[str]
    second: list[str]
    differences: Array


def made_up_pairs(settings: SimulationSettings, rng: np.random.Generator) -> Pairs:
    """Each worker judges random distinct pairs of one pool, so that most pairs are judged by several workers."""
    texts = write_texts(settings.prompts, settings.responses, rng)
    attributes = texts.attributes / np.maximum(texts.attributes.std(axis=(0, 1)), 1e-12)
    sides = np.array(list(combinations(range(settings.responses), 2)))
    amounts = draw_amounts(settings.setting, settings.workers, settings.comparisons_per_worker, settings.pairs, rng)
    drawn = np.concatenate([rng.choice(settings.pairs, size=n, replace=False) for n in amounts.tolist()])
    prompt, pair = np.divmod(drawn, len(sides))
    first, second = sides[pair].T
    rows = list(zip(prompt.tolist(), first.tolist(), second.tolist(), strict=True))
    width = len(str(settings.workers))
    return Pairs(
        attributes=ATTRIBUTES,
        workers=[f"annotator-{i:0{width}d}" for i in range(1, settings.workers + 1)],
        worker=np.repeat(np.arange(settings.workers), amounts),
        prompts=[texts.prompts[p] for p, _, _ in rows],
        prompt_ids=[f"prompt-{p}" for p, _, _ in rows],
        first=[texts.responses[p][a] for p, a, _ in rows],
        second=[texts.responses[p][b] for p, _, b in rows],
        differences=attributes[prompt, first] - attributes[prompt, second],
    )


def planted_pairs(path: Path, rng: np.random.Generator) -> Pairs:
    """Real texts and who really judged which pair of them; the votes of the file are forgotten.

    The attributes are the style features, as they can be measured on any text.

    Raises:
        BadData: no such file, no comparisons, or a line without a worker, a prompt, and two texts.
    """
    rows = list(_parquet(path) if path.suffix == ".parquet" else _line_json(path))
    if not rows:
        raise BadData(f"{path}: no comparisons to plant tastes on. Give a file that has some.")
    ids, prompts, prompt_ids, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    # The file says who won; which of the two comes first here must not.
    flip = rng.random(len(rows)) < 0.5
    first = [r if f else c for c, r, f in zip(chosen, rejected, flip, strict=True)]
    second = [c if f else r for c, r, f in zip(chosen, rejected, flip, strict=True)]
    features, of_first, of_second = _style(prompts, first, second)
    scale = features.std(axis=0)
    workers, worker = np.unique(np.array(ids, dtype=object), return_inverse=True)
    features /= np.where(scale > 1e-9, scale, 1.0)  # what never differs stays zero
    differences = features[of_first] - features[of_second]
    return Pairs(STYLE_NAMES, workers.tolist(), worker, prompts, prompt_ids, first, second, differences)


def _style(prompts: list[str], first: list[str], second: list[str]) -> tuple[Array, Rows, Rows]:
    """Style features of the distinct responses [n, d], and the row of each comparison's two in them, [m] and [m]."""
    rows: dict[tuple[str, str], int] = {}
    numbers = [
        np.array([rows.setdefault(text, len(rows)) for text in zip(prompts, side, strict=True)], dtype=np.intp)
        for side in (first, second)
    ]
    features = style_features([prompt for prompt, _ in rows], [response for _, response in rows])
    return features.astype(np.float64), numbers[0], numbers[1]


def _parquet(path: Path) -> Iterator[tuple[str, ...]]:
    for batch in iterate(COMPARISON.open(path), list(_COLUMNS)):
        yield from zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True)


def _line_json(path: Path) -> Iterator[tuple[str, ...]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _comparison(line, f"{path}, line {number}")
    except OSError as error:  # also a broken gzip
        raise BadData(f"{path}: cannot be read ({error}). Give line JSON, gzipped (.gz) or not.") from error


def _comparison(line: bytes, where: str) -> tuple[str, ...]:
    try:
        row: dict[str, Any] = orjson.loads(line)
        found = [row.get("worker", row.get("worker_id")), row["prompt"], row["chosen"], row["rejected"]]
    except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
        found = [error]
    if not all(isinstance(text, str) for text in found):
        raise BadData(f"{where}: not a comparison. A line holds worker, prompt, chosen and rejected as strings.")
    worker, prompt, chosen, rejected = found
    return worker, prompt, str(row.get("prompt_id") or content_id(prompt)), chosen, rejected
