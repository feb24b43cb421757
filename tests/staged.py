"""Folders of all stages before `reward`, written without an encoder or an estimator: workers of known tastes.

Half of the workers like long answers and half short ones, beside a taste that all share; with `groups=False` all are
alike and the coteries are drawn at random.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie import contracts
from coterie.bundle import build_bundle
from coterie.config import BundleSettings, EvaluateSettings, RewardSettings
from coterie.contracts import content_id
from coterie.discovery.differences import differences
from coterie.discovery.features import FeatureMap
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.encoding.style import STYLE_NAMES, style_features
from coterie.evaluation import evaluate
from coterie.rewards import train_reward
from coterie.stages import reward_name

DIMENSION = 6
WORDS = ["river", "bread", "lamp", "walk", "early", "warm", "stone", "garden", "winter", "tea", "map", "bell"]


class TextEncoder:
    """A vector drawn from the text's own hash, moved by `off`."""

    name, revision, dimension, max_tokens, precision = "drawn", "1", DIMENSION, 256, "float32"

    def __init__(self, off: float = 0.0):
        self.off, self.calls = off, 0

    def text(self, prompt, response):
        return response

    def cut(self, texts):
        return np.zeros(len(texts), dtype=bool)

    def encode(self, texts):
        self.calls += 1
        rows = [np.random.default_rng(int(content_id(t)[:12], 16)).standard_normal(DIMENSION) for t in texts]
        return np.array(rows, np.float32).reshape(len(texts), DIMENSION) + np.float32(self.off)


@dataclass(frozen=True)
class Staged:
    """The folders, by stage."""

    root: Path

    def __getattr__(self, name):
        return self.root / name

    @property
    def rewards(self):
        return {path.name: path for path in sorted((self.root / "rewards").iterdir())}

    @property
    def stages(self):
        names = ("ingest", "encode", "embed", "cluster", "evaluate")
        return {name: self.root / name for name in names} | self.rewards


def write_stages(root, workers=40, comparisons=40, coteries=2, groups=True, rank=2, seed=0, ties=0.0, ships=None):
    """Write ingest, encode, embed and cluster below `root`; `ships` other than what the coteries say."""
    rng = np.random.default_rng(seed)
    for name in ("ingest", "encode", "embed", "cluster"):
        (root / name).mkdir(parents=True)
    answers = []
    for _ in range(60):
        texts = {" ".join(rng.choice(WORDS, rng.integers(2, 25))).capitalize() + "." for _ in range(4)}
        answers.append(sorted(texts))
    feature_map = FeatureMap(
        np.zeros(DIMENSION, np.float32),
        np.ones(DIMENSION, np.float32),
        np.eye(DIMENSION, dtype=np.float32),
        np.zeros(len(STYLE_NAMES), np.float32),
        np.ones(len(STYLE_NAMES), np.float32),
        (*(f"pc{i + 1}" for i in range(DIMENSION)), *STYLE_NAMES),
    )
    common = np.zeros(feature_map.size)
    common[:DIMENSION] = 0.6 * rng.standard_normal(DIMENSION)
    length = DIMENSION + STYLE_NAMES.index("words")
    group = rng.integers(0, coteries, workers)
    encoder = TextEncoder()

    def h(prompt, text):
        return feature_map.transform(encoder.encode([text]), style_features([prompt], [text]))[0]

    rows = {field.name: [] for field in contracts.COMPARISON.fields}
    for worker in range(workers):
        theta = common.copy()
        if groups:
            theta[length] += 2.5 * (1 if group[worker] % 2 == 0 else -1)
        for _ in range(comparisons):
            number = int(rng.integers(60))
            prompt = f"Question {number}?"
            pair = list(rng.choice(answers[number], 2, replace=False))
            margin = float((h(prompt, pair[0]) - h(prompt, pair[1])) @ theta)
            if rng.random() > 1 / (1 + np.exp(-margin)):
                pair.reverse()
            ids = [content_id(prompt, text) for text in pair]
            row = {
                "comparison_id": content_id(f"{len(rows['label'])}"),
                "worker_id": f"w{worker:03}",
                "prompt": prompt,
                "prompt_id": content_id(prompt),
                "chosen": pair[0],
                "rejected": pair[1],
                "chosen_id": ids[0],
                "rejected_id": ids[1],
                "pair_id": content_id(*sorted(ids)),
                "label": 0.5 if rng.random() < ties else 1.0,
                "split": "train" if number < 36 else "validation" if number < 48 else "test",
                "source": "test",
            }
            for name, column in rows.items():
                column.append(row.get(name))
    contracts.COMPARISON.write(root / "ingest" / "comparisons.parquet", rows)

    texts = {content_id(f"Question {n}?", t): (f"Question {n}?", t) for n, ts in enumerate(answers) for t in ts}
    order = sorted(texts)
    metadata = {"encoder": "drawn", "revision": "1", "max_tokens": "256", "style_names": json.dumps(STYLE_NAMES)}
    contracts.VECTOR.write(
        root / "encode" / "vectors.parquet",
        {
            "response_id": order,
            "vector": encoder.encode([texts[i][1] for i in order]),
            "style": style_features([texts[i][0] for i in order], [texts[i][1] for i in order]),
        },
        metadata,
        vector=DIMENSION,
        style=len(STYLE_NAMES),
    )
    feature_map.save(root / "embed" / contracts.FEATURES_FILE)
    ids = differences(
        root / "ingest" / "comparisons.parquet",
        root / "encode" / "vectors.parquet",
        feature_map,
        root / "embed" / "differences.parquet",
    )
    mixture = MixtureReward(coteries)
    mixture.theta_ = np.tile(common, (coteries, 1)).astype(np.float32)
    if groups:
        mixture.theta_[:, length] += 2.5 * (1 - 2 * (np.arange(coteries) % 2))
    mixture.weights_, mixture.reliability_variance_ = np.full(coteries, 1 / coteries), 0.1
    mixture.save(root / "cluster" / contracts.MIXTURE_FILE, "m1")
    model = LowRankReward(rank)
    model.theta_, model.basis_ = common.astype(np.float32), np.zeros((feature_map.size, rank), np.float32)
    model.basis_[length, 0], model.reliability_variance_ = -5 / 3, 0.1
    model.save(root / "embed" / contracts.MODEL_FILE)

    sure = 0.98 if coteries > 1 else 1.0
    posterior = np.full((workers, coteries), (1 - sure) / max(coteries - 1, 1))
    posterior[np.arange(workers), group] = sure
    train = np.bincount(
        [int(w[1:]) for w, s in zip(rows["worker_id"], rows["split"], strict=True) if s == "train"], minlength=workers
    )
    contracts.ASSIGNMENT.write(
        root / "cluster" / "assignments.parquet",
        {
            "worker_id": ids,
            "embedding": 0.3 * rng.standard_normal((workers, rank)) + 3 * (group[:, None] - 0.5),
            "reliability": np.ones(workers),
            "comparisons": train,
            "coterie": group,
            "posterior": posterior,
            "mixture_version": ["m1"] * workers,
        },
        embedding=rank,
        posterior=coteries,
    )
    candidates = [
        {
            "member": "reliability",
            "size": 1,
            "log_loss": 0.6,
            "gain": 0.0,
            "standard_error": 0.0,
            "chosen": coteries == 1,
        },
        {"member": "mixture", "size": 2, "log_loss": 0.5, "gain": 0.1, "standard_error": 0.02, "chosen": coteries > 1},
        {"member": "mixture", "size": 3, "log_loss": 0.51, "gain": 0.09, "standard_error": 0.02, "chosen": False},
    ]
    verdict = "coteries" if coteries > 1 else "one-taste"
    member = "mixture" if coteries > 1 else "reliability"
    quantiles = {"min": 40.0, "median": 40.0, "max": 40.0}
    metrics = {
        "ingest": {
            "workers": workers,
            "comparisons": len(rows["label"]),
            "refused": 3,
            "rows": len(rows["label"]) + 3,
            "duplicates": 0,
            "refused_by_reason": {"no worker": 3},
            "comparisons_per_worker": quantiles,
            "prompts": 60,
            "splits": {"train": {"prompts": 36, "comparisons": 1}},
            "ties": 0,
            "agreement": {"rate": 0.61, "shared_pairs": 400},
            "length_bias": {"longer_chosen": 0.5, "comparisons": 1500},
            "position_bias": {"first_chosen": None, "comparisons": 0},
            "warnings": [],
            "key_fingerprint": None,
        },
        "encode": {"encoder": "drawn", "texts": len(order), "dimension": DIMENSION},
        "embed": {"rank": rank},
        "cluster": {
            "mixture_version": "m1",
            "selection": {
                "verdict": verdict,
                "member": member,
                "size": coteries,
                "coteries": coteries,
                "ships": ships or ("coteries" if coteries > 1 else "one-reward"),
                "candidates": candidates,
            },
            "heterogeneity": None,
            "stability": {"half_split_ari": 0.62} if coteries > 1 else {},
            "priors": {
                "precision": 10.0,
                "reliability_variance": 0.1,
                "coterie_precision": 30.0,
                "embedding": ["lowrank", rank, 100.0],
            },
        },
    }
    for name, content in metrics.items():
        (root / name / "metrics.json").write_text(json.dumps(content))
    return Staged(root)


def train_all(staged, coteries=2):
    """Write the rewards below `staged.root`/rewards."""
    base = staged.root / "rewards" / "global"
    ships = json.loads((staged.cluster / "metrics.json").read_text())["selection"]["ships"]
    for k in ["global", *range(coteries), *(["embedding"] if ships == "embedding" else [])]:
        folder = base if k == "global" else base.with_name(reward_name(k))
        folder.mkdir(parents=True, exist_ok=True)
        figures = train_reward(staged.embed, staged.cluster, folder, k, RewardSettings(), base)
        (folder / "metrics.json").write_text(json.dumps(figures))


def judge(staged, **settings):
    """Write evaluate/metrics.json and return it."""
    settings = EvaluateSettings(**{"replicates": 300, **settings})
    result = evaluate(staged.embed, staged.cluster, staged.rewards, settings)
    staged.evaluate.mkdir(exist_ok=True)
    (staged.evaluate / "metrics.json").write_text(json.dumps(result))
    return result


def make_bundle(staged, out):
    """Build a bundle of all that `staged` holds."""
    return build_bundle(
        ingested=staged.ingest,
        encoded=staged.encode,
        embedded=staged.embed,
        clustered=staged.cluster,
        rewards=staged.rewards,
        evaluated=staged.evaluate,
        out=out,
        settings=BundleSettings(reference=64),
    )


def everything(root, coteries=2, **settings):
    """All stages up to the bundle."""
    staged = write_stages(root, coteries=coteries, **settings)
    train_all(staged, coteries)
    judge(staged)
    make_bundle(staged, staged.bundle)
    return staged
