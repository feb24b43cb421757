"""Training of reward adapters: a global one, and one a coterie that starts from it and is pulled towards it (docs/method, section 6)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coterie.backbones import backbone_source, device_of, dtype_of, revision_of
from coterie.config import RewardSettings
from coterie.contracts import (
    ADAPTER_FILE,
    JOINT_FILE,
    SCORE,
    SCORES_FILE,
    STATE,
    STATES_FILE,
    TRAIN,
    VALIDATION,
    replacing,
    write_text,
)
from coterie.discovery.votes import Array
from coterie.errors import BadConfiguration, BadData
from coterie.rewards.adapters import ADAPTER_WEIGHTS, PEFT_FILES, read_adapter, reading_dtype, score_weight
from coterie.rewards.backbone import last_states, load_model, load_tokenizer, tokenized
from coterie.rewards.examples import TextComparisons
from coterie.rewards.heads import RewardHead, mean_loss
from coterie.rewards.scored import ScoredResponses, has_adapter


def train_adapter(
    embedded: Path,
    comparisons: Path,
    out: Path,
    settings: RewardSettings,
    workers: Sequence[str],
    audience: Array,
    reliability: Array,
    global_reward: Path | None = None,
    keep_states: bool = False,
) -> dict[str, Any]:
    """Train an adapter and write it to `out`, with its tokenizer, adapter.json and scores.parquet.

    Args:
        embedded, comparisons, audience, reliability: as of TextComparisons.read.
        out: folder to write to.
        settings: the stage's settings.
        workers: ids [n_workers].
        global_reward: folder of the global reward, whose adapter a coterie's starts from and is pulled towards; None:
            train the global one.
        keep_states: leave the hidden states of all responses in states.parquet, for heads that read them.

    Returns:
        adapter_train_log_loss, over the last tenth of the training, and adapter_validation_log_loss, in nats a comparison
        and weighted by responsibility; of a coterie adapter_global_validation_log_loss, of the global adapter on the
        same comparisons; adapter_scale; steps; over_long and over_long_by_worker: comparisons with a side of more than
        max_tokens, which are not trained on; curve: [step, training log-loss] pairs. A coterie with fewer comparisons
        than a batch gets a copy of the global adapter, and `served_by` says why.

    Raises:
        BadConfiguration: the backbone cannot be loaded, or the global reward is no adapter of it.
        BadData: an input is missing or of another run, or there are fewer comparisons than a batch for the global one.
        RunFailed: the loss is not finite, or memory or disk do not suffice.
    """
    if global_reward is not None and (
        not has_adapter(global_reward) or read_adapter(global_reward)["backbone"] != settings.backbone
    ):
        raise BadConfiguration(
            f"{global_reward}: holds no adapter of {settings.backbone}. Train the global reward with the same reward.kind "
            "and reward.backbone first."
        )
    tokenizer = load_tokenizer(settings.backbone, settings.revision)
    asked = TextComparisons.read(embedded, comparisons, audience, reliability)
    tokens, longer = tokenized(tokenizer, asked.prompts, asked.responses, settings.max_tokens)
    rows = asked.counted(TRAIN)
    over = longer[asked.chosen[rows]] | longer[asked.rejected[rows]]
    by_worker = Counter(workers[worker] for worker in asked.worker[rows[over]].tolist())
    rows = rows[~over]
    told: dict[str, Any] = {"over_long": int(over.sum()), "over_long_by_worker": dict(sorted(by_worker.items()))}
    if len(rows) >= settings.batch_size:
        told |= train_on(asked, rows, tokens, settings, out, global_reward)
        _write_scores(asked, tokens, tokenizer, settings, out, keep_states)
    else:
        few = f"{len(rows)} training comparisons, fewer than a batch of {settings.batch_size}"
        if global_reward is None:
            raise BadData(
                f"{comparisons}: {few}, are left to train a reward adapter on, without {told['over_long']} with a side of more "
                "than reward.max_tokens. Raise that, or lower reward.batch_size."
            )
        for name in (*PEFT_FILES, ADAPTER_FILE, SCORES_FILE):
            shutil.copyfile(global_reward / name, out / name)
        told |= {"served_by": f"the global adapter: there are {few}", "steps": 0, "curve": []}
    tokenizer.save_pretrained(out)
    told |= {"adapter_validation_log_loss": _held_out(out, asked), "adapter_scale": ScoredResponses.load(out).scale}
    if global_reward is not None:
        told["adapter_global_validation_log_loss"] = _held_out(global_reward, asked)
    return told


def train_on(
    asked: TextComparisons,
    rows: Array,
    tokens: Sequence[Array],
    settings: RewardSettings,
    out: Path,
    start: Path | None = None,
    joint: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """Train on `rows`, in a folder of checkpoints that outlives a kill, and write what PEFT saves to `out`.

    Args:
        asked, rows: the comparisons, and which of them count.
        tokens: of the responses.
        settings: of the training.
        out: folder to write to.
        start: folder of the adapter to start from; None: a new one.
        joint: contracts.JOINT_TENSORS, where embeddings are learned together with the adapter.

    Returns:
        adapter_train_log_loss, steps, curve: as of train_adapter.
    """
    from coterie.rewards.launch import Job, processes, train
    from coterie.rewards.trainer import curve, last_checkpoint

    together = processes(settings)
    shared = os.environ.get("COTERIE_CHECKPOINTS")
    root = Path(shared) if shared else out.parent / ".checkpoints"
    checkpoints = root / _key(asked, rows, settings, start, joint or {}, together)
    asked.write(checkpoints / "examples.arrow", rows, tokens)
    if joint is not None:
        with replacing(checkpoints / JOINT_FILE) as temporary:
            save_file(dict(joint), temporary)
    batches = math.ceil(math.ceil(len(rows) / (settings.batch_size * together)) / settings.accumulation)
    steps = math.ceil(settings.epochs * batches)
    job = Job(
        settings=settings,
        examples=checkpoints / "examples.arrow",
        steps=min(steps, settings.max_steps or steps),
        start=start,
        pull=settings.pull / float(asked.weight[rows].sum()),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        checkpoints=checkpoints,
    )
    train(job, together)
    last = last_checkpoint(checkpoints)
    assert last is not None
    for name in PEFT_FILES:
        shutil.copyfile(last / name, out / name)
    drawn = curve(last)
    shutil.rmtree(checkpoints)
    if not shared:
        with suppress(OSError):  # another coterie's are there
            root.rmdir()
    tail = drawn[-math.ceil(len(drawn) / 10) :]
    return {"adapter_train_log_loss": float(np.mean([nats for _, nats in tail])), "steps": job.steps, "curve": drawn}


def _key(
    asked: TextComparisons,
    rows: Array,
    settings: RewardSettings,
    start: Path | None,
    joint: Mapping[str, Array],
    processes: int,
) -> str:
    """A digest of all that shapes a training: no other one goes on from its checkpoints."""
    device = device_of(settings.device)
    made_of = {
        "settings": settings.model_dump(mode="json"),
        "revision": revision_of(backbone_source(settings.backbone), settings.revision, None),
        "device": [device, dtype_of(settings.dtype, device), processes],
        "versions": [version(package) for package in ("torch", "transformers", "trl", "peft", "accelerate")],
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for side in (asked.chosen, asked.rejected):
        digest.update("".join(asked.response_ids[side[rows]]).encode())
    for values in (asked.label[rows], asked.weight[rows], asked.reliability[rows], *joint.values()):
        digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
    if start is not None:
        digest.update((start / ADAPTER_WEIGHTS).read_bytes())
    return digest.hexdigest()[:24]


def _write_scores(
    asked: TextComparisons,
    tokens: Sequence[Array],
    tokenizer: Any,
    settings: RewardSettings,
    out: Path,
    keep_states: bool,
) -> None:
    """Score what is held out and the reference responses by the adapter in `out`; scores.parquet and adapter.json."""
    model, revision = trained_model(settings, tokenizer, out)
    held, reference = np.flatnonzero(asked.split != TRAIN), asked.reference
    scored = np.unique(np.concatenate([asked.chosen[held], asked.rejected[held], reference]))
    read = np.arange(len(tokens)) if keep_states else scored
    states = last_states(model, [tokens[row] for row in read.tolist()])
    if keep_states:
        STATE.write(out / STATES_FILE, {"response_id": asked.response_ids, "state": states}, state=states.shape[1])
    raw = np.full(len(tokens), np.nan)
    raw[read] = states @ score_weight(out)
    validation = asked.counted(VALIDATION)
    margin = raw[asked.chosen[validation]] - raw[asked.rejected[validation]]
    # The margins are calibrated as the one feature of a head.
    head = RewardHead(np.ones(1)).calibrated(margin[:, None], asked.label[validation], asked.weight[validation])
    SCORE.write(out / SCORES_FILE, {"response_id": asked.response_ids[scored], "score": raw[scored]})
    told = {
        "backbone": settings.backbone,
        "revision": revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_tokens": settings.max_tokens,
        "center": float(raw[reference].mean()),
        "scale": head.scale,
    }
    write_text(out / ADAPTER_FILE, json.dumps(told, indent=1))


def trained_model(settings: RewardSettings, tokenizer: Any, adapter: Path | None) -> tuple[Any, str]:
    """The backbone on its device, with the adapter in a folder where one is given, to read from; and its revision."""
    from peft import PeftModel

    device = device_of(settings.device)
    model, revision = load_model(
        settings.backbone, settings.revision, reading_dtype(settings.dtype, device), tokenizer.pad_token_id
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    return model.to(device).eval(), revision


def _held_out(folder: Path, asked: TextComparisons) -> float:
    """Log-loss of an adapter on the validation comparisons that count, before it is scaled, as that of the training."""
    rows = asked.counted(VALIDATION)
    if not len(rows):
        return float("nan")
    raw = ScoredResponses.load(folder).raw.reindex(asked.response_ids).to_numpy()
    margin = raw[asked.chosen[rows]] - raw[asked.rejected[rows]]
    return mean_loss(asked.reliability[rows] * margin, asked.label[rows], asked.weight[rows])
