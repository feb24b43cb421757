"""The trainer of reward adapters: TRL's, with the weights of the comparisons and the pull towards the start.

The loss of a comparison n is w_n * H(y_n, sigmoid(beta_n * (r(chosen) - r(rejected)))) + pull / 2 * |phi - phi_start|^2, in
nats: the objective of the linear heads (rewards/heads.py) over an adapter phi. Where a job's folder of checkpoints holds
contracts.JOINT_FILE, r is (theta + U a_i) . h of the worker i, and the loss has the prior |a_i|^2 / 2 of all workers as well:
heads theta and U, embeddings a_i and LoRA are learned together (rewards/joint.py). Importing this module imports TRL.

    torchrun --nproc-per-node N -m coterie.rewards.trainer JOB.json
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import sort_checkpoints
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from coterie.backbones import backbone_source, device_of, dtype_of
from coterie.contracts import JOINT_FILE
from coterie.errors import CoterieError, RunFailed
from coterie.progress import progress
from coterie.rewards.backbone import load_model, load_tokenizer
from coterie.rewards.launch import Job, OutOfMemory, leave_failure

_STATE = "trainer_state.json"  # what a checkpoint gets last
_POINTS = 100  # of the curve


def fit(job: Job) -> None:
    """Train until the last checkpoint is that of the last step, from the last one that is there.

    Raises:
        OutOfMemory: the device's memory does not hold a batch.
        RunFailed: the loss is not finite, or the disk is full.
        BadConfiguration: the backbone cannot be loaded.
    """
    last = last_checkpoint(job.checkpoints)
    if last is not None and _state(last)["global_step"] >= job.steps:
        return
    problem = None
    with closing(_Watch(job)) as watch:
        try:
            _trainer(job, watch).train(resume_from_checkpoint=None if last is None else str(last))
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = _in_words(job, error)
            if problem is None:
                raise
    # Only here does nothing hold on to the tensors of the frames that an error went through.
    gc.collect()
    torch.cuda.empty_cache()
    if problem is not None:
        raise problem


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is complete; a process that was killed may have left one that is not."""
    return next((Path(path) for path in reversed(sort_checkpoints(str(folder))) if _state(Path(path))), None)


def curve(checkpoint: Path) -> list[list[float]]:
    """[step, mean training log-loss since the step before] of the training that led to a checkpoint."""
    history = _state(checkpoint)["log_history"]
    return [[entry["step"], entry["log_loss"]] for entry in history if "log_loss" in entry]


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


class _Trainer(RewardTrainer):  # type: ignore[misc]
    """TRL's RewardTrainer with another loss, of comparisons as `launch.Job` describes them."""

    loss_is_scaled_for_ga = True  # by compute_loss, so that a comparison counts the same in whatever batch it comes

    def __init__(self, job: Job, **arguments: Any) -> None:
        super().__init__(**arguments)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._pulled = [(p, p.detach().clone()) for p in trained] if job.start and job.pull else []
        self._pull, self._step_size = job.pull, job.batch_size * job.accumulation
        self._nats = torch.zeros(2, device=self.accelerator.device)  # weighted sum since the last log, and its weight

    def margins(self, difference: torch.Tensor, worker: torch.Tensor) -> torch.Tensor:
        """r(chosen) - r(rejected), [n], of what the heads say [n, 1]."""
        return difference.squeeze(-1)

    def prior(self) -> Any:
        """Minus the log-density of the weights under their prior, a comparison."""
        return self._pull / 2 * sum((now - start).square().sum() for now, start in self._pulled)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        label, weight, reliability, worker = (inputs.pop(name) for name in _EXTRA)
        chosen, rejected = model(**inputs, use_cache=False).logits.float().chunk(2)
        margins = reliability * self.margins(chosen - rejected, worker)
        nats = binary_cross_entropy_with_logits(margins, label, reduction="none")
        self._nats += torch.stack([weight @ nats, weight.sum()]).detach()
        return (weight @ nats + len(nats) * self.prior()) / self._step_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            nats, weight = self.accelerator.reduce(self._nats).tolist()
            logs["log_loss"] = nats / weight
            self._nats.zero_()
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """TRL tells its makers about every run."""


class _JointTrainer(_Trainer):
    """Of r + 1 heads and the workers' embeddings. The pull is towards the heads and the LoRA that training starts from."""

    def __init__(self, job: Job, **arguments: Any) -> None:
        super().__init__(job, **arguments)
        self._head = next(
            module for module in self.model.modules() if isinstance(module, JointHead) and module.weight.requires_grad
        )
        trained = [p for p in self.model.parameters() if p.requires_grad and p is not self._head.embeddings]
        self._pulled = [(p, p.detach().clone()) for p in trained] if job.pull else []
        self._prior = float(load_file(job.checkpoints / JOINT_FILE)["prior"])

    def margins(self, difference: torch.Tensor, worker: torch.Tensor) -> torch.Tensor:
        return difference[:, 0] + (difference[:, 1:] * self._head.places[worker]).sum(-1)

    def prior(self) -> Any:
        return super().prior() + self._prior / 2 * self._head.places.square().sum()


class JointHead(torch.nn.Linear):  # type: ignore[misc]
    """The r + 1 heads in place of the one, and the embeddings beside them: PEFT trains and saves both as the head's.

    Attributes:
        embeddings: [n_workers, r], divided by _PACE.
    """

    def __init__(self, heads: torch.Tensor, embeddings: torch.Tensor) -> None:
        super().__init__(heads.shape[1], heads.shape[0], bias=False)
        self.weight.data = heads.clone()
        self.embeddings = torch.nn.Parameter(embeddings / _PACE)

    @property
    def places(self) -> torch.Tensor:
        """The embeddings a_i, [n_workers, r]."""
        return self.embeddings * _PACE


_PACE = 30.0  # Adam moves what is of size 1, and seen by few comparisons, this much faster than a weight of the LoRA
_EXTRA = {"label": torch.float32, "weight": torch.float32, "reliability": torch.float32, "worker": torch.long}


class _Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's, which drops what its loss does not know."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        extra = {name: torch.tensor([row[name] for row in examples], dtype=kind) for name, kind in _EXTRA.items()}
        batch: dict[str, Any] = super().torch_call(examples) | extra
        return batch


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Draws the progress bar, and stops before a step that is not finite reaches the weights and a checkpoint."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            self._bar = progress(total=self._job.steps, desc="adapter", unit="steps")
            self._bar.update(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            kept = last_checkpoint(self._job.checkpoints)
            raise RunFailed(
                f"the loss is not finite at step {state.global_step + 1} of {self._job.steps} (learning rate "
                f"{self._job.settings.learning_rate:g}). Lower {_stage(self._job)}.learning_rate. "
                + (f"The last good checkpoint is {kept}." if kept else "There is no checkpoint before it.")
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()
        control.should_log |= control.should_save  # what was summed since the last log is in no checkpoint

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _trainer(job: Job, watch: _Watch) -> _Trainer:
    settings, device = job.settings, device_of(job.settings.device)
    dtype = dtype_of(settings.dtype, device)
    arguments = RewardConfig(
        output_dir=str(job.checkpoints),
        max_steps=job.steps,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        bf16=dtype == "bfloat16",
        activation_checkpointing=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        max_length=None,
        remove_unused_columns=False,
        logging_steps=max(1, job.steps // _POINTS),
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,  # while the newest is written, the one before it is complete
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(settings.seed)  # a new head and adapter are drawn
    tokenizer = load_tokenizer(settings.backbone, settings.revision)
    model, revision = load_model(settings.backbone, settings.revision, dtype, tokenizer.pad_token_id)
    joint = _stage(job) == "joint"
    if joint:
        start = load_file(job.checkpoints / JOINT_FILE)
        model.score = JointHead(start["heads"], start["embeddings"])
    if job.start is None:
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear",
            modules_to_save=["score"],
        )
        model = get_peft_model(model, lora)
    else:
        model = PeftModel.from_pretrained(model, str(job.start), is_trainable=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = settings.backbone, revision  # not where it lies here
    # A set would be written in another order every time, and PEFT adds to the list whenever it reads it.
    config.target_modules, config.modules_to_save = sorted(config.target_modules), ["score"]
    trainer = (_JointTrainer if joint else _Trainer)(
        job,
        model=model,
        args=arguments,
        data_collator=_Collator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_file(str(job.examples)),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _stage(job: Job) -> str:
    """Whose settings they are."""
    return "joint" if (job.checkpoints / JOINT_FILE).is_file() else "reward"


def _in_words(job: Job, error: Exception) -> CoterieError | None:
    """What a library's error means, where it is one that is foreseen."""
    said, stage = str(error), _stage(job)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said:
        if device_of(job.settings.device) == "cpu":
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        else:
            memory = torch.cuda.mem_get_info()[1]
        return OutOfMemory(
            f"{memory / 2**30:.1f} GiB of memory do not hold a batch of {job.batch_size} comparisons, two responses each of "
            f"at most {job.settings.max_tokens} tokens. Lower {stage}.batch_size and raise {stage}.accumulation, or lower "
            f"{stage}.max_tokens."
        )
    # torch says "inline_container.cc: unexpected pos" where a file cannot be written, and safetensors what the system says.
    full = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    if "inline_container" in said or any(reason in said for reason in full):
        return RunFailed(
            f"the disk of {job.checkpoints} is full. Free some space and run it again: it goes on from the last checkpoint."
        )
    return None


@record  # type: ignore[untyped-decorator]  # torchrun then says what went wrong
def main() -> None:
    """Run a job as one of the processes that share it."""
    job = Job.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        backbone_source(job.settings.backbone)  # before the processes are a group: in one, rank 0 alone would write it
        fit(job)
    except CoterieError as error:
        leave_failure(job, error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
