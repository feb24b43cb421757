"""The first stage of arXiv 2601.20760 on a trained backbone: worker embeddings and reward, learned together end to end.

    P(chosen > rejected | i) = sigmoid(beta_i (theta + U a_i) . (h(chosen) - h(rejected))),    a_i ~ N(0, I)

h is the last hidden state of a backbone whose LoRA is trained with the r + 1 heads theta and U and all a_i, on training
comparisons. It starts from the frozen-feature solution: the a_i and beta_i that embed found, and the theta and U that fit
these best on the untrained backbone (U itself lives on other features). Afterwards the a_i and beta_i are those of embed's
own estimator (discovery/lowrank.py), the posterior mean under the heads that were trained: the mode that gradient steps
end in ignores how little a worker with few comparisons tells.

The features that are handed on stay the frozen encoder's. LoRA that was trained on who voted how has seen the prompts that
`cluster` holds out within the training votes: on h its test and its choices would judge what had learned from the answers.
What is new for it are the embeddings (`cluster.method` kmeans, ward or average groups those) and the directions of the
frozen features that they stand for, which place new workers beside them without the backbone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.metrics import adjusted_rand_score

from coterie.config import JointSettings, RewardSettings
from coterie.contracts import (
    ADAPTER_FILE,
    EMBEDDING,
    FEATURES_FILE,
    MODEL_FILE,
    PERSONAL_FILE,
    TRAIN,
    VALIDATION,
    matrix,
    write_text,
)
from coterie.discovery.clustering import cluster_embeddings
from coterie.discovery.embedding import EmbeddingReward
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.votes import Votes, load_votes
from coterie.errors import BadData
from coterie.rewards.adapter_training import train_on, trained_model
from coterie.rewards.adapters import ADAPTER_WEIGHTS, HEAD_WEIGHT
from coterie.rewards.backbone import last_states, load_tokenizer, tokenized
from coterie.rewards.examples import TextComparisons
from coterie.rewards.heads import COTERIE_PRECISIONS, GLOBAL_PRECISIONS, Array, RewardHead
from coterie.rewards.personal import PersonalHead, fit_personal
from coterie.rewards.states import StateFeatures

_EMBEDDINGS, _DIFFERENCES = "embeddings.parquet", "differences.parquet"
_EMBEDDINGS_TENSOR = HEAD_WEIGHT.removesuffix("weight") + "embeddings"
_PRECISIONS = tuple(sorted({*GLOBAL_PRECISIONS, *COTERIE_PRECISIONS}))


def joint(embedded: Path, comparisons: Path, out: Path, settings: JointSettings) -> dict[str, Any]:
    """Learn embeddings, heads and LoRA together; leave in `out` what embed leaves, with these embeddings.

    Writes embeddings.parquet and lowrank.safetensors beside embed's features.safetensors and differences.parquet; and the
    reward: theta as the head of a PEFT adapter with adapter.json, theta and U on its hidden state in personal.safetensors.

    Args:
        embedded: folder of the embed stage.
        comparisons: comparisons.parquet.
        out: folder to write to.
        settings: of the training.

    Returns:
        embed's metrics, and under "joint": train_log_loss over the last tenth of the training, validation_log_loss
        {frozen: by what embed learned, start: by the untrained backbone, joint}, in nats a comparison; correlation of the
        new embeddings with those of embed, averaged over their directions; ari of the r + 1 clusters of either (k-means);
        steps, curve, over_long (comparisons that are not trained on).

    Raises:
        BadConfiguration: the backbone cannot be loaded.
        BadData: an input is missing or of another run, or there are fewer comparisons than a batch.
        RunFailed: as train_adapter.
    """
    table = EMBEDDING.read(embedded / _EMBEDDINGS)
    before = matrix(table["embedding"]).astype(np.float64)
    careful = table["reliability"].to_numpy().astype(np.float64)
    model = EmbeddingReward().restore(embedded / MODEL_FILE, before, np.log(careful))
    tokenizer = load_tokenizer(settings.backbone, settings.revision)
    asked = TextComparisons.read(embedded, comparisons, np.ones(len(table)), careful)
    tokens, longer = tokenized(tokenizer, asked.prompts, asked.responses, settings.max_tokens)
    rows = asked.counted(TRAIN)
    over = longer[asked.chosen[rows]] | longer[asked.rejected[rows]]
    if len(rows) - over.sum() < settings.batch_size:
        raise BadData(
            f"{comparisons}: {len(rows) - over.sum()} training comparisons, fewer than a batch of {settings.batch_size}, "
            "are left to train on. Lower joint.batch_size."
        )
    training = RewardSettings(kind="adapter", **settings.model_dump(exclude={"enabled"}))
    votes = {split: load_votes(embedded / _DIFFERENCES, split) for split in (TRAIN, VALIDATION)}

    states, _ = _states(training, tokenizer, tokens)
    train = np.flatnonzero(asked.split == TRAIN)
    pairs = np.column_stack([asked.chosen[train], asked.rejected[train]])
    features = StateFeatures.fit(states, pairs, np.zeros(states.shape[1]))
    seen = _by(votes, asked, features.transform(states))
    none = np.zeros_like(features.prior_mean)
    start, _ = fit_personal(seen[TRAIN], seen[VALIDATION], before, careful, none, _PRECISIONS)
    frozen = PersonalHead(RewardHead(model.theta_), model.basis_, np.zeros(before.shape[1]))
    losses = {
        "frozen": frozen.loss(votes[VALIDATION], before, careful),
        "start": start.loss(seen[VALIDATION], before, careful),
    }
    weights = features.on_states(np.column_stack([start.common.weight, start.basis]))
    joint = {
        "heads": np.ascontiguousarray(weights.T, np.float32),
        "embeddings": before.astype(np.float32),
        "prior": np.array([1 / asked.weight[rows[~over]].sum()], np.float32),
    }
    told = train_on(asked, rows[~over], tokens, training, out, joint=joint)

    heads = _take_heads(out)
    tokenizer.save_pretrained(out)
    states, revision = _states(training, tokenizer, tokens, out)
    seen = _by(votes, asked, (states @ heads.T).astype(np.float32))
    # What is seen is theta . h and U . h already.
    estimator, read = LowRankReward(before.shape[1]), np.eye(len(heads))
    estimator.theta_, estimator.basis_, estimator.n_features_in_ = read[0], read[:, 1:], len(heads)
    estimator.reliability_variance_ = model.reliability_variance_
    after, _, log_reliability = estimator.infer(seen[TRAIN])
    reliability = np.exp(log_reliability)
    found = PersonalHead(RewardHead(read[0]), read[:, 1:], np.zeros(len(heads) - 1))
    losses["joint"] = found.loss(seen[VALIDATION], after, reliability)
    _write_reward(found, heads, states[asked.reference], seen[VALIDATION], after, training, revision, out)

    # New workers are placed among these by the frozen features.
    none = np.zeros(votes[TRAIN].n_features)
    directions, _ = fit_personal(votes[TRAIN], votes[VALIDATION], after, reliability, none, _PRECISIONS)
    model.theta_, model.basis_ = directions.common.weight, directions.basis
    model.save(out / MODEL_FILE)
    columns = {"worker_id": table["worker_id"], "comparisons": table["comparisons"]}
    EMBEDDING.write(
        out / _EMBEDDINGS,
        columns | {"embedding": after, "reliability": reliability},
        EMBEDDING.metadata(embedded / _EMBEDDINGS),
        embedding=after.shape[1],
    )
    for name in (FEATURES_FILE, _DIFFERENCES):
        shutil.copyfile(embedded / name, out / name)
    embed: dict[str, Any] = json.loads((embedded / "metrics.json").read_text(encoding="utf-8"))
    learned = {
        "train_log_loss": told["adapter_train_log_loss"],
        "validation_log_loss": losses,
        **_alike(before[votes[TRAIN].present], after[votes[TRAIN].present], settings.seed),
        "over_long": int(over.sum()),
        "steps": told["steps"],
        "curve": told["curve"],
    }
    return embed | {"joint": learned}


def _states(
    training: RewardSettings, tokenizer: Any, tokens: Sequence[Any], adapter: Path | None = None
) -> tuple[Array, str]:
    """Hidden states [responses, hidden] by the backbone, or by an adapter of it, and its revision; nothing stays loaded."""
    model, revision = trained_model(training, tokenizer, adapter)
    return last_states(model, tokens), revision


def _by(votes: Mapping[str, Votes], asked: TextComparisons, features: Array) -> dict[str, Votes]:
    """The votes of each split by other features [responses, d] of what they compare."""
    rows = {split: np.flatnonzero(asked.split == split) for split in votes}  # both are in the order of the file
    return {
        split: replace(part, x=features[asked.chosen[rows[split]]] - features[asked.rejected[rows[split]]])
        for split, part in votes.items()
    }


def _take_heads(out: Path) -> Array:
    """theta and U, [1 + r, hidden], from what was trained, of which theta alone stays: PEFT loads that anywhere."""
    tensors = load_file(out / ADAPTER_WEIGHTS)
    heads = tensors[HEAD_WEIGHT]
    del tensors[_EMBEDDINGS_TENSOR]
    save_file(tensors | {HEAD_WEIGHT: heads[:1]}, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return np.asarray(heads, np.float64)


def _write_reward(
    found: PersonalHead,
    heads: Array,
    reference: Array,
    validation: Votes,
    embeddings: Array,
    training: RewardSettings,
    revision: str,
    out: Path,
) -> None:
    """adapter.json of the reward of everybody, and personal.safetensors, centred and calibrated."""
    personal = found.calibrated(validation.x, validation.y, embeddings[validation.worker])
    common = replace(personal.common, weight=heads[0])
    replace(personal, common=common, basis=heads[1:].T).centered(reference).save(out / PERSONAL_FILE)
    everybody = found.common.calibrated(validation.x, validation.y, validation.weighted(np.ones(len(validation))))
    told = {
        "backbone": training.backbone,
        "revision": revision,
        "max_tokens": training.max_tokens,
        "center": common.centered(reference).center,
        "scale": everybody.scale,
    }
    write_text(out / ADAPTER_FILE, json.dumps(told, indent=1))


def _alike(before: Array, after: Array, seed: int) -> dict[str, float]:
    """How much of the embeddings [n, r] that training started from is left."""
    pairs = zip(before.T, after.T, strict=True)
    correlations = [np.corrcoef(*pair)[0, 1] if min(map(np.ptp, pair)) else 0.0 for pair in pairs]
    coteries = min(before.shape[1] + 1, len(before))
    clusters = (cluster_embeddings(places, coteries, "kmeans", seed) for places in (before, after))
    return {"correlation": float(np.mean(correlations)), "ari": float(adjusted_rand_score(*clusters))}
