"""Serving beside its references: the router beside KServe's empty transformer, heads beside one reward, batches beside offline.

    python -m benchmarks.serving [--bundle demo-policy/bundle] [--only router] [--seconds 10] [--rounds 3]

Router (needs redis-server): both stand before the same trivial predictor, on KServe's own server; the load comes from another
process over keep-alive connections. A fifth of the requests names a worker who was not asked for before, out of Redis; the
rest are a hundred workers. Saturation is the throughput of 16 connections that ask again as soon as they are answered. p99 is
at half of the empty transformer's saturation for both, arrivals at random, from the moment a request was due. The two take
turns; medians of the rounds.

Adapters: texts that are each asked about one of eight coteries, whose adapters of SmolLM2-135M share batches, beside as many by
one adapter. The adapters are drawn at random, which costs what trained ones do; the ratio is of processor seconds.

Heads and batches (need a bundle): the time of all texts with eight coteries' heads beside that with one; and texts a second
of 32 clients of the predictor beside those of one call with all the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coterie.contracts import write_text

ROOT = Path(__file__).parents[1]
MODEL, KEY = "coterie", "a key of this benchmark"
HOT, COLD, COTERIES = 100, 50_000, 4
PARTS = ("router", "adapters", "heads", "batches")
_PATH = f"/v1/models/{MODEL}:predict"


# ------------------------------------------------------------------------------------------------------------ processes
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server as a process, silent."""
    told = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"} | environ
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=ROOT, env=told, stdout=quiet, stderr=quiet)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int, seconds: float = 180) -> None:
    """Return when the model's readiness probe is answered with 200."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready", timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("a server did not start; run its command by hand to see why") from None
            time.sleep(0.2)


def reference(kind: str, arguments: list[str]) -> None:
    """Run KServe's empty transformer, or the trivial predictor (in a process of its own)."""
    sys.argv = ["reference", *arguments]  # KServe reads it at import
    from kserve import Model, ModelServer
    from kserve.model_server import app

    from coterie.contracts import Manifest
    from coterie.ingest.pseudonyms import fingerprint

    prediction = {
        "scores": [1.0, -1.0], "best": 0, "coterie": 0, "posterior": [1 / COTERIES] * COTERIES, "source": "profile",
        "reason": None, "model_version": "0", "mixture_version": "m1",
    }  # fmt: skip

    class Trivial(Model):  # type: ignore[misc]
        async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            return {"predictions": [prediction] * len(payload["instances"])}

    manifest = Manifest(
        name=MODEL, model_version="0", mixture_version="m1", created_by="benchmark", seed=0, base_models=[],
        coteries=COTERIES, rank=2, features=1, style_names=[], verdict="coteries", ships="coteries",
        key_fingerprint=fingerprint(KEY.encode()), gates=[], metrics={}, files={},
    )  # fmt: skip
    app.add_api_route(f"/v2/models/{MODEL}/manifest", lambda: manifest.model_dump(mode="json"))
    model = Trivial(MODEL) if kind == "predictor" else Model(MODEL)
    model.ready = True
    ModelServer(enable_grpc=False, workers=1).start([model])


# ----------------------------------------------------------------------------------------------------------------- load
async def _ask(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], worker: str) -> None:
    """One request over a connection that stays. Raises RuntimeError: not answered with 200."""
    instance = {
        "worker_id": worker,
        "prompt": "Shall I take the earlier train?",
        "responses": ["Yes.", "No: it is full."],
    }
    body = json.dumps({"instances": [instance]}).encode()
    head = f"POST {_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = streams
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
    told = await reader.readexactly(length)
    if not answer.startswith(b"http/1.1 200"):
        raise RuntimeError(told.decode())


def _workers(seed: int) -> Iterator[str]:
    """Four of five requests ask for one of the hot workers, the fifth for one whom nobody asked for."""
    rng, cold = np.random.default_rng(seed), iter(range(HOT + seed * 5000 % COLD, HOT + COLD))
    while True:
        for fresh, hot in zip(rng.random(1000) < 0.2, rng.integers(0, HOT, 1000), strict=True):
            yield f"w{next(cold) if fresh else hot}"


async def _saturate(port: int, connections: int, seconds: float, seed: int) -> float:
    workers, done, end = _workers(seed), 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        streams = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            await _ask(streams, next(workers))
            done += 1
        streams[1].close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return done / seconds


async def _latencies(port: int, rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the moment each request was due to its answer."""
    workers, found = _workers(seed), []
    idle: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
    for _ in range(64):
        idle.put_nowait(await asyncio.open_connection("127.0.0.1", port))

    async def request(due: float) -> None:
        streams = await idle.get()
        await _ask(streams, next(workers))
        found.append(time.perf_counter() - due)
        idle.put_nowait(streams)

    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
    tasks, due = [], time.perf_counter()
    for gap in gaps:
        due += gap
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(request(due)))
    await asyncio.gather(*tasks)
    return found


def load(port: int, seconds: float, seed: int, rate: float | None) -> float:
    """In a process of its own: requests a second at saturation; with `rate`, milliseconds of the 99th percentile."""
    command = [sys.executable, "-m", "benchmarks.serving", "--load", json.dumps([port, seconds, seed, rate])]
    told = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return float(subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True).stdout)


def _load(port: int, seconds: float, seed: int, rate: float | None) -> float:
    if rate is None:
        return asyncio.run(_saturate(port, 16, seconds, seed))
    return float(1000 * np.percentile(asyncio.run(_latencies(port, rate, seconds, seed)), 99))


# --------------------------------------------------------------------------------------------------------------- router
def publish_workers(folder: Path) -> None:
    """Profiles of HOT + COLD workers, into the Redis that COTERIE_REDIS names."""
    from coterie.config import PublishSettings
    from coterie.contracts import ASSIGNMENT
    from coterie.ingest.pseudonyms import pseudonym
    from feature_repo.publish import publish

    n = HOT + COLD
    posterior = np.random.default_rng(0).dirichlet([0.3] * COTERIES, n).astype(np.float32)
    columns = {
        "worker_id": [pseudonym(KEY.encode(), f"w{i}") for i in range(n)], "embedding": np.zeros((n, 2)),
        "reliability": np.ones(n), "comparisons": np.full(n, 40), "coterie": posterior.argmax(1),
        "posterior": posterior, "mixture_version": ["m1"] * n,
    }  # fmt: skip
    ASSIGNMENT.write(folder / "cluster" / "assignments.parquet", columns, embedding=2, posterior=COTERIES)
    publish(folder / "cluster", folder / "publish", PublishSettings(online_store="redis"))


def compare_routers(seconds: float, rounds: int) -> dict[str, Any]:
    """The router and KServe's empty transformer, in turns."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed (Debian: apt-get install redis-server)")
    redis, predictor, empty, router = (free_port() for _ in range(4))
    os.environ["COTERIE_REDIS"] = f"127.0.0.1:{redis}"
    python = sys.executable
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(process(program, "--port", str(redis), "--save", "", "--dir", str(folder)))
        time.sleep(0.5)
        publish_workers(folder)
        asks = ["--model_name", MODEL, "--predictor_host", f"127.0.0.1:{predictor}", "--enable_grpc", "false"]
        itself = [python, "-m", "benchmarks.serving", "--reference"]
        started = {
            predictor: process(*itself, "predictor", "--http_port", str(predictor)),
            empty: process(*itself, "transformer", "--http_port", str(empty), *asks),
            router: process(
                python, "-m", "serving.router", "--profiles", str(folder / "publish"), "--http_port", str(router),
                "--grpc_port", str(free_port()), *asks, COTERIE_PSEUDONYM_KEY=KEY,
            ),
        }  # fmt: skip
        for port, server in started.items():
            wait_until_ready(stack.enter_context(server), port)
        for port in (empty, router):
            load(port, 2, 99, None)  # warm
        throughput: dict[int, list[float]] = {empty: [], router: []}
        p99: dict[int, list[float]] = {empty: [], router: []}
        for seed in range(rounds):
            for port, found in throughput.items():
                found.append(load(port, seconds, seed, None))
            rate = statistics.median(throughput[empty]) / 2
            for port, tail in p99.items():
                tail.append(load(port, seconds, rounds + seed, rate))
        with urllib.request.urlopen(f"http://127.0.0.1:{router}/metrics") as answer:
            metrics = answer.read().decode()
    told = {
        name: {"requests_a_second": statistics.median(throughput[port]), "p99_ms": statistics.median(p99[port])}
        for name, port in (("empty_transformer", empty), ("router", router))
    }
    return told | {
        "throughput_ratio": told["router"]["requests_a_second"] / told["empty_transformer"]["requests_a_second"],
        "p99_ratio": told["router"]["p99_ms"] / told["empty_transformer"]["p99_ms"],
        "rounds": {"throughput": list(throughput.values()), "p99": list(p99.values())},
        "profiles": [
            line for line in metrics.splitlines() if line.startswith(("coterie_profiles_total", "coterie_fall"))
        ],
    }


# ------------------------------------------------------------------------------------------------------------ predictor
def texts_like(bundle: Any, number: int) -> list[tuple[str, list[str]]]:
    """Prompts with two responses each, drawn with sentences of the bundle's golden texts."""
    rng, golden = np.random.default_rng(0), bundle.golden
    words = " ".join(text for entry in golden for text in entry["responses"]).split()
    return [
        (golden[i % len(golden)]["prompt"], [" ".join(rng.choice(words, rng.integers(5, 120))) for _ in range(2)])
        for i in range(number)
    ]


def compare_heads(path: Path, rounds: int, coteries: int = 8) -> dict[str, Any]:
    """All texts by eight coteries' heads, and by one reward."""
    from coterie.bundle import Bundle
    from coterie.contracts import GLOBAL, Gate
    from coterie.scoring import Question, Scorer, load_scorer

    bundle = Bundle.load(path)
    scorer = load_scorer(bundle)
    gates = [Gate(coterie=k, serves="own", reason="benchmark") for k in range(coteries)]
    heads = {GLOBAL: bundle.heads[GLOBAL]} | {f"coterie-{k}": bundle.heads[GLOBAL] for k in range(coteries)}
    manifest = bundle.manifest.model_copy(update={"coteries": coteries, "gates": gates, "reward": "head"})
    many = Scorer(replace(bundle, manifest=manifest, heads=heads, personal=None), scorer._encoder)
    asked = texts_like(bundle, 128)
    prompts, responses = [prompt for prompt, of in asked for _ in of], [text for _, of in asked for text in of]
    questions = [Question(prompt, of, [1 / coteries] * coteries) for prompt, of in asked]

    def one() -> None:
        bundle.heads[GLOBAL].score(many.features(prompts, responses))

    times: dict[str, list[float]] = {"one": [], "heads": []}
    for _ in range(rounds + 1):
        for name, work in (("one", one), ("heads", lambda: many.score_many(questions))):
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {"texts": len(responses), "seconds": seconds, "ratio": seconds["heads"] / seconds["one"]}


def compare_adapters(rounds: int, coteries: int = 8, texts: int = 96) -> dict[str, Any]:
    """Each text by one of eight coteries' adapters, and each by the same one."""
    import torch
    from peft import LoraConfig, get_peft_model

    from coterie.backbones import SMOLLM2
    from coterie.config import RewardSettings
    from coterie.contracts import ADAPTER_FILE
    from coterie.rewards.adapters import AdapterRewards
    from coterie.rewards.backbone import load_model, load_tokenizer
    from coterie.simulation.topics import TOPICS

    settings = RewardSettings()
    lora = LoraConfig(task_type="SEQ_CLS", r=settings.lora_rank, target_modules="all-linear", modules_to_save=["score"])
    tokenizer = load_tokenizer(SMOLLM2, "main")
    with tempfile.TemporaryDirectory() as folder:
        folders = {f"coterie-{k}": Path(folder) / f"coterie-{k}" for k in range(coteries)}
        for k, out in enumerate(folders.values()):
            torch.manual_seed(k)
            model, revision = load_model(SMOLLM2, "main", "float32", tokenizer.pad_token_id)
            model = get_peft_model(model, lora)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(std=0.01)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            told = {"backbone": SMOLLM2, "revision": revision, "max_tokens": 256, "center": 0.0, "scale": 1.0}
            (out / ADAPTER_FILE).write_text(json.dumps(told))
        many = AdapterRewards.load(folders, "cpu")
    rng = np.random.default_rng(0)
    prompts = [f"How do I {TOPICS[i % len(TOPICS)].task}?" for i in range(texts)]
    steps = [step for topic in TOPICS for step in topic.steps]
    responses = [". ".join(rng.choice(steps, rng.integers(2, 12))) for _ in range(texts)]
    wanted = {name: np.arange(texts) % coteries == k for k, name in enumerate(folders)}
    one = {"coterie-0": np.ones(texts, dtype=bool)}
    times: dict[str, list[float]] = {"one": [], "mixed": []}
    for _ in range(rounds + 1):
        for name, asked in (("one", one), ("mixed", wanted)):
            started = time.process_time()
            many.states(prompts, responses, asked)
            times[name].append(time.process_time() - started)
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {"texts": texts, "processor_seconds": seconds, "ratio": seconds["mixed"] / seconds["one"]}


def compare_batches(path: Path, rounds: int, clients: int = 32) -> dict[str, Any]:
    """Texts a second of many clients of the predictor, and of one call with all the texts; each may use every core."""
    from coterie.bundle import Bundle
    from coterie.scoring import Question, load_scorer

    bundle = Bundle.load(path)
    asked = texts_like(bundle, clients * 8)
    number, port, threads = 2 * len(asked), free_port(), str(os.cpu_count())
    command = [sys.executable, "-m", "serving.predictor", "--bundle", str(path.resolve()), "--model_name", MODEL]
    command += ["--http_port", str(port), "--grpc_port", str(free_port())]
    scorer = load_scorer(bundle)
    questions = [Question(prompt, responses, everything=False) for prompt, responses in asked]
    bodies = [json.dumps({"instances": [{"prompt": p, "responses": r}]}).encode() for p, r in asked]
    rates: dict[str, list[float]] = {"offline": [], "served": []}
    with process(*command, OMP_NUM_THREADS=threads) as server:
        wait_until_ready(server, port, 600)
        for _ in range(rounds + 1):
            started = time.perf_counter()
            scorer.score_many(questions)
            rates["offline"].append(number / (time.perf_counter() - started))
            told = json.dumps({"port": port, "clients": clients, "bodies": [body.decode() for body in bodies]})
            client = [sys.executable, "-m", "benchmarks.serving", "--clients"]
            done = subprocess.run(client, cwd=ROOT, input=told, capture_output=True, text=True, check=True)
            rates["served"].append(number / float(done.stdout))
    found = {name: statistics.median(of[1:]) for name, of in rates.items()}
    return {"reward": bundle.manifest.reward, "texts_a_second": found, "ratio": found["served"] / found["offline"]}


def _clients(port: int, clients: int, bodies: list[str]) -> float:
    """Seconds that `clients` need for all the bodies."""
    import httpx

    async def run() -> float:
        left = iter(bodies)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:

            async def one() -> None:
                for body in left:
                    headers = {"content-type": "application/json"}
                    (await client.post(_PATH, content=body, headers=headers)).raise_for_status()

            started = time.perf_counter()
            await asyncio.gather(*(one() for _ in range(clients)))
            return time.perf_counter() - started

    return asyncio.run(run())


def main() -> None:
    """Run what there is data for, and write the figures."""
    if sys.argv[1:2] == ["--reference"]:
        return reference(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--load"]:
        return print(_load(*json.loads(sys.argv[2])))
    if sys.argv[1:2] == ["--clients"]:
        return print(_clients(**json.load(sys.stdin)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of which heads and batches are measured")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="results of the others are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving.json")
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    compare: dict[str, Callable[[], dict[str, Any]]] = {
        "router": lambda: compare_routers(given.seconds, given.rounds),
        "adapters": lambda: compare_adapters(given.rounds),
    }
    if given.bundle is not None:
        compare["heads"] = lambda: compare_heads(given.bundle, given.rounds)
        compare["batches"] = lambda: compare_batches(given.bundle, given.rounds)
    for part in (part for part in given.only if part in compare):
        results[part] = compare[part]()
        print(json.dumps({part: results[part]}, indent=1), flush=True)
        write_text(given.out, json.dumps(results, indent=1) + "\n")  # a later part may fail
    return None


if __name__ == "__main__":
    main()
