"""Feedback: comparisons acknowledged a second, beside what the disk alone can do, and the time until profiles are online.

python -m benchmarks.feedback [--seconds 10] [--postgres URL]

The server runs on one core, the clients on another. Every request holds 20 comparisons of its own, committed and synced before
it is answered; "singly" sends one a request. Beside it, on the same core: KServe's empty transformer, whose predictor is with
the clients on the other core; and a bare handler that reads the body and stores nothing. The lag is that of single votes at a
quiet rate, from the commit to a profile in Feast's SQLite store, with a real bundle's mixture.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.serving import MODEL, free_port, process, wait_until_ready
from coterie.contracts import write_text

RESULTS = Path(__file__).parent / "results" / "feedback.json"
_PORT = 18_233
_CLIENTS = 32
_MANY = 20  # comparisons of a request
_QUIET = 5.0  # votes a second whose lag is measured


def serve(url: str, folder: Path) -> None:
    """The feedback endpoint alone, and /empty, which answers and does nothing; in a process of its own."""
    import uvicorn

    from coterie.bundle import Bundle
    from coterie.config import FeedbackSettings
    from coterie.feedback.posteriors import Posteriors
    from coterie.feedback.relay import LAG, Published
    from coterie.scoring import Scorer
    from feature_repo.store import lookup, open_store
    from serving.feedback import Feedback, push_to, routes
    from tests.staged import TextEncoder

    store = open_store(folder / "publish")
    lookup(store, ["nobody"])  # connects
    feedback = Feedback(FeedbackSettings(database=url, daily_cap=10**6))
    feedback.follow(
        b"a key of the benchmark",
        Published(folder / "publish" / "profiles.parquet"),
        Posteriors(Scorer(Bundle.load(folder / "bundle"), TextEncoder())),
        push_to(store),
    )
    app = FastAPI()
    app.include_router(routes(feedback))

    @app.post("/empty")
    async def empty(request: Request) -> Response:
        orjson.loads(await request.body())
        return Response(b"{}", media_type="application/json")

    @app.get("/lag")
    def lag() -> dict[str, Any]:
        [metric] = LAG.collect()
        buckets = {s.labels["le"]: s.value for s in metric.samples if s.name.endswith("_bucket")}
        return {"buckets": buckets, "sum": next(s.value for s in metric.samples if s.name.endswith("_sum"))}

    uvicorn.run(app, host="127.0.0.1", port=_PORT, log_level="error", access_log=False)


def load(path: str, many: int, seconds: float, tag: str, port: int = _PORT) -> dict[str, float]:
    """Send from several connections for so long; comparisons answered a second, and milliseconds a request."""
    latencies: list[float] = []
    turn, until = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        own, n = [], 0
        link = HTTPConnection("127.0.0.1", port, timeout=60)  # httpx would take more time than the server
        while time.monotonic() < until:
            votes = [vote(f"{tag} {number} {n} {i}", f"worker {(number * 7 + n + i) % 500}") for i in range(many)]
            body = orjson.dumps({"comparisons" if port == _PORT else "instances": votes})
            started = time.monotonic()
            link.request("POST", path, body, {"content-type": "application/json"})
            answer = link.getresponse()
            if answer.status != 200:
                raise RuntimeError(answer.read())
            answer.read()
            own.append(time.monotonic() - started)
            n += 1
        link.close()
        with turn:
            latencies.extend(own)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ms = 1000 * np.quantile(latencies, [0.5, 0.99])
    return {"a_second": len(latencies) * many / seconds, "p50_ms": float(ms[0]), "p99_ms": float(ms[1])}


def vote(text: str, worker: str) -> dict[str, str]:
    """A comparison of two answers of about forty words."""
    return {"worker_id": worker, "prompt": f"Question {text}?", "chosen": "a good answer " * 12, "rejected": "no " * 40}


def fsyncs(folder: Path, seconds: float = 2.0) -> float:
    """How often a second this disk syncs a page that was appended to a file."""
    count, until = 0, time.monotonic() + seconds
    with (folder / "probe").open("wb", buffering=0) as file:
        while time.monotonic() < until:
            file.write(b"\0" * 4096)
            os.fdatasync(file.fileno())
            count += 1
    return count / seconds


def lag(seconds: float) -> dict[str, float]:
    """Seconds within which 95 % of the workers' profiles are online, an upper bound of the histogram; and the mean."""
    with httpx.Client(base_url=f"http://127.0.0.1:{_PORT}", timeout=60) as http:
        before = http.get("/lag").json()
        for n in range(int(seconds * _QUIET)):
            http.post("/v1/feedback", json=vote(f"quiet {n}", f"quiet {n % 50}")).raise_for_status()
            time.sleep(1 / _QUIET)
        time.sleep(2)
        after = http.get("/lag").json()
    counts = {le: after["buckets"][le] - before["buckets"][le] for le in after["buckets"]}
    total = counts["+Inf"]
    within = next(float(le) for le, count in counts.items() if count >= 0.95 * total)
    return {"votes": total, "p95_below": within, "mean": (after["sum"] - before["sum"]) / total}


def empty_transformer(seconds: float) -> dict[str, float]:
    """KServe's own transformer that adds nothing, on the server's core; its predictor is on the clients'."""
    cores, (port, predictor) = sorted(os.sched_getaffinity(0)), (free_port(), free_port())
    command = [sys.executable, "-m", "benchmarks.serving", "--reference"]
    asks = ["--model_name", MODEL, "--predictor_host", f"127.0.0.1:{predictor}", "--enable_grpc", "false"]
    with (
        process(*command, "predictor", "--http_port", str(predictor)) as behind,
        process(*command, "transformer", "--http_port", str(port), *asks) as server,
    ):
        for one, of, core in ((behind, predictor, cores[-1]), (server, port, cores[0])):
            wait_until_ready(one, of)
            for task in Path(f"/proc/{one.pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), [core])
        return load(f"/v1/models/{MODEL}:predict", 1, seconds, "", port)


def measure(url: str, folder: Path, seconds: float) -> dict[str, Any]:
    """All figures of one database."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "benchmarks.feedback", "--serve", "--postgres", url, "--folder", str(folder)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environ, preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]))
    try:
        until = time.monotonic() + 180
        while True:
            try:
                httpx.post(f"http://127.0.0.1:{_PORT}/empty", json={}).raise_for_status()
                break
            except httpx.TransportError:
                if time.monotonic() > until or server.poll() is not None:
                    raise
                time.sleep(0.2)
        tag = str(time.time_ns())
        return {
            "lag": lag(seconds),
            "bare handler, singly": load("/empty", 1, seconds, tag),
            "singly": load("/v1/feedback", 1, seconds, f"{tag} one"),
            "bare handler, twenty": load("/empty", _MANY, seconds, tag),
            "twenty": load("/v1/feedback", _MANY, seconds, f"{tag} many"),
        }
    finally:
        server.kill()
        server.wait()


@click.command()
@click.option("--seconds", default=10.0, show_default=True, help="of each measurement")
@click.option("--postgres", help="URL of an empty PostgreSQL database, to measure as well")
@click.option("--serve", "as_server", is_flag=True, hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(seconds: float, postgres: str | None, as_server: bool, folder: Path | None) -> None:
    """Measure, print and keep."""
    if as_server:
        assert postgres is not None
        assert folder is not None
        sys.argv = sys.argv[:1]  # kserve reads the command line when it is imported
        serve(postgres, folder)
        return
    from coterie.config import PublishSettings
    from feature_repo.publish import publish
    from tests.staged import everything

    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".feedback-") as name:
        root = Path(name)
        made = everything(root)
        publish(made.cluster, root / "publish", PublishSettings())
        results: dict[str, Any] = {
            "machine": {
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "fdatasync_a_second": fsyncs(root),
            },
            "empty transformer, singly": empty_transformer(seconds),
            "sqlite": measure(f"sqlite:///{root / 'feedback.db'}", root, seconds),
        }
        if postgres:
            results["postgresql"] = measure(postgres, root, seconds)
        for database in results.keys() & {"sqlite", "postgresql"}:
            alone, reference = (
                of["a_second"] for of in (results[database]["singly"], results["empty transformer, singly"])
            )
            results[database]["singly_ratio"] = alone / reference
    print(json.dumps(results, indent=1))
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
