"""What TRL's trainers have in common here: their arguments, and what is watched while they run."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback

from coterie.backbones import device_of, dtype_of
from coterie.config import AlignSettings
from coterie.errors import RunFailed
from coterie.policies.policy import read_answer
from coterie.policies.reward import Array, NormalisedReward
from coterie.progress import progress


def trainer_arguments(settings: AlignSettings, folder: Path) -> dict[str, Any]:
    """Arguments of every trainer. `folder` is for what it writes, which is nothing that is kept."""
    device = device_of(settings.device)
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": settings.seed,
        "use_cpu": device == "cpu",
        "bf16": dtype_of(settings.dtype, device) == "bfloat16",
        "gradient_checkpointing": device != "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide the losses that Watch looks for
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora(settings: AlignSettings) -> LoraConfig:
    """The adapter that is trained: of every linear layer, without dropout, which would blur the ratios of PPO."""
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


class LimitReached(Exception):
    """The policy went further from its start than it may; never leaves `run`."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Draws the progress bar, keeps the curve, and stops a run that diverges.

    The divergence of an update is measured on the answers it samples, so it is that of the policy before the update.
    """

    def __init__(self, settings: AlignSettings, reward: NormalisedReward, tokenizer: Any) -> None:
        self.curve: list[dict[str, float]] = []
        self.kept = 0  # updates after which the policy was within the limit
        self._settings, self._reward, self._tokenizer = settings, reward, tokenizer
        self._adapter: Any = None
        self._states: dict[int, dict[str, Any]] = {}
        self._sampled: dict[str, float] = {}
        self._bar = progress(total=settings.steps, desc=settings.method, unit="updates")

    def follow(self, adapter: Any) -> None:
        """Watch this PeftModel."""
        self._adapter = adapter
        self._states = {0: self._state()}

    def restore(self) -> None:
        """Set the adapter to what it was after `kept` updates."""
        set_peft_model_state_dict(self._adapter, self._states[self.kept])

    def earn(self, prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> Array:
        """Normalised rewards [n] of the answers that an update sampled, as token ids."""
        answers = [read_answer(self._tokenizer, row) for row in ids]
        earned = self._reward(prompts, answers)
        self._sampled = {
            "reward": float(earned.raw.mean()),
            "normalised": float(earned.normalised.mean()),
            "length": float(np.mean([len(row) for row in ids])),
            "finished": float(np.mean([answer.finished for answer in answers])),
        }
        return earned.normalised

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._states[state.global_step] = self._state()
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not {"loss", "objective/kl"} & logs.keys():
            return  # the summary at the end
        step, length = int(state.global_step), self._sampled["length"]
        if "objective/kl" in logs:  # PPO: sums over a response
            kl, entropy = logs["objective/kl"], logs["objective/entropy"] / length
            losses = [logs["loss/policy_avg"], logs["loss/value_avg"]]
        else:  # GRPO and RLOO: means of a token
            kl, entropy = logs["kl"] * logs["completions/mean_length"], logs["entropy"]
            losses = [logs["loss"], logs["grad_norm"]]
        if not all(map(math.isfinite, [kl, *losses])):
            raise RunFailed(
                f"{self._settings.method}: the loss is not finite any more at update {step} of {self._settings.steps} "
                f"(learning rate {self._settings.learning_rate}). Lower align.learning_rate, or raise align.batch_size."
            )
        self.curve.append({"step": step, **self._sampled, "kl": kl, "entropy": entropy})
        if kl > self._settings.kl_limit:
            raise LimitReached(
                f"the policy before update {step} was {kl:.1f} nats a response from its start, more than "
                f"align.kl_limit = {self._settings.kl_limit:g}"
            )
        self.kept = step - 1
        self._states = {at: kept for at, kept in self._states.items() if at >= self.kept}

    def _state(self) -> dict[str, Any]:
        state = get_peft_model_state_dict(self._adapter, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()


def run(trainer: Any, watch: Watch) -> str | None:
    """Train, and say why it stopped early. Raises RunFailed: the loss is not finite."""
    trainer.remove_callback(PrinterCallback)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TRL's own remarks
            trainer.train()
    except LimitReached as reached:
        return str(reached)
    finally:
        watch.close()
    return None
