"""Reward adapters: LoRA and a head on a backbone, a global one and one a coterie that starts from it (docs/method, section 6).

As of linear heads, a score is scale * (raw - center): the centre makes an average response score zero, and the scale makes
sigmoid(score difference) the calibrated probability of a worker of the adapter's audience.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from coterie.backbones import device_of, dtype_of
from coterie.contracts import (
    ADAPTER_FILE,
    write_text,
)
from coterie.discovery.votes import Array
from coterie.errors import BadBundle
from coterie.rewards.backbone import last_states, load_model, load_tokenizer, tokenized

# PEFT's names.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
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

        told = {name: read_adapter(folder) | {"weight": score_weight(folder)} for name, folder in folders.items()}
        backbones = {(one["backbone"], one["revision"]) for one in told.values()}
        if len(backbones) != 1:
            raise BadBundle(
                f"{', '.join(map(str, folders.values()))}: not adapters of one backbone. Train them together."
            )
        (backbone, revision), place = backbones.pop(), device_of(device)
        tokenizer = load_tokenizer(str(next(iter(folders.values()))), revision)
        if dtype == "auto":
            dtype = reading_dtype(next(iter(told.values())).get("dtype", dtype), place)
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


def reading_dtype(trained: str, device: str) -> str:
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
    told = read_adapter(source) | {"center": center, "scale": scale}
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


def read_adapter(folder: Path) -> dict[str, Any]:
    """What adapter.json says. Raises BadBundle: there is none that can be read."""
    try:
        told: dict[str, Any] = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadBundle(f"{folder}: no readable {ADAPTER_FILE} ({error}). Fetch or make the bundle again.") from error
    return told
