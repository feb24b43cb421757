"""The embed and cluster stages: from tables to tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import (
    ASSIGNMENT,
    EMBEDDING,
    FEATURES_FILE,
    MIXTURE_FILE,
    MODEL_FILE,
    TEST,
    TRAIN,
    Candidate,
    Estimate,
    Selection,
    matrix,
)
from coterie.discovery.differences import differences
from coterie.discovery.discover import Discovery, decide, learn
from coterie.discovery.features import FeatureMap, fit_features
from coterie.discovery.lineage import drift, match_coteries
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Array, VoteFile, Votes, joined, load_votes
from coterie.errors import BadData

_DIFFERENCES, _EMBEDDINGS, _ASSIGNMENTS = "differences.parquet", "embeddings.parquet", "assignments.parquet"


def embed(comparisons: Path, vectors: Path, out: Path, settings: EmbedSettings) -> dict[str, Any]:
    """Learn features, worker embeddings and reliabilities from training votes.

    Writes features.safetensors, differences.parquet, embeddings.parquet and lowrank.safetensors into `out`. Where nothing
    beats pooled + reliability, the embedding has one direction all the same, and the size of "chosen" is 0.

    Returns:
        The stage's metrics: rank, the chosen member, candidates, what was held out, sizes and the chosen priors.

    Raises:
        BadData: tables that are missing or do not fit together, or too little training data.
    """
    features = fit_features(comparisons, vectors, settings)
    features.save(out / FEATURES_FILE)
    workers = differences(comparisons, vectors, features, out / _DIFFERENCES)
    votes = VoteFile(out / _DIFFERENCES, TRAIN)
    learned = learn(votes, settings)
    choice, base, model = learned.choice, learned.base, learned.embedding
    model.save(out / MODEL_FILE)
    rank = model.basis_.shape[1]
    described = {"member": choice.member, "size": choice.size, "prior": choice.prior}
    EMBEDDING.write(
        out / _EMBEDDINGS,
        {
            "worker_id": workers,
            "embedding": model.embeddings_,
            "reliability": np.exp(model.log_reliability_),
            "comparisons": votes.counts,
        },
        metadata={
            "chosen": json.dumps(described),
            "candidates": json.dumps([c.model_dump() for c in choice.candidates]),
        },
        embedding=rank,
    )
    return {
        "rank": rank,
        "chosen": described,
        "candidates": [c.model_dump() for c in choice.candidates],
        "held_out": {"unit": choice.heldout.unit, "splits": len(choice.heldout.splits)},
        "features": features.size,
        "workers": len(workers),
        "comparisons": len(votes),
        "priors": {"precision": base.precision, "reliability_variance": base.reliability_variance},
    }


def cluster(embedded: Path, out: Path, settings: ClusterSettings, previous: Path | None = None) -> dict[str, Any]:
    """Choose the number of coteries, and assign every worker from their training votes.

    With `previous`, the folder of an earlier clustering, coteries of the same people keep their ids.

    Writes assignments.parquet and mixture.safetensors into `out`. A worker without training votes has the coteries'
    weights as posterior.

    Returns:
        The stage's metrics: selection (contracts.Selection), heterogeneity, stability, sizes, what was held out, mixture_version.

    Raises:
        BadData: tables that are missing, too little training data, or more coteries than workers.
        BadConfiguration: linkage of too many workers.
    """
    table = EMBEDDING.read(embedded / _EMBEDDINGS)
    described = EMBEDDING.metadata(embedded / _EMBEDDINGS)
    chosen = json.loads(described["chosen"])
    embeddings = matrix(table["embedding"])
    votes = VoteFile(embedded / _DIFFERENCES, TRAIN)
    if votes.n_workers != len(table):
        raise BadData(
            f"{embedded}: differences of {votes.n_workers} workers, embeddings of {len(table)}; run embed again"
        )
    model = SlopesReward() if chosen["member"] == "slopes" else LowRankReward()
    model.restore(embedded / MODEL_FILE, embeddings, np.log(table["reliability"].to_numpy()))
    found = decide(votes, model, (chosen["member"], chosen["size"], chosen["prior"]), settings)
    mixture, selection = found.mixture, found.selection
    compared = {(c.member, c.size) for c in selection.candidates}
    also = [Candidate(**c) for c in json.loads(described["candidates"]) if (c["member"], c["size"]) not in compared]
    selection = selection.model_copy(
        update={"candidates": [*selection.candidates, *also], "gain": _gain(selection, also)}
    )

    posterior, log_reliability = mixture.infer(votes)
    coterie = posterior.argmax(axis=1)
    lineage = _lineage(previous, table["worker_id"], posterior)
    version = _version(found)
    mixture.save(out / MIXTURE_FILE, version)
    ASSIGNMENT.write(
        out / _ASSIGNMENTS,
        {
            "worker_id": table["worker_id"],
            "embedding": embeddings,
            "reliability": np.exp(log_reliability),
            "comparisons": votes.counts,
            "coterie": coterie,
            "posterior": posterior,
            "mixture_version": pa.array([version] * len(table)),
        },
        metadata={"mixture_version": version},
        embedding=embeddings.shape[1],
        posterior=mixture.n_coteries,
    )
    return {
        "selection": selection.model_dump(),
        "heterogeneity": None if found.heterogeneity is None else found.heterogeneity.model_dump(),
        "stability": {} if found.stability is None else {"half_split_ari": found.stability},
        "lineage": lineage,
        "sizes": np.bincount(coterie[votes.present], minlength=mixture.n_coteries).tolist(),
        "held_out": {"unit": found.heldout.unit, "splits": len(found.heldout.splits)},
        "mixture_version": version,
        "seed": settings.seed,
        "priors": {
            "precision": found.base.precision,
            "reliability_variance": found.base.reliability_variance,
            "coterie_precision": found.prior,
            "embedding": [chosen["member"], chosen["size"], chosen["prior"]],
        },
    }


def _lineage(previous: Path | None, workers: pa.ChunkedArray, posterior: Array) -> dict[str, Any]:
    """What the coteries are called: the ids of the previous clustering's where they are the same people, else new ones."""
    if previous is None:
        ids = list(range(posterior.shape[1]))
        return {"ids": ids, "matched_from": [-1] * len(ids), "overlap": [0.0] * len(ids), "next_id": len(ids)}
    before = json.loads((previous / "metrics.json").read_text(encoding="utf-8"))["lineage"]
    old = ASSIGNMENT.read(previous / _ASSIGNMENTS, ["worker_id", "posterior"])
    found = match_coteries(
        old["worker_id"].to_numpy(),
        matrix(old["posterior"]),
        workers.to_numpy(),
        posterior,
        before["ids"],
        before["next_id"],
    )
    return {
        "ids": found.ids.tolist(),
        "matched_from": found.matched_from.tolist(),
        "overlap": found.overlap.round(4).tolist(),
        "next_id": found.next_id,
    }


def drift_since(embedded: Path, clustered: Path, comparisons: Path, vectors: Path, out: Path) -> dict[str, Any]:
    """Has what people want changed? Newer comparisons, by the features and the mixture of an earlier run.

    Args:
        embedded, clustered: folders of the earlier run; its test votes are what the mixture was judged on.
        comparisons: newer comparisons; all of them are looked at, whatever their split.
        vectors: of their responses, by the same encoder.
        out: a folder for the time of the work.

    Returns:
        The fields of lineage.Drift.

    Raises:
        BadData: tables that are missing or do not fit together, or no worker who is known.
    """
    features = FeatureMap.load(embedded / FEATURES_FILE)
    names = EMBEDDING.read(embedded / _EMBEDDINGS, ["worker_id"])["worker_id"].to_pylist()
    path = out / _DIFFERENCES
    newer = differences(comparisons, vectors, features, path)
    place = pd.Index(names).get_indexer(newer)
    if (place < 0).all():
        raise BadData(
            f"{comparisons}: none of its {len(newer)} workers is known to {embedded}; give newer votes of theirs"
        )
    parts = [load_votes(path, split) for split in VoteFile.splits(path)]
    votes = joined(parts, len(newer))
    votes = votes.subset(place[votes.worker] >= 0)
    numbered = Votes.of(votes.x, votes.y, place[votes.worker], votes.prompt, len(names), votes.weight)
    known, held_out = (load_votes(embedded / _DIFFERENCES, split) for split in (TRAIN, TEST))
    mixture = MixtureReward.load(clustered / MIXTURE_FILE)
    path.unlink()
    return asdict(drift(mixture, known, held_out, numbered), dict_factory=_plain)


def _gain(selection: Selection, also: list[Candidate]) -> Estimate | None:
    """What the best taste member gains, though it be one that only embed tried; of such the workers' gains are not at hand."""
    tastes = [c for c in also if c.member not in ("pooled", "reliability")]
    best = max(tastes, key=lambda c: c.gain, default=None)
    known = selection.gain
    if best is None or (known is not None and known.value is not None and known.value >= best.gain):
        return known
    reach = float(stats.norm.ppf(0.95)) * best.standard_error
    return Estimate(value=best.gain, low=best.gain - reach, high=best.gain + reach, level=0.9)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.model_dump() if isinstance(value, Estimate) else value for name, value in items}


def _version(found: Discovery) -> str:
    """Content hash of all that a profile is made with: the mixture's tensors and the embedding's directions."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted((found.mixture.tensors() | found.embedding.tensors()).items()):
        digest.update(f"{name} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
