"""Training of an adapter as a job: in this process, in one a GPU, or on several nodes; with half the batch where memory ran out."""

from __future__ import annotations

import json
import logging
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from coterie import errors
from coterie.backbones import device_of
from coterie.config import RewardSettings
from coterie.contracts import write_text
from coterie.errors import BadConfiguration, CoterieError, RunFailed

log = logging.getLogger("coterie")

_JOB, _START, _FAILURES = "job.json", "start", "failure-*.json"


class OutOfMemory(RunFailed):
    """The device's memory does not hold a forward and backward pass of the batch."""


class Job(BaseModel):
    """What training an adapter needs to know; rank 0 of the processes that run it leaves checkpoints.

    Attributes:
        settings: of the reward stage.
        examples: an Arrow stream of comparisons: chosen_ids, rejected_ids, label, weight (1 on average), reliability.
        steps: of the optimiser.
        start: folder of the adapter to start from; none: a new one.
        pull: precision of the prior around the start, divided by the comparisons' weight in all.
        batch_size, accumulation: of the settings, until memory runs out.
        checkpoints: folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: RewardSettings
    examples: Path
    steps: int
    start: Path | None
    pull: float
    batch_size: int
    accumulation: int
    checkpoints: Path


def processes(settings: RewardSettings) -> int:
    """Processes that share the training: COTERIE_PROCESSES, or one for each GPU, on each node; one where a launcher started this.

    Raises:
        BadConfiguration: COTERIE_PROCESSES is no number, or the device is one GPU of several.
    """
    device, wanted = device_of(settings.device), os.environ.get("COTERIE_PROCESSES", "")
    if device not in ("cpu", "cuda"):
        raise BadConfiguration(f"reward.device {device}: give auto, cpu or cuda; CUDA_VISIBLE_DEVICES names the GPUs.")
    if wanted and not (wanted.isdigit() and int(wanted)):
        raise BadConfiguration(f"COTERIE_PROCESSES={wanted}: give the number of processes that share a training.")
    if "LOCAL_RANK" in os.environ:
        return 1
    return settings.nodes * int(wanted or (torch.cuda.device_count() if device == "cuda" else 1))


def train(job: Job, processes: int) -> None:
    """Run a job to its last checkpoint; where memory does not hold a batch, in forward passes of half of it.

    The optimiser then sees the same batches, and goes on from the last checkpoint.

    Raises:
        RunFailed: memory does not hold that either, the loss is not finite, the disk is full, or a node failed.
        BadConfiguration: several nodes are asked for where nothing starts them.
    """
    try:
        _run(job, processes)
    except OutOfMemory as error:
        part = next((n for n in range(2, job.batch_size + 1) if job.batch_size % n == 0), None)
        if part is None:
            raise
        log.warning("%s Trying once more with a batch of %d.", error, job.batch_size // part)
        smaller = {"batch_size": job.batch_size // part, "accumulation": job.accumulation * part}
    else:
        return
    _run(job.model_copy(update=smaller), processes)


def _run(job: Job, processes: int) -> None:
    if processes == 1:
        from coterie.rewards.trainer import fit  # TRL takes seconds to import

        fit(job)
        return
    if job.start is not None and job.settings.nodes > 1:  # only the folder of checkpoints is on every node
        start = shutil.copytree(job.start, job.checkpoints / _START, dirs_exist_ok=True)
        job = job.model_copy(update={"start": start})
    path = job.checkpoints / _JOB
    write_text(path, job.model_dump_json())
    for failure in job.checkpoints.glob(_FAILURES):
        failure.unlink()
    # torchrun is what `accelerate launch` starts on GPUs; on CPUs that would want MPI.
    worker = ["-m", "coterie.rewards.trainer", str(path)]
    try:
        if job.settings.nodes > 1:
            _on_nodes(worker, job, processes)
        else:
            _here(worker, processes)
    except RunFailed:
        told = [json.loads(failure.read_text(encoding="utf-8")) for failure in sorted(job.checkpoints.glob(_FAILURES))]
        if not told:
            raise
        kind = OutOfMemory if told[0]["type"] == OutOfMemory.__name__ else getattr(errors, told[0]["type"])
        raise kind(told[0]["message"]) from None


def _here(worker: list[str], processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    code = subprocess.run([*command, *worker], check=False).returncode
    if code:
        raise RunFailed(f"training in {processes} processes ended with code {code}; what they said stands above")


def _on_nodes(worker: list[str], job: Job, processes: int) -> None:
    nodes, launcher = job.settings.nodes, os.environ.get("COTERIE_LAUNCHER")
    if not launcher:
        raise BadConfiguration(
            f"reward.nodes {nodes}: nothing here starts other nodes. Run the pipeline on a cluster with Kubeflow Trainer "
            "(docs/kubeflow.md), or set reward.nodes to 1."
        )
    pkgutil.resolve_name(launcher)(worker, nodes=nodes, processes=processes // nodes, shared=job.checkpoints)


def leave_failure(job: Job, error: CoterieError) -> None:
    """Tell the process that waits for this one what went wrong."""
    path = job.checkpoints / _FAILURES.replace("*", os.environ.get("RANK", "0"))
    write_text(path, json.dumps({"type": type(error).__name__, "message": str(error)}))
