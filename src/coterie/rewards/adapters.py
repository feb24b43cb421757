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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

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
from coterie.errors import BadBundle, BadConfiguration, BadData
from coterie.rewards.backbone import last_states, load_model, load_tokenizer, tokenized
from coterie.rewards.examples import TextComparisons
from coterie.rewards.heads import RewardHead, mean_loss
from coterie.rewards.scored import ScoredResponses, has_adapter

# PEFT's names.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = _PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
HEAD_WEIGHT = "base_model.model.score.weight"
_ALONE = 8  # responses for which LoRA weights get batches of their own


class AdapterRewards:
    """Rewards that are adapters of one backbone, which is held once; make one with `load`.

    The heads of rewards that share their LoRA weights read the same hidden states.
    """

    def __init__(
        self, model: Any, tokenizer: Any, told: Mapping[str, Mapping[str, Any]], reads: Mapping[str, str]
    ) -> None:
        self._model, self._tokenizer, self._told = model, tokenizer, told
        self._reads = reads  # of each reward, the name under which the model has its LoRA
        self._lock = threading.Lock()  # which adapter is active is a state of the model

    @classmethod
    def load(cls, folders: Mapping[str, Path], device: str = "auto", dtype: str = "auto") -> Self:
        """Load the rewards in `folders`, by name, onto one backbone; dtype auto: that in which they were scored, and float32 on a CPU.

        Raises:
            BadBundle: not adapters of one backbone, or it is another revision than they were trained on.
            BadConfiguration: the backbone cannot be loaded, or there is no such device.
        """
        from peft import PeftModel

        told = {name: _told(folder) | {"weight": score_weight(folder)} for name, folder in folders.items()}
        backbones = {(one["backbone"], one["revision"]) for one in told.values()}
        if len(backbones) != 1:
            raise BadBundle(
                f"{', '.join(map(str, folders.values()))}: not adapters of one backbone. Train them together."
            )
        (backbone, revision), place = backbones.pop(), device_of(device)
        tokenizer = load_tokenizer(str(next(iter(folders.values()))), revision)
        if dtype == "auto":
            dtype = _reading(next(iter(told.values())).get("dtype", dtype), place)
        model, found = load_model(backbone, revision, dtype_of(dtype, place), tokenizer.pad_token_id)
        if found != revision:
            raise BadBundle(
                f"adapters of {backbone} at revision {revision}; here it is at {found}. Install that revision, or train the "
                "rewards again."
            )
        first: dict[str, str] = {}
        reads = {name: first.setdefault(_lora_digest(folder), name) for name, folder in folders.items()}
        for name in first.values():
            if name == next(iter(folders)):
                model = PeftModel.from_pretrained(model, str(folders[name]), adapter_name=name)
            else:
                model.load_adapter(str(folders[name]), name)
        return cls(model.to(place).eval(), tokenizer, told, reads)

    @property
    def exact(self) -> bool:
        """Whether scores come out as where the adapters were made: in float32 there and here."""
        dtypes = {one.get("dtype", "float32") for one in self._told.values()}
        return {*dtypes, str(self._model.dtype).removeprefix("torch.")} == {"float32"}

    def states(
        self, prompts: Sequence[str], responses: Sequence[str], wanted: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Hidden states [n, hidden] of responses by reward, one pass of a response for those that share their LoRA weights.

        Args:
            prompts, responses: [n].
            wanted: by reward, which of the responses [n] bool it is asked about; the others come out NaN. Default: all.
        """
        if wanted is None:
            wanted = dict.fromkeys(self._told, np.ones(len(prompts), dtype=bool))
        asked: dict[str, Array] = {}
        for name, rows in wanted.items():
            lora = self._reads[name]
            asked[lora] = asked.get(lora, False) | rows
        by_lora: dict[str, Array] = {}
        for together in _batched({lora: int(rows.sum()) for lora, rows in asked.items()}):
            tokens, loras = [], []
            for lora in together:
                at = np.flatnonzero(asked[lora]).tolist()
                asks, answers = ([of[row] for row in at] for of in (prompts, responses))
                tokens += tokenized(self._tokenizer, asks, answers, self._told[lora]["max_tokens"])[0]
                loras += [lora] * len(at)
            with self._lock, self._mixed(loras) as forward:
                read = last_states(self._model.get_base_model(), tokens, forward)
            of_row = np.array(loras)
            for lora in together:
                by_lora[lora] = np.full((len(prompts), read.shape[1]), np.nan, dtype=read.dtype)
                by_lora[lora][asked[lora]] = read[of_row == lora]
        return {name: by_lora[self._reads[name]] for name in wanted}

    @contextmanager
    def _mixed(self, loras: Sequence[str]) -> Iterator[Callable[..., Any]]:
        """What `last_states` takes as forward for rows with these LoRA weights [n]: PEFT runs a batch of several in one pass."""
        model, classifier = self._model, self._model.get_base_model()
        seen: list[Any] = []
        backbone = getattr(classifier, classifier.base_model_prefix)
        hook = backbone.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))

        def forward(rows: Sequence[int], **inputs: Any) -> Any:
            names = [loras[row] for row in rows]
            if len(set(names)) == 1:
                model.set_adapter(names[0])
                backbone(**inputs, use_cache=False)
            else:  # the heads, which are read elsewhere, come along
                model(**inputs, use_cache=False, adapter_names=names)
            return seen.pop()

        try:
            yield forward
        finally:
            hook.remove()

    def of_states(self, states: Mapping[str, Array]) -> dict[str, Array]:
        """Calibrated scores [n] by each reward of what `states` gives."""
        told = {name: self._told[name] for name in states}
        return {name: one["scale"] * (states[name] @ one["weight"] - one["center"]) for name, one in told.items()}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Array]:
        """Calibrated scores [n] of responses by each reward. The composition of a batch does not matter."""
        return self.of_states(self.states(prompts, responses))


def _batched(responses: Mapping[str, int]) -> list[list[str]]:
    """Which LoRA weights share their batches, by the number of responses of each: mixing costs a sixth more, few a pass more."""
    alone = [[lora] for lora, number in responses.items() if number >= _ALONE]
    mixed = [lora for lora, number in responses.items() if number < _ALONE]
    return [*alone, mixed] if mixed else alone


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
        told |= train_on(asked, rows, tokens, settings, out, global_reward)
        _write_scores(asked, tokens, tokenizer, settings, out, keep_states)
    else:
        few = f"{len(rows)} training comparisons, fewer than a batch of {settings.batch_size}"
        if global_reward is None:
            raise BadData(
                f"{comparisons}: {few}, are left to train a reward adapter on, without {told['over_long']} with a side of more "
                "than reward.max_tokens. Raise that, or lower reward.batch_size."
            )
        for name in (*_PEFT_FILES, ADAPTER_FILE, SCORES_FILE):
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
    for name in _PEFT_FILES:
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
        settings.backbone, settings.revision, _reading(settings.dtype, device), tokenizer.pad_token_id
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


def _reading(trained: str, device: str) -> str:
    """The dtype in which scores are read: bfloat16 loses a good part of them, and saves a CPU hardly any time."""
    return "float32" if device == "cpu" else dtype_of(trained, device)


def score_weight(folder: Path) -> Array:
    """The head [hidden] of the adapter in `folder`, float64. Raises BadBundle: there is none."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "numpy") as file:
            weight: Array = file.get_tensor(HEAD_WEIGHT)[0].astype(np.float64)
    except (OSError, SafetensorError) as error:
        raise BadBundle(f"{folder}: no reward adapter ({error}). Fetch or make the bundle again.") from error
    return weight


def write_with_head(weight: Array, source: Path, out: Path, center: float, scale: float) -> None:
    """Write to `out` the adapter in `source` with another head [hidden], its tokenizer and adapter.json."""
    told = _told(source) | {"center": center, "scale": scale}
    tensors = load_file(source / ADAPTER_WEIGHTS) | {HEAD_WEIGHT: np.ascontiguousarray(weight[None], np.float32)}
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(source / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    load_tokenizer(str(source), told["revision"]).save_pretrained(out)
    write_text(out / ADAPTER_FILE, json.dumps(told, indent=1))


def _lora_digest(folder: Path) -> str:
    """What adapters that differ in their head alone have in common."""
    digest = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes())
    with safe_open(folder / ADAPTER_WEIGHTS, "numpy") as file:
        for name in sorted(set(file.keys()) - {HEAD_WEIGHT}):
            digest.update(name.encode() + file.get_tensor(name).tobytes())
    return digest.hexdigest()


def _told(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadBundle(f"{folder}: no readable {ADAPTER_FILE} ({error}). Fetch or make the bundle again.") from error
    return told
