"""The reward stage: one reward from the folders of the stages before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coterie.config import RewardSettings
from coterie.contracts import (
    ASSIGNMENT,
    EMBEDDING_REWARD,
    GLOBAL,
    HEAD_FILE,
    MODEL_FILE,
    PERSONAL_FILE,
    TRAIN,
    VALIDATION,
    matrix,
)
from coterie.discovery.embedding import EmbeddingReward
from coterie.discovery.votes import Votes, load_votes
from coterie.errors import BadConfiguration, BadData
from coterie.rewards.adapter_training import train_adapter
from coterie.rewards.heads import (
    SMALLEST_RESPONSIBILITY,
    Array,
    RewardHead,
    fit_coterie,
    fit_global,
    mean_loss,
    weighted,
)
from coterie.rewards.personal import PersonalHead
from coterie.rewards.states import train_coterie_head, train_personal_heads


def train_reward(
    embedded: Path,
    clustered: Path,
    out: Path,
    coterie: int | Literal["global", "embedding"],
    settings: RewardSettings,
    global_reward: Path | None = None,
    comparisons: Path | None = None,
) -> dict[str, Any]:
    """Fit one head and write it to out/head.safetensors (by embedding: out/personal.safetensors).

    Where settings.kind is adapter or adapter-head, an adapter of a backbone is made as well and written beside the head; the
    reward by embedding then reads the hidden state of the global adapter, and not the encoder's features.

    Args:
        embedded: folder of the embed stage (differences.parquet).
        clustered: folder of the cluster stage (assignments.parquet).
        out: folder to write to.
        coterie: number of the coterie, "global", or "embedding": everybody by their own.
        settings: the stage's settings.
        global_reward: folder of the global reward; needed for a coterie.
        comparisons: comparisons.parquet, or the folder of ingest; needed for adapters.

    Returns:
        workers and comparisons (sums of responsibilities), precision, scale, train_log_loss, validation_log_loss, and
        for a coterie global_validation_log_loss: of the global head on the same comparisons. Of an adapter also what
        train_adapter or train_coterie_head returns; by embedding what train_personal_heads returns.

    Raises:
        BadData: an input is missing, or there is no such coterie.
        BadConfiguration, RunFailed: as train_adapter.
    """
    path = embedded / "differences.parquet"
    train, validation = load_votes(path, TRAIN), load_votes(path, VALIDATION)
    columns = ASSIGNMENT.read(
        clustered / "assignments.parquet", columns=["worker_id", "posterior", "embedding", "reliability"]
    )
    reliability = columns["reliability"].to_numpy().astype(np.float64)
    source = _texts(settings, comparisons)
    if coterie == EMBEDDING_REWARD:
        embeddings = matrix(columns["embedding"])
        if source is None:
            return _train_personal(embedded, out, validation, embeddings)
        return train_personal_heads(embedded, source, _start(coterie, global_reward), out, embeddings, reliability)
    posterior = matrix(columns["posterior"]).astype(np.float64)
    if coterie == GLOBAL:
        audience = np.ones(len(posterior))
        fitted = fit_global(train, validation, reliability, settings.precision)
        extra = {}
    else:
        number = int(coterie)
        if not 0 <= number < posterior.shape[1]:
            raise BadData(f"{clustered}: no coterie {coterie}; there are {posterior.shape[1]}, numbered from 0.")
        audience = posterior[:, number]
        base = RewardHead.load(_start(coterie, global_reward))
        fitted = fit_coterie(train, validation, audience, reliability, base, settings.precision)
        x, y, weight = weighted(validation, np.where(audience < SMALLEST_RESPONSIBILITY, 0, audience), reliability)
        extra = {"global_validation_log_loss": mean_loss(x @ base.weight, y, weight)} if len(y) else {}
    fitted.head.save(out / HEAD_FILE)
    figures: dict[str, Any] = {
        "workers": float(audience.sum()),
        "comparisons": float(audience[train.worker].sum()),
        "precision": fitted.precision,
        "scale": fitted.head.scale,
        "train_log_loss": fitted.train_log_loss,
        "validation_log_loss": fitted.validation_log_loss,
        **extra,
    }
    if source is not None and (coterie == GLOBAL or settings.kind == "adapter"):
        start, workers = None if coterie == GLOBAL else global_reward, columns["worker_id"].to_pylist()
        read = coterie == GLOBAL and (settings.kind == "adapter-head" or _ships(clustered) == EMBEDDING_REWARD)
        figures |= train_adapter(embedded, source, out, settings, workers, audience, reliability, start, read)
    elif source is not None:
        common = _start(coterie, global_reward)
        figures |= train_coterie_head(embedded, source, common, out, audience, reliability, settings.precision)
    return {name: value for name, value in figures.items() if not isinstance(value, float) or np.isfinite(value)}


def _texts(settings: RewardSettings, comparisons: Path | None) -> Path | None:
    """comparisons.parquet where the reward's kind reads texts."""
    if settings.kind == "head":
        return None
    if comparisons is None:
        raise BadConfiguration("reward adapters are trained on texts: give the comparisons of ingest as well")
    return comparisons / "comparisons.parquet" if comparisons.is_dir() else comparisons


def _start(coterie: object, global_reward: Path | None) -> Path:
    if global_reward is None:
        raise BadData(f"coterie {coterie}: its reward starts from the global one; give the global reward's folder.")
    return global_reward


def _ships(clustered: Path) -> str:
    found: str = json.loads((clustered / "metrics.json").read_text(encoding="utf-8"))["selection"]["ships"]
    return found


def _train_personal(embedded: Path, out: Path, validation: Votes, embeddings: Array) -> dict[str, float]:
    """What embed learned, theta and U, with the scale of least log-loss on validation comparisons."""
    model = EmbeddingReward().restore(embedded / MODEL_FILE, embeddings, np.zeros(len(embeddings)))
    basis, places = model.basis_.astype(np.float64), embeddings[validation.worker]
    head = PersonalHead(RewardHead(model.theta_.astype(np.float64)), basis, np.zeros(basis.shape[1]))
    head = head.calibrated(validation.x, validation.y, places)
    head.save(out / PERSONAL_FILE)
    return {
        "rank": float(basis.shape[1]),
        "scale": head.common.scale,
        "validation_log_loss": mean_loss(head.margin(validation.x, places), validation.y, np.ones(len(validation))),
    }
