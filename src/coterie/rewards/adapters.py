"""Reward adapters: LoRA and a head on a backbone, a global one and one a coterie that starts from it (docs/method, section 6).

As of linear heads, a score is scale * (raw - center): the centre makes an average response score zero, and the scale makes
sigmoid(score difference) the calibrated probability of a worker of the adapter's audience.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

from coterie.backbones import backbone_source, device_of, dtype_of, revision_of
from coterie.config import RewardSettings
from coterie.contracts import ADAPTER_FILE, SCORE, SCORES_FILE, TRAIN, VALIDATION, write_text
from coterie.discovery.votes import Array
from coterie.errors import BadBundle, BadConfiguration, BadData
from coterie.progress import progress
from coterie.rewards.backbone import load_model, load_tokenizer, tokenized
from coterie.rewards.examples import TextComparisons
from coterie.rewards.heads import RewardHead, mean_loss
from coterie.rewards.scored import ScoredResponses, has_adapter

_BATCH, _UNWATCHED = 32, 4  # responses scored at a time; batches of a request, which is worth no progress bar
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterRewards:
    """Rewards that are adapters of one backbone, which is held once; make one with `load`."""

    def __init__(self, model: Any, tokenizer: Any, told: Mapping[str, Mapping[str, Any]]) -> None:
        self._model, self._tokenizer, self._told = model, tokenizer, told
        self._lock = threading.Lock()  # which adapter is active is a state of the model

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: str = "auto", dtype: str = "auto") -> Self:
        """Load the rewards in `folders`, by name, onto one backbone.

        Raises:
            BadBundle: not adapters of one backbone, or it is another revision than they were trained on.
            BadConfiguration: the backbone cannot be loaded, or there is no such device.
        """
        from peft import PeftModel

        told = {name: _told(folder) for name, folder in folders.items()}
        backbones = {(one["backbone"], one["revision"]) for one in told.values()}
        if len(backbones) != 1:
            raise BadBundle(
                f"{', '.join(map(str, folders.values()))}: not adapters of one backbone. Train them together."
            )
        (backbone, revision), place = backbones.pop(), device_of(device)
        tokenizer = load_tokenizer(str(next(iter(folders.values()))), revision)
        model, found = load_model(backbone, revision, dtype_of(dtype, place), tokenizer.pad_token_id)
        if found != revision:
            raise BadBundle(
                f"adapters of {backbone} at revision {revision}; here it is at {found}. Install that revision, or train the "
                "rewards again."
            )
        for name, folder in folders.items():
            if name == next(iter(folders)):
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), name)
        return cls(model.to(place).eval(), tokenizer, told)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Array]:
        """Calibrated scores [n] of responses by each reward. The composition of a batch does not matter."""
        scores = {}
        for name, told in self._told.items():
            tokens, _ = tokenized(self._tokenizer, prompts, responses, told["max_tokens"])
            with self._lock:
                self._model.set_adapter(name)
                raw = raw_scores(self._model, tokens)
            scores[name] = told["scale"] * (raw - told["center"])
        return scores


def raw_scores(model: Any, tokens: Sequence[Array]) -> Array:
    """Scores [n] of token ids by the active adapter of a PeftModel, before center and scale."""
    import torch

    classifier, device = model.get_base_model(), model.device
    backbone = getattr(classifier, classifier.base_model_prefix)
    scores = np.empty(len(tokens))
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=classifier.dtype == torch.bfloat16)
    starts: Any = range(0, len(order), _BATCH)
    with torch.inference_mode():
        for start in progress(starts, desc="scores", unit="batches") if len(starts) > _UNWATCHED else starts:
            rows = order[start : start + _BATCH].tolist()
            lengths = torch.tensor([len(tokens[row]) for row in rows])
            # Padding on the right: under causal attention no token sees what is behind it.
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for line, row in zip(ids, rows, strict=True):
                line[: len(tokens[row])] = torch.from_numpy(tokens[row])
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            with bfloat16:
                hidden = backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
            last = hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)]
            scores[rows] = classifier.score(last.float()).squeeze(-1).cpu().numpy()
    return scores


def train_adapter(
    embedded: Path,
    comparisons: Path,
    out: Path,
    settings: RewardSettings,
    workers: Sequence[str],
    audience: Array,
    reliability: Array,
    global_reward: Path | None = None,
) -> dict[str, Any]:
    """Train an adapter and write it to `out`, with its tokenizer, adapter.json and scores.parquet.

    Args:
        embedded, comparisons, audience, reliability: as of TextComparisons.read.
        out: folder to write to.
        settings: the stage's settings.
        workers: ids [n_workers].
        global_reward: folder of the global reward, whose adapter a coterie's starts from and is pulled towards; None:
            train the global one.

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
        not has_adapter(global_reward) or _told(global_reward)["backbone"] != settings.backbone
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
        told |= _train(asked, rows, tokens, tokenizer, settings, global_reward, out)
    else:
        few = f"{len(rows)} training comparisons, fewer than a batch of {settings.batch_size}"
        if global_reward is None:
            raise BadData(f"{comparisons}: {few}, are left to train a reward adapter on. Lower reward.batch_size.")
        for name in (*_PEFT_FILES, ADAPTER_FILE, SCORES_FILE):
            shutil.copyfile(global_reward / name, out / name)
        told |= {"served_by": f"the global adapter: there are {few}", "steps": 0, "curve": []}
    tokenizer.save_pretrained(out)
    told |= {"adapter_validation_log_loss": _held_out(out, asked), "adapter_scale": ScoredResponses.load(out).scale}
    if global_reward is not None:
        told["adapter_global_validation_log_loss"] = _held_out(global_reward, asked)
    return told


def _train(
    asked: TextComparisons,
    rows: Array,
    tokens: Sequence[Array],
    tokenizer: Any,
    settings: RewardSettings,
    start: Path | None,
    out: Path,
) -> dict[str, Any]:
    """Train on `rows`, in a folder of checkpoints that outlives a kill, and write what the adapter is and scores."""
    from coterie.rewards.launch import Job, processes, train
    from coterie.rewards.trainer import curve, last_checkpoint

    together = processes(settings)
    shared = os.environ.get("COTERIE_CHECKPOINTS")
    root = Path(shared) if shared else out.parent / ".checkpoints"
    checkpoints = root / _key(asked, rows, settings, start, together)
    asked.write(checkpoints / "examples.arrow", rows, tokens)
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
    for name in _PEFT_FILES:
        shutil.copyfile(last / name, out / name)
    drawn = curve(last)
    _write_scores(asked, tokens, tokenizer, settings, out)
    shutil.rmtree(checkpoints)
    if not shared:
        with suppress(OSError):  # another coterie's are there
            root.rmdir()
    tail = drawn[-math.ceil(len(drawn) / 10) :]
    return {"adapter_train_log_loss": float(np.mean([nats for _, nats in tail])), "steps": job.steps, "curve": drawn}


def _key(asked: TextComparisons, rows: Array, settings: RewardSettings, start: Path | None, processes: int) -> str:
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
    for values in (asked.label, asked.weight, asked.reliability):
        digest.update(np.ascontiguousarray(values[rows], dtype=np.float64).tobytes())
    if start is not None:
        digest.update((start / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()[:24]


def _write_scores(
    asked: TextComparisons, tokens: Sequence[Array], tokenizer: Any, settings: RewardSettings, out: Path
) -> None:
    """Score what is held out and the reference responses by the adapter in `out`; scores.parquet and adapter.json."""
    from peft import PeftModel

    device = device_of(settings.device)
    model, revision = load_model(
        settings.backbone, settings.revision, dtype_of(settings.dtype, device), tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(model, str(out)).to(device).eval()
    held, reference = np.flatnonzero(asked.split != TRAIN), asked.reference
    scored = np.unique(np.concatenate([asked.chosen[held], asked.rejected[held], reference]))
    raw = np.full(len(tokens), np.nan)
    raw[scored] = raw_scores(model, [tokens[row] for row in scored])
    validation = asked.counted(VALIDATION)
    margin = raw[asked.chosen[validation]] - raw[asked.rejected[validation]]
    # The margins are calibrated as the one feature of a head.
    head = RewardHead(np.ones(1)).calibrated(margin[:, None], asked.label[validation], asked.weight[validation])
    SCORE.write(out / SCORES_FILE, {"response_id": asked.response_ids[scored], "score": raw[scored]})
    told = {
        "backbone": settings.backbone,
        "revision": revision,
        "max_tokens": settings.max_tokens,
        "center": float(raw[reference].mean()),
        "scale": head.scale,
    }
    write_text(out / ADAPTER_FILE, json.dumps(told, indent=1))


def _held_out(folder: Path, asked: TextComparisons) -> float:
    """Log-loss of an adapter on the validation comparisons that count, before it is scaled, as that of the training."""
    rows = asked.counted(VALIDATION)
    if not len(rows):
        return float("nan")
    raw = ScoredResponses.load(folder).raw.reindex(asked.response_ids).to_numpy()
    margin = raw[asked.chosen[rows]] - raw[asked.rejected[rows]]
    return mean_loss(asked.reliability[rows] * margin, asked.label[rows], asked.weight[rows])


def _told(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadBundle(f"{folder}: no readable {ADAPTER_FILE} ({error}). Fetch or make the bundle again.") from error
    return told
