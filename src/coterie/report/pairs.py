"""Real pairs of responses that tell the coteries apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import expit

from coterie.contracts import COMPARISON, DIFFERENCE, TEST, iterate, matrix
from coterie.discovery.newcomers import next_pair
from coterie.rewards import RewardHead

Array = NDArray[Any]

_PAIRS = 6  # of those that divide a coterie from the others most, on the whole page; one a coterie at least
_EXCERPT = 450  # characters of a text that the page shows


@dataclass(frozen=True)
class Pair:
    """A prompt, two responses A and B, and how probably a member of each coterie prefers A [K]."""

    prompt: str
    a: str
    b: str
    prefers_a: list[float]


@dataclass(frozen=True)
class TellingPairs:
    """Test pairs that say most about who wants what.

    Attributes:
        divisive: for each coterie the pairs on which it and the mean of the others differ most; it leans to A. No prompt
            stands there twice, so that the pairs say different things.
        question: the pair to ask a new worker first, whose answer says most about their coterie.
    """

    divisive: list[list[Pair]]
    question: Pair | None


def telling_pairs(stages: Mapping[str, Path], shares: Array) -> TellingPairs:
    """Choose among the test pairs by the coteries' own rewards.

    Args:
        stages: folders by stage: ingest, embed, and the rewards by name.
        shares: of the workers in each coterie [K], K > 1.
    """
    heads = [RewardHead.load(stages[f"coterie-{k}"]) for k in range(len(shares))]
    table = DIFFERENCE.read(stages["embed"] / "differences.parquet", ["comparison_id", "prompt", "split", "x"])
    table = table.filter(pc.equal(table["split"].cast(pa.string()), TEST))
    if not len(table):
        return TellingPairs([[] for _ in heads], None)
    x = matrix(table["x"])
    p = expit(np.stack([head.margin(x) for head in heads], axis=1))
    chosen = _divisive(p, table["prompt"].to_numpy())
    asked = int(next_pair(shares, np.stack([head.scale * head.weight for head in heads]), x)[0][0])

    ids = table["comparison_id"].take(pa.array([asked, *(row for rows in chosen for row in rows)])).to_pylist()
    texts = _texts(stages["ingest"] / "comparisons.parquet", ids)

    def pair(row: int, leaning: int | None = None) -> Pair:
        text, prefers = texts[table["comparison_id"][row].as_py()], p[row]
        prompt, a, b = (excerpt(text[name]) for name in ("prompt", "chosen", "rejected"))
        if leaning is not None and _lead(p[row : row + 1], leaning)[0] < 0:
            a, b, prefers = b, a, 1 - prefers
        return Pair(prompt, a, b, prefers.tolist())

    return TellingPairs([[pair(row, k) for row in rows] for k, rows in enumerate(chosen)], pair(asked))


def _lead(p: Array, k: int) -> Array:
    """How much more probably coterie k prefers A than the others do, [n], of probabilities [n, K]."""
    lead: Array = p[:, k] - np.delete(p, k, axis=1).mean(axis=1)
    return lead


def _divisive(p: Array, prompt: Array) -> list[list[int]]:
    """Rows of the most divisive pairs of each coterie, by probabilities [n, K] and prompts [n]."""
    used: set[int] = set()
    chosen: list[list[int]] = [[] for _ in range(p.shape[1])]
    orders = [np.argsort(-np.abs(_lead(p, k)), kind="stable") for k in range(p.shape[1])]
    for _ in range(max(_PAIRS // len(chosen), 1)):  # a pair for everybody, then a second one
        for rows, order in zip(chosen, orders, strict=True):
            row = next((int(row) for row in order if prompt[row] not in used), None)
            if row is not None:
                used.add(prompt[row])
                rows.append(row)
    return chosen


def _texts(comparisons: Path, ids: list[str]) -> dict[str, dict[str, str]]:
    """Prompt and responses of some comparisons, read a batch at a time."""
    columns = ["comparison_id", "prompt", "chosen", "rejected"]
    wanted, found = pa.array(ids, pa.string()), {}
    for batch in iterate(COMPARISON.open(comparisons), columns):
        for row in batch.filter(pc.is_in(batch["comparison_id"], wanted)).to_pylist():
            found[row["comparison_id"]] = row
    return found


def excerpt(text: str) -> str:
    """The beginning of a text, as much of it as a page shows."""
    text = text.strip()
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rsplit(None, 1)[0] + " …"
