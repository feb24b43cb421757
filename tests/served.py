"""A small bundle with the profiles of its workers, and a server process over them, for the tests of serving.

Run as a program, this file serves a bundle that was made with the encoder defined here.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from coterie import contracts
from coterie.bundle import build_bundle
from coterie.config import (
    BundleSettings,
    EmbedSettings,
    EncodeSettings,
    FeedbackSettings,
    PublishSettings,
    ServeSettings,
)
from coterie.contracts import content_id
from coterie.discovery.features import fit_features
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.encoding import encode
from coterie.ingest.pseudonyms import fingerprint, pseudonym
from coterie.rewards import RewardHead

ROOT = Path(__file__).parents[1]
KEY = "a key that only this test knows"
WORKERS = ["ann", "bob", "émile 🙂"]
POSTERIORS = np.float32([[0.97, 0.02, 0.01], [0.1, 0.6, 0.3], [0.02, 0.01, 0.97]])


class HashingEncoder:
    """Bags of hashed words: an encoder that loads in no time and needs no weights."""

    name, revision, dimension, max_tokens, precision = "hashing", "1", 32, 256, "float32"

    def __init__(self):
        self._vectorizer = HashingVectorizer(n_features=self.dimension)

    def text(self, prompt, response):
        return response

    def cut(self, texts):
        return np.zeros(len(texts), dtype=bool)

    def encode(self, texts):
        return self._vectorizer.transform(texts).toarray().astype(np.float32)


# ------------------------------------------------------------------------------------------ bundle and profiles
def write_comparisons(path):
    words = ["train", "boat", "early", "late", "cheap", "slow", "warm", "cold", "maybe", "surely", "never", "walk"]
    rng = np.random.default_rng(0)
    rows = {field.name: [] for field in contracts.COMPARISON.fields}
    for i in range(120):
        prompt = f"Question {i // 2}?"
        pair = [" ".join(rng.choice(words, rng.integers(3, 12))) + end for end in rng.permutation([".", "!"])]
        ids = [content_id(prompt, text) for text in pair]
        row = {
            "comparison_id": str(i),
            "worker_id": pseudonym(KEY.encode(), WORKERS[i % 3]),
            "prompt": prompt,
            "prompt_id": content_id(prompt),
            "chosen": pair[0],
            "rejected": pair[1],
            "chosen_id": ids[0],
            "rejected_id": ids[1],
            "pair_id": content_id(*sorted(ids)),
            "label": 1.0,
            "split": contracts.SPLITS[i // 2 % 3],
            "source": "test",
        }
        for name, column in rows.items():
            column.append(row.get(name))
    contracts.COMPARISON.write(path, rows)


def make_bundle(root, version="m1", seed=1):
    """A bundle of three coteries with rewards that differ, of which the last serves the global one."""
    for name in ("ingest", "encode", "embed", "cluster", "evaluate"):
        (root / name).mkdir(parents=True)
    comparisons, vectors = root / "ingest" / "comparisons.parquet", root / "encode" / "vectors.parquet"
    write_comparisons(comparisons)
    encode(comparisons, root / "encode", EncodeSettings(), root / "cache", HashingEncoder())
    features = fit_features(comparisons, vectors, EmbedSettings(components=8))
    features.save(root / "embed" / contracts.FEATURES_FILE)
    rng = np.random.default_rng(seed)
    rewards, weights = {}, {}
    for name in ("global", "coterie-0", "coterie-1", "coterie-2"):
        rewards[name] = root / "rewards" / name
        weights[name] = rng.normal(size=len(features.names))
        RewardHead(weights[name]).save(rewards[name] / contracts.HEAD_FILE)
    mixture = MixtureReward(3)
    mixture.theta_ = np.stack([weights[f"coterie-{k}"] for k in range(3)]).astype(np.float32)
    mixture.weights_, mixture.reliability_variance_ = np.array([0.5, 0.3, 0.2]), 0.01
    mixture.save(root / "cluster" / contracts.MIXTURE_FILE, version)
    places = LowRankReward(2)
    places.theta_, places.basis_ = weights["global"], rng.normal(size=(len(features.names), 2))
    places.reliability_variance_ = 0.01
    places.save(root / "embed" / contracts.MODEL_FILE)
    gates = [{"coterie": k, "serves": "own" if k < 2 else "global", "reason": "test"} for k in range(3)]
    metrics = {
        "ingest": {"key_fingerprint": fingerprint(KEY.encode())},
        "embed": {"rank": 2},
        "cluster": {
            "mixture_version": version,
            "selection": {"coteries": 3, "verdict": "coteries"},
            "stability": {"half_split_ari": 0.5},
            "seed": 0,
        },
        "evaluate": {"gates": gates, "ships": "coteries", "heldout": {"seen": {"accuracy": 0.7, "log_loss": 0.6}}},
    }
    for name, content in metrics.items():
        (root / name / "metrics.json").write_text(json.dumps(content))
    build_bundle(
        ingested=root / "ingest",
        encoded=root / "encode",
        embedded=root / "embed",
        clustered=root / "cluster",
        rewards=rewards,
        evaluated=root / "evaluate",
        out=root / "bundle",
        settings=BundleSettings(reference=64),
    )
    return root / "bundle"


def publish_profiles(root, version="m1", folder="publish", **settings):
    """Publish a profile for each of WORKERS beside the bundle."""
    from feature_repo.publish import publish

    columns = {
        "worker_id": [pseudonym(KEY.encode(), name) for name in WORKERS],
        "embedding": np.eye(3, 2),
        "reliability": np.ones(3),
        "comparisons": [40, 40, 40],
        "coterie": POSTERIORS.argmax(1),
        "posterior": POSTERIORS,
        "mixture_version": [version] * 3,
    }
    contracts.ASSIGNMENT.write(root / "cluster" / "assignments.parquet", columns, embedding=2, posterior=3)
    publish(root / "cluster", root / folder, PublishSettings(**settings))


# ------------------------------------------------------------------------------------------------------ server
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def grpc_address(log):
    """Where the server whose log this is answers gRPC."""
    return re.search(r"gRPC on (\S+)", log.read_text())[1]


@contextmanager
def process(command, log, until, **environ):
    """Start a server as a process; yields it once `until` holds."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environ, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240  # imports take seconds, on a loaded machine minutes
        while not until():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.kill()
        server.wait()


def is_ready(url, model="coterie"):
    """Whether the model's readiness probe is answered with 200."""
    try:
        return httpx.get(f"{url}/v2/models/{model}/ready").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serving(run, key=KEY, environ=None, **settings):
    """`coterie serve` as a process; yields it, its address and its log once it listens."""
    url, log = f"http://127.0.0.1:{free_port()}", run / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, __file__, str(run / "bundle"), str(run / "publish"), url.rpartition(":")[2]]
    told = json.dumps({"profile_deadline_ms": 5000} | settings)  # no lookup is late on a loaded machine
    with process(
        command, log, lambda: "Try: curl" in log.read_text(), COTERIE_PSEUDONYM_KEY=key, SETTINGS=told, **environ or {}
    ) as server:
        yield server, url, log


if __name__ == "__main__":
    if sys.argv[1] == "predictor":  # serving.predictor, with the encoder of this file
        from serving import predictor, server

        sys.argv.pop(1)
        predictor.Predictor = partial(predictor.Predictor, encoder=HashingEncoder())
        server.predictor_command()
    else:
        from serving.server import serve

        settings = ServeSettings.of(**json.loads(os.environ["SETTINGS"]))
        folders, port = map(Path, sys.argv[1:3]), int(sys.argv[3])
        feedback = FeedbackSettings.of(**json.loads(os.environ["FEEDBACK"])) if "FEEDBACK" in os.environ else None
        serve(*folders, port, grpc_port=0, settings=settings, feedback=feedback, encoder=HashingEncoder())
