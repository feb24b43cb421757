"""Simulated workers for the tests and the benchmark of discovery: the settings of docs/method, section 8."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.contracts import COMPARISON, VECTOR, content_id
from coterie.discovery.votes import Votes

SHARES = {2: (0.6, 0.4), 4: (0.4, 0.3, 0.2, 0.1)}


@dataclass(frozen=True)
class Simulated:
    """Votes, the held-out votes of the same workers, and who they are."""

    train: Votes
    test: Votes
    group: np.ndarray  # [workers]; -1 where tastes are continuous
    careless: np.ndarray  # [workers] bool


def tastes_at_cosine(groups: int, features: int, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors [groups, features] at one cosine to each other, in random directions."""
    frame = np.linalg.qr(rng.standard_normal((features, groups + 1)))[0].T
    return np.sqrt(cosine) * frame[0] + np.sqrt(1 - cosine) * frame[1:]


def simulate(
    setting: str = "groups",
    workers: int = 400,
    comparisons: int = 100,
    features: int = 32,
    groups: int = 4,
    careless: float = 0.0,
    seed: int = 0,
    held_out: int = 50,
    prompts: int | None = None,
) -> Simulated:
    """Standard `groups`, `continuous` (rank-3 tastes) or `null` (one taste), where the truth is right in 76 %."""
    rng = np.random.default_rng(seed)
    group = np.full(workers, -1)
    if setting == "groups":
        group = rng.choice(groups, workers, p=SHARES[groups])
        tastes = tastes_at_cosine(groups, features, 0.7, rng)[group]
    elif setting == "continuous":
        frame = np.linalg.qr(rng.standard_normal((features, 4)))[0].T
        tastes = frame[0] + rng.standard_normal((workers, 3)) @ frame[1:] * 0.4
    else:
        group = np.zeros(workers, int)
        tastes = np.tile(np.linalg.qr(rng.standard_normal((features, 1)))[0].T, (workers, 1))
    # E max(p, 1 - p) = .76 for logits N(0, 1.99^2 |taste|^2).
    tastes = tastes * (1.99 / np.sqrt((tastes**2).sum(axis=1).mean()))
    lazy = rng.random(workers) < careless
    tastes = np.where(lazy[:, None], 0.1 * tastes, tastes)
    n = comparisons + held_out
    worker = np.repeat(np.arange(workers, dtype=np.int32), n)
    x = rng.standard_normal((len(worker), features), dtype=np.float32)
    logits = np.concatenate([x[i * n : (i + 1) * n] @ tastes[i].astype(np.float32) for i in range(workers)])
    x[rng.random(len(worker)) > 1 / (1 + np.exp(-logits))] *= -1  # every row is oriented chosen over rejected
    prompt = (np.arange(len(worker)) if prompts is None else rng.integers(0, prompts, len(worker))).astype(np.int32)
    test = np.tile(np.arange(n) >= comparisons, workers)
    votes = Votes.of(x, np.ones(len(worker), np.float32), worker, prompt, workers)
    return Simulated(votes.subset(~test), votes.subset(test) if held_out else votes, group, lazy)


def comparison_files(
    folder: Path, workers: int = 60, comparisons: int = 60, groups: int = 2, prompts: int = 40, seed: int = 0
) -> tuple[Path, Path, dict[str, int]]:
    """comparisons.parquet and vectors.parquet of simulated workers, and each worker's group.

    A response's vector is 5 numbers, its style 2; the worker's group decides which style feature is liked. A tenth of
    the prompts is validation, a fifth test. The last worker has no training comparison.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((prompts, 4, 5)).astype(np.float32)
    style = rng.standard_normal((prompts, 4, 2)).astype(np.float32)
    split = np.array(["train"] * prompts, dtype=object)
    split[: prompts // 5], split[prompts // 5 : prompts * 3 // 10] = "test", "validation"
    group = rng.integers(0, groups, workers)
    rows: dict[str, list] = {field.name: [] for field in COMPARISON.fields}
    for _ in range(comparisons):  # workers in turn: the file is not in worker order
        for worker in range(workers):
            prompt = rng.integers(0, prompts // 5 if worker == workers - 1 else prompts)
            one, other = rng.choice(4, 2, replace=False)
            x = style[prompt, one] - style[prompt, other]
            if rng.random() > 1 / (1 + np.exp(-2.5 * (x[0] if group[worker] == 0 else x[1]))):
                one, other = other, one
            ids = [content_id(f"prompt {prompt}", f"response {r}") for r in (one, other)]
            row = {
                "comparison_id": f"c{len(rows['label'])}",
                "worker_id": f"w{(worker * 7) % workers:03d}",
                "prompt": f"prompt {prompt}",
                "prompt_id": f"p{prompt}",
                "chosen": f"response {one}",
                "rejected": f"response {other}",
                "chosen_id": ids[0],
                "rejected_id": ids[1],
                "pair_id": "".join(sorted(ids)),
                "label": 1.0,
                "split": split[prompt],
                "source": "simulated",
            }
            for name, column in rows.items():
                column.append(row.get(name))
    COMPARISON.write(folder / "comparisons.parquet", rows)
    ids = [content_id(f"prompt {p}", f"response {r}") for p in range(prompts) for r in range(4)]
    columns = {"response_id": ids, "vector": vectors.reshape(-1, 5), "style": style.reshape(-1, 2)}
    metadata = {"encoder": "test", "revision": "0", "style_names": json.dumps(["length", "lists"])}
    VECTOR.write(folder / "vectors.parquet", columns, metadata, vector=5, style=2)
    people = {f"w{(worker * 7) % workers:03d}": int(group[worker]) for worker in range(workers)}
    return folder / "comparisons.parquet", folder / "vectors.parquet", people
