"""How fast ingest reads line JSON, and how much memory it takes, beside programs that only parse and write.

    python benchmarks/ingest.py                          the two kinds of rows, best of three
    python benchmarks/ingest.py --kinds short --rows 10000000 --programs coterie --repeats 1

Two kinds of rows, made up from a vocabulary of 20,000 made-up words: `tldr`, 2 kB each in the schema of
summarize_from_feedback, no two with the same title and text, and `short`, 200 bytes each, of which three of four share
their prompt with the row before. Every measurement is a process of its own; "rows a second" is per second of processor time (user and system), so it is per
core, without the imports; peak memory is the whole process's.

References, in the same run: orjson (parses each line and drops it), pyarrow (pyarrow.json and a Parquet file, on one
thread) and pandas (read_json and a Parquet file). None of them checks a row, makes an id or a split.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

RESULTS = Path(__file__).parent / "results" / "ingest.json"
FIGURES = {"tldr": 40_000, "short": 150_000}  # rows a second and core that we want to reach
DEFAULT_ROWS = {"tldr": 100_000, "short": 500_000}
PROGRAMS = ("coterie", "orjson", "pyarrow", "pandas")


def make(kind: str, rows: int, path: Path) -> None:
    """Write `rows` rows of made-up preferences."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, 20_000)])
    weights = 1 / np.arange(1, len(words) + 1)
    stream = rng.choice(words, 1_000_000, p=weights / weights.sum())

    def text(size: int, unique: int) -> str:
        start = int(rng.integers(len(stream) - size))
        return " ".join(stream[start : start + size]) + f" {unique}"

    prompt_words, response_words = (205, 30) if kind == "tldr" else (6, 10)
    prompt = ""
    with path.open("wb") as file:
        for row in range(rows):
            if row % 4 == 0:
                prompt = text(prompt_words, row)
            first, second = text(response_words, row), text(response_words, -row)
            worker = f"worker{int(rng.integers(max(10, rows // 100)))}"
            record: dict[str, object] = {"worker": worker, "prompt": prompt, "chosen": first, "rejected": second}
            if kind == "tldr":
                summaries = [{"text": t, "policy": "sup4_ppo_rm4", "note": "ok"} for t in (first, second)]
                info = {"id": f"t3_{row // 4}", "post": prompt, "title": first, "subreddit": "relationships"}
                choice = row % 2
                record = {"info": info, "split": "train", "summaries": summaries, "choice": choice}
                record |= {"worker": worker, "batch": "batch3", "extra": {"confidence": 2 + 5 * choice}}
            file.write(orjson.dumps(record) + b"\n")


def measure(program: str, source: Path, out: Path) -> dict[str, float]:
    """Run one program in this process and say what it took."""
    work = {"coterie": _coterie, "orjson": _orjson, "pyarrow": _pyarrow, "pandas": _pandas}[program]
    step = work(source, out)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _coterie(source: Path, out: Path):
    from coterie.config import IngestSettings
    from coterie.ingest.run import ingest

    return lambda: ingest(IngestSettings(source=[str(source)]), out, b"a key for the benchmark only")


def _orjson(source: Path, out: Path):
    def step() -> None:
        with source.open("rb") as file:
            for line in file:
                orjson.loads(line)

    return step


def _pyarrow(source: Path, out: Path):
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    options = pyarrow.json.ReadOptions(use_threads=False)
    return lambda: pq.write_table(
        pyarrow.json.read_json(source, options), out / "reference.parquet", compression="zstd"
    )


def _pandas(source: Path, out: Path):
    import pandas as pd

    return lambda: pd.read_json(source, lines=True).to_parquet(out / "reference.parquet", compression="zstd")


def best(program: str, source: Path, repeats: int) -> dict[str, float]:
    """The fastest of several runs, each a process of its own."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=source.parent) as out:
            command = [sys.executable, __file__, "--measure", program, str(source), out]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout))
    return min(runs, key=lambda run: run["cpu_seconds"])


def main() -> None:
    """Measure and write benchmarks/results/ingest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=tuple(FIGURES), default=tuple(FIGURES))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--rows", type=int, help="rows of each file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        program, source, out = arguments.measure
        print(json.dumps(measure(program, Path(source), Path(out))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in arguments.kinds:
        rows = arguments.rows or DEFAULT_ROWS[kind]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{kind}.jsonl"
            make(kind, rows, source)
            measured = {"rows": rows, "bytes_a_row": source.stat().st_size / rows, "wanted": FIGURES[kind]}
            measured["load_average_before"] = os.getloadavg()[0]  # others at work make every program slower
            for program in arguments.programs:
                run = best(program, source, arguments.repeats)
                measured[program] = {"rows_a_second_and_core": rows / run["cpu_seconds"], **run}
                print(
                    f"{kind:6}{rows:>12,} rows  {program:8}{rows / run['cpu_seconds']:>10,.0f} rows/s a core "
                    f"{run['peak_memory'] / 1e6:>8,.0f} MB",
                    flush=True,
                )
        results[f"{kind}, {rows:,} rows"] = measured
    results["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
