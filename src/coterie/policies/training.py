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


def trainer_arguments(config: Any, settings: AlignSettings, folder: Path, **own: Any) -> Any:
    """Arguments of a trainer, of its `config` class; `folder` is for what it writes, which is nothing that is kept."""
    device = device_of(settings.device)
    shared = {
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
    arguments = config(**shared | own)
    # Of several GPUs in one process transformers would make a DataParallel, which cannot generate.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def lora(settings: AlignSettings) -> LoraConfig:
    """The adapter that is trained: of every linear layer, without dropout, which would blur the ratios of PPO."""
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


class LimitReached(Exception):
    """The policy went further from its start than it may; never leaves `run`."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Draws the progress bar and keeps the curve; stops where a loss is not finite.

    Attributes:
        curve: figures of each step.
    """

    def __init__(self, method: str, steps: int, learning_rate: float) -> None:
        self.curve: list[dict[str, float]] = []
        self._method, self._steps, self._learning_rate = method, steps, learning_rate
        self._bar = progress(total=steps, desc=method, unit="updates")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # not the summary at the end
            self._check(state.global_step, logs["loss"], logs["grad_norm"])
            self.curve.append({"step": state.global_step, "loss": logs["loss"]})

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def _check(self, step: int, *figures: float) -> None:
        if not all(map(math.isfinite, figures)):
            raise RunFailed(
                f"{self._method}: the loss is not finite any more at update {step} of {self._steps} (learning rate "
                f"{self._learning_rate:g}). Lower align.learning_rate, or raise align.batch_size."
            )


class PolicyWatch(Watch):
    """Rewards what is sampled, keeps the last policies, and stops a run that goes too far from its start.

    The divergence of an update is measured on the answers it samples, so it is that of the policy before the update. Two
    updates in a row beyond the limit end the run.

    Attributes:
        curve: of each update step, reward, normalised, length, finished, kl and entropy, as `align` returns them.
        kept: updates after which the policy was within the limit.
    """

    def __init__(self, settings: AlignSettings, reward: NormalisedReward, tokenizer: Any) -> None:
        super().__init__(settings.method, settings.steps, settings.learning_rate)
        self.kept = 0
        self._limit, self._reward, self._tokenizer = settings.kl_limit, reward, tokenizer
        self._adapter: Any = None
        self._states: dict[int, dict[str, Any]] = {}
        self._sampled: dict[str, float] = {}

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
        super().on_step_end(args, state, control)
        self._states[state.global_step] = self._state()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        step = state.global_step
        if "objective/kl" in logs:  # PPO: sums over a response
            kl, entropy = logs["objective/kl"], logs["objective/entropy"] / self._sampled["length"]
            self._check(step, kl, logs["loss/policy_avg"], logs["loss/value_avg"])
        elif "loss" in logs:  # GRPO and RLOO: means of a token
            kl, entropy = logs["kl"] * logs["completions/mean_length"], logs["entropy"]
            self._check(step, kl, logs["loss"], logs["grad_norm"])
        else:
            return
        self.curve.append({"step": step, **self._sampled, "kl": kl, "entropy": entropy})
        if kl <= self._limit:
            self.kept = step - 1
        elif self.kept < step - 2:  # once may be chance: the answers of one update are few
            raise LimitReached(
                f"the policy before update {step} was {kl:.1f} nats a response from its start, the second in a row with "
                f"more than align.kl_limit = {self._limit:g}"
            )
        self._states = {at: state for at, state in self._states.items() if at >= self.kept}

    def _state(self) -> dict[str, Any]:
        state = get_peft_model_state_dict(self._adapter, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def run(trainer: Any, watch: Watch) -> str | None:
    """Train, and say why it stopped early, or None. Raises RunFailed: a loss or a reward is not finite."""
    trainer.remove_callback(PrinterCallback)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TRL's own remarks
            trainer.train()
    except LimitReached as reached:
        return str(reached)
    finally:
        watch.close()
    return None
