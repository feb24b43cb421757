"""Embed and cluster on many comparisons: time and peak memory, which must not grow with the comparisons.

    python -m benchmarks.scale [--comparisons 1000000 10000000] [--sparse 10000000] [--out benchmarks/results/scale.json]

A tenth of the comparisons (--sparse) with the same workers and responses tells what memory is theirs, and what the comparisons'.

Simulated: a hundred comparisons a worker, four groups of 40/30/20/10 % at cosine .7 whose own taste is right in 76 % of
their comparisons (docs/method, section 8), a prompt with four responses for every twenty comparisons. The stages read
Parquet and write Parquet as in a run, each in a process of its own; peak memory is the kernel's count (Linux). `cluster` chooses the number
of coteries and tests, as it does by default. The comparisons lie in random order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.metrics import adjusted_rand_score

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import ASSIGNMENT, COMPARISON, SPLITS, VECTOR, table_of
from coterie.discovery import cluster, embed

COMPARISONS, RESPONSES, EACH = 100, 4, 20  # of a worker; of a prompt; comparisons for each prompt
DIMENSION, GROUPS = 64, (0.4, 0.3, 0.2, 0.1)
_BATCH = 250_000
_STYLE = ["length", "lists"]


def write(folder: Path, comparisons: int, full: int) -> None:
    """comparisons.parquet and vectors.parquet of as many workers and prompts as `full` comparisons have, a batch at a time."""
    rng = np.random.default_rng(0)
    workers, prompts = full // COMPARISONS, full // EACH
    frame = np.linalg.qr(rng.standard_normal((DIMENSION, len(GROUPS) + 1)))[0].T
    tastes = 1.41 * (np.sqrt(0.7) * frame[0] + np.sqrt(0.3) * frame[1:])  # a difference of two responses has variance 2
    group = _groups(workers)
    vectors = rng.standard_normal((prompts * RESPONSES, DIMENSION), dtype=np.float32)
    values = vectors @ tastes.T.astype(np.float32)
    metadata = {"encoder": "simulated", "revision": "0", "style_names": json.dumps(_STYLE)}
    with VECTOR.writer(folder / "vectors.parquet", metadata, vector=DIMENSION, style=len(_STYLE)) as writer:
        for start in range(0, len(vectors), _BATCH):
            part = vectors[start : start + _BATCH]
            columns = {
                "response_id": _ids("r", np.arange(start, start + len(part))),
                "vector": part,
                "style": part[:, :2],
            }
            writer.write_table(table_of(columns, VECTOR.schema(metadata, vector=DIMENSION, style=len(_STYLE))))
    del vectors
    split = np.array([0] * 13 + [1] * 3 + [2] * 4, np.int32)
    with COMPARISON.writer(folder / "comparisons.parquet") as writer:
        for start in range(0, comparisons, _BATCH):
            n = min(_BATCH, comparisons - start)
            worker, prompt = rng.integers(0, workers, n), rng.integers(0, prompts, n)
            one = rng.integers(0, RESPONSES, n)
            other = (one + rng.integers(1, RESPONSES, n)) % RESPONSES
            first, second = prompt * RESPONSES + one, prompt * RESPONSES + other
            margin = values[first, group[worker]] - values[second, group[worker]]
            chosen = rng.random(n) < 1 / (1 + np.exp(-margin))
            first, second = np.where(chosen, first, second), np.where(chosen, second, first)
            nothing = pa.nulls(n, pa.string())
            columns = {
                "comparison_id": _ids("c", np.arange(start, start + n)),
                "worker_id": _ids("w", worker),
                "prompt": _ids("prompt ", prompt),
                "prompt_id": _ids("p", prompt),
                "chosen": _ids("response ", first),
                "rejected": _ids("response ", second),
                "chosen_id": _ids("r", first),
                "rejected_id": _ids("r", second),
                "pair_id": _ids("q", np.minimum(first, second) * (prompts * RESPONSES) + np.maximum(first, second)),
                "label": np.ones(n, np.float32),
                "ranking_id": nothing,
                "shown_first": nothing,
                "split": pa.DictionaryArray.from_arrays(pa.array(split[prompt % 20]), pa.array(SPLITS)),
                "confidence": pa.nulls(n, pa.float32()),
                "source": pa.array(["simulated"] * n),
                "created_at": pa.nulls(n, pa.timestamp("us", tz="UTC")),
            }
            writer.write_table(table_of(columns, COMPARISON.schema()))


def _groups(workers: int) -> np.ndarray:
    return np.random.default_rng(1).choice(len(GROUPS), workers, p=GROUPS)


def _ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pa.array([f"{prefix}{number:012d}" for number in numbers.tolist()])


def stage(name: str, folder: Path) -> dict[str, Any]:
    """One stage, in this process."""
    started, out = time.perf_counter(), folder / name
    out.mkdir()
    if name == "embed":
        settings = EmbedSettings(components=DIMENSION)
        figures = embed(folder / "comparisons.parquet", folder / "vectors.parquet", out, settings)
        found = {"rank": figures["rank"]}
    else:
        figures = cluster(folder / "embed", out, ClusterSettings())
        table = ASSIGNMENT.read(out / "assignments.parquet", ["worker_id", "coterie"])
        worker = [int(name[1:]) for name in table["worker_id"].to_pylist()]
        truth = _groups(max(worker) + 1)[worker]
        found = {
            "verdict": figures["selection"]["verdict"],
            "coteries": figures["selection"]["coteries"],
            "ari": float(adjusted_rand_score(truth, table["coterie"].to_numpy())),
            "p_value": figures["heterogeneity"]["p_value"],
        }
    return {"seconds": time.perf_counter() - started, "peak_memory": peak_memory(), **found}


def peak_memory() -> int:
    """Bytes that this program had resident at most. Not getrusage's: that counts the process which started it as well, and so
    the writing of the data."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument(
        "--sparse", type=int, nargs="*", default=[10_000_000], help="comparisons of which a tenth is there"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    parser.add_argument("--folder", type=Path, help="where the data lie meanwhile: 10 million comparisons take 8 GB")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["machine"] = {"cores": os.cpu_count(), "processor": platform.machine()}
    whole = [(str(full), full, full) for full in options.comparisons]
    sparse = [(f"a tenth of {full}", full // 10, full) for full in options.sparse]
    for shape, comparisons, full in whole + sparse:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(Path(folder), comparisons, full)
            measured: dict[str, Any] = {"workers": full // COMPARISONS, "responses": full // EACH * RESPONSES}
            measured["load_average"] = os.getloadavg()[0]
            for name in ("embed", "cluster"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    measured[name] = pool.apply(stage, (name, Path(folder)))
                print(f"{shape} {name}: {measured[name]}", flush=True)
        results[shape] = measured
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
