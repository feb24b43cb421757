"""The embed and cluster stages: from tables to tables."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import (
    ASSIGNMENT,
    EMBEDDING,
    FEATURES_FILE,
    MIXTURE_FILE,
    MODEL_FILE,
    TRAIN,
    Candidate,
    Selection,
    matrix,
)
from coterie.discovery.clustering import fit_coteries
from coterie.discovery.features import differences, fit_features
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.selection import beats, half_split_ari, select_coteries, select_rank
from coterie.discovery.votes import load_votes
from coterie.errors import BadData

STABLE = 0.3  # half-split ARI from which groups count as groups (docs/method, section 2)
_DIFFERENCES, _EMBEDDINGS, _ASSIGNMENTS = "differences.parquet", "embeddings.parquet", "assignments.parquet"


def embed(comparisons: Path, vectors: Path, out: Path, settings: EmbedSettings) -> dict[str, Any]:
    """Learn features, worker embeddings and reliabilities from training votes.

    Writes features.safetensors, differences.parquet, embeddings.parquet and lowrank.safetensors into `out`. Where no
    rank beats pooled + reliability, the embedding has rank 1 all the same, and "chosen_rank" says 0.

    Returns:
        The stage's metrics: rank, chosen_rank, candidates, what was held out, sizes and the chosen priors.

    Raises:
        BadData: tables that are missing or do not fit together, or too little training data.
    """
    features = fit_features(comparisons, vectors, settings)
    features.save(out / FEATURES_FILE)
    workers = differences(comparisons, vectors, features, out / _DIFFERENCES)
    votes = load_votes(out / _DIFFERENCES, (TRAIN,))
    choice = select_rank(votes, settings)
    rank = max(choice.size, 1)
    base = choice.heldout.base(votes)
    model = LowRankReward(rank, base.precision, choice.precision, base=base).fit(votes)
    model.save(out / MODEL_FILE)
    candidates = [c.model_dump() for c in choice.candidates if c.member == "lowrank"]
    EMBEDDING.write(
        out / _EMBEDDINGS,
        {
            "worker_id": workers,
            "embedding": model.embeddings_,
            "reliability": np.exp(model.log_reliability_),
            "comparisons": votes.counts,
        },
        metadata={"candidates": json.dumps(candidates), "chosen_rank": str(choice.size)},
        embedding=rank,
    )
    return {
        "rank": rank,
        "chosen_rank": choice.size,
        "candidates": [c.model_dump() for c in choice.candidates],
        "held_out": {"unit": choice.unit, "splits": len(choice.heldout.splits)},
        "features": features.size,
        "workers": len(workers),
        "comparisons": len(votes),
        "priors": {
            "precision": base.precision,
            "reliability_variance": base.reliability_variance,
            "basis_precision": choice.precision,
        },
    }


def cluster(embedded: Path, out: Path, settings: ClusterSettings) -> dict[str, Any]:
    """Choose the number of coteries, and assign every worker from their training votes.

    Writes assignments.parquet and mixture.safetensors into `out`. A worker without training votes has the coteries'
    weights as posterior.

    Returns:
        The stage's metrics: selection (contracts.Selection), stability, sizes, what was held out, mixture_version.

    Raises:
        BadData: tables that are missing, too little training data, or more coteries than workers.
        BadConfiguration: linkage of too many workers.
    """
    table = EMBEDDING.read(embedded / _EMBEDDINGS)
    described = EMBEDDING.metadata(embedded / _EMBEDDINGS)
    embeddings = matrix(table["embedding"])
    votes = load_votes(embedded / _DIFFERENCES, (TRAIN,))
    if votes.n_workers != len(table):
        raise BadData(
            f"{embedded}: differences of {votes.n_workers} workers, embeddings of {len(table)}; run embed again"
        )
    voting = int(votes.present.sum())
    if settings.coteries != "auto" and not 1 <= settings.coteries <= voting:
        raise BadData(
            f"cluster.coteries = {settings.coteries}, but {voting} workers have training comparisons; "
            f"ask for 1 to {voting}, or auto"
        )
    rank = embeddings.shape[1]
    choice = select_coteries(votes, settings, rank)
    base = choice.heldout.base(votes)
    given = None if settings.method == "mixture" else embeddings
    model = fit_coteries(votes, choice.size, settings.method, base, choice.precision, rank, settings.seed, given)
    stability = (
        half_split_ari(
            votes, choice.size, settings.method, choice.heldout, choice.precision, rank, settings.splits, settings.seed
        )
        if choice.size > 1
        else None
    )
    ranks = [Candidate(**c) for c in json.loads(described.get("candidates", "[]"))]
    chosen_rank = int(described.get("chosen_rank", "0"))
    selection = _verdict(choice.candidates + ranks, choice.size, settings.coteries != "auto", chosen_rank, stability)

    posterior, log_reliability = model.infer(votes)
    coterie = posterior.argmax(axis=1)
    version = _version(model)
    model.save(out / MIXTURE_FILE, version)
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
        embedding=rank,
        posterior=choice.size,
    )
    return {
        "selection": selection.model_dump(),
        "stability": {} if stability is None else {"half_split_ari": stability},
        "sizes": np.bincount(coterie[votes.present], minlength=choice.size).tolist(),
        "held_out": {"unit": choice.unit, "splits": len(choice.heldout.splits)},
        "mixture_version": version,
        "priors": {
            "precision": base.precision,
            "reliability_variance": base.reliability_variance,
            "coterie_precision": choice.precision,
        },
    }


def _verdict(
    candidates: list[Candidate], coteries: int, insisted: bool, chosen_rank: int, stability: float | None
) -> Selection:
    """One taste, continuous tastes or coteries, and which member says so (docs/method, section 2).

    A number of coteries that was insisted on does not change what the held-out likelihood says.
    """
    gains = any(c.member == "mixture" and c.size == coteries and beats(c.gain, c.standard_error) for c in candidates)
    verdict: Literal["one-taste", "continuous", "coteries"]
    if gains and stability is not None and stability >= STABLE:
        verdict, member, size = "coteries", "mixture", coteries
    elif chosen_rank > 0:
        verdict, member, size = "continuous", "lowrank", chosen_rank
    elif gains:
        verdict, member, size = "continuous", "mixture", coteries
    else:
        verdict, member, size = "one-taste", "reliability", 1
    marked = [c.model_copy(update={"chosen": (c.member, c.size) == (member, size)}) for c in candidates]
    return Selection(verdict=verdict, member=member, coteries=coteries, insisted=insisted, candidates=marked)


def _version(model: MixtureReward) -> str:
    """Content hash of the mixture's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.tensors().items()):
        digest.update(f"{name} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
