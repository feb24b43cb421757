"""Where the pipelines' steps run: processors, memory, GPUs, nodes, time and retries of every stage, from one file.

    python -m pipelines.upload --placement pipelines/gpu.yaml ...

A placement is compiled into the pipeline, because Kubernetes must know it before a pod starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import yaml
from kfp import dsl, kubernetes
from pydantic import Field, ValidationError

from coterie.config import Settings, in_words
from coterie.errors import BadConfiguration

CHECKPOINTS = "/checkpoints"


class Toleration(Settings):
    """A taint that the pods put up with, as Kubernetes writes it."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoExecute", "NoSchedule", "PreferNoSchedule"] | None = None
    toleration_seconds: int | None = None


class Place(Settings):
    """What the pods of one stage get; quantities as Kubernetes writes them."""

    cpu: str | None = Field(default=None, description="request")
    memory: str | None = Field(default=None, description="request and limit")
    gpus: int = Field(default=0, ge=0, description="of a pod")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="name of the resource that a GPU is")
    node_selector: dict[str, str] = Field(default={}, description="labels of the nodes")
    tolerations: list[Toleration] = Field(default=[], description="of taints")
    timeout: int | None = Field(default=None, ge=1, description="seconds after which a pod is stopped")
    retries: int = Field(default=0, ge=0, description="of a failed step; bad data fails again, a lost node does not")
    checkpoints: str | None = Field(
        default=None, description="a volume claim that keeps checkpoints, so that a retried step goes on where it was"
    )


Stage = Literal[
    "ingest",
    "encode",
    "embed",
    "cluster",
    "publish",
    "reward",
    "evaluate",
    "bundle",
    "align",
    "judge",
    "report",
    "deploy",
    "refresh",
]


class Placement(Settings):
    """Places by stage; what a stage does not say is taken from `defaults`."""

    defaults: Place = Place()
    stages: dict[Stage, Place] = Field(default={}, description="what differs from the defaults")

    def of(self, stage: Stage) -> Place:
        """The place of a stage."""
        own = self.stages.get(stage, Place())
        return self.defaults.model_copy(update=own.model_dump(exclude_unset=True) | _nested(own))


def _nested(place: Place) -> dict[str, Any]:
    return {"tolerations": place.tolerations} if "tolerations" in place.model_fields_set else {}


def load_placement(path: Path) -> Placement:
    """Read a placement. Raises BadConfiguration: no such file, not YAML, or an unknown key."""
    try:
        return Placement(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise BadConfiguration(f"{path}: not a placement: {error}") from error
    except ValidationError as error:
        raise BadConfiguration(in_words(str(path), error)) from error


ANYWHERE = Placement()
_placement = ContextVar("placement", default=ANYWHERE)


@contextmanager
def placing(placement: Placement) -> Iterator[None]:
    """Within, `put` puts tasks where `placement` says."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def put(task: dsl.PipelineTask, stage: Stage) -> None:
    """Give a task the place of its stage."""
    place = _placement.get().of(stage)
    if place.cpu:
        task.set_cpu_request(place.cpu)
    if place.memory:
        task.set_memory_request(place.memory).set_memory_limit(place.memory)
    if place.gpus:
        task.set_accelerator_type(place.gpu_resource).set_accelerator_limit(place.gpus)
        # Processes of several GPUs, and data loaders, share memory; a container's own 64 MB do not suffice.
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")
    for label, value in place.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in place.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
    if place.timeout:
        kubernetes.set_timeout(task, place.timeout)
    if place.retries:
        task.set_retry(num_retries=place.retries, backoff_duration="30s", backoff_factor=2)
    if place.checkpoints:
        kubernetes.mount_pvc(task, pvc_name=place.checkpoints, mount_path=CHECKPOINTS)
        task.set_env_variable("COTERIE_CHECKPOINTS", CHECKPOINTS)
