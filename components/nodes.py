"""Training on several nodes: a Kubeflow TrainJob, started, followed and removed by the step whose work it is.

A node gets what the step's own pod got of the placement: image, resources, node selectors, tolerations, environment, and the
volumes that other pods can see too. Kubeflow's SDK (0.5) can neither mount a volume under Trainer 2.1 nor say why a node
failed, so that the TrainJob is written here, by the SDK's names, and watched through its pods.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import urllib3
from kubeflow.trainer.constants import constants as trainer
from kubernetes import client, config

from coterie.errors import BackendUnavailable, BadConfiguration, CoterieError, RunFailed

log = logging.getLogger("coterie")

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_FOLDER = "coterie/checkpoints"  # a label: whose folder a TrainJob works in
_PLATFORM = ("KFP_", "ARGO_", "METADATA_", "ML_PIPELINE_")  # environment of a pipeline's step, and of no other pod
_POLL, _OVERLAP, _GONE = 2, 5, 90  # seconds: between two looks, of logs read twice, until a removed node has stopped
# An API server, or Trainer's webhook, that is away for minutes must not end a training of hours. Everything can be repeated:
# a TrainJob has its name before it is sent.
_RETRY = urllib3.Retry(
    14,
    allowed_methods=None,
    status_forcelist=(429, 500, 502, 503, 504),
    backoff_factor=0.5,
    backoff_max=30,
    raise_on_status=False,
)
_LAST_LINES = 40  # torchrun says more than thirty when a process of its fails


def run(arguments: Sequence[str], nodes: int, processes: int, shared: Path) -> None:
    """Run `torchrun ARGUMENTS` on several nodes to its end; their lines go to the log, with the node's number.

    Args:
        arguments: of torchrun, as in ["-m", "package.module", "argument"].
        nodes: how many.
        processes: of each node.
        shared: folder that all nodes read and write, on a volume of the step's pod.

    Raises:
        BadConfiguration: this is no pod of a cluster, `shared` is on no volume that others can mount, or the cluster has no
            Kubeflow Trainer or refuses the TrainJob.
        RunFailed: a node failed; with its reason and last lines.
        BackendUnavailable: the cluster's API does not answer.
    """
    settings = client.Configuration()
    settings.retries = _RETRY
    try:
        config.load_incluster_config(settings)
    except config.ConfigException as error:
        raise BadConfiguration(
            f"reward.nodes {nodes}: several nodes are a TrainJob of Kubeflow Trainer, which a step of the pipeline starts on "
            f"a cluster; this is no pod of one ({error}). Set reward.nodes to 1."
        ) from error
    cluster = _Cluster(client.ApiClient(settings), _NAMESPACE.read_text(encoding="utf-8").strip())
    try:
        manifest = _manifest(cluster.own_pod(), arguments, nodes, processes, shared)
        cluster.remove(f"{_FOLDER}={shared.name}")  # of an attempt that was killed
        with cluster.running(manifest) as name:
            _follow(cluster, name, nodes)
    except client.ApiException as error:
        raise _refused(error) from error
    except urllib3.exceptions.HTTPError as error:
        raise BackendUnavailable(f"the cluster's API does not answer: {error}. Run the step again.") from error


class _Cluster:
    """TrainJobs and pods of the namespace that this process runs in."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._jobs, self._core, self._namespace = client.CustomObjectsApi(api), client.CoreV1Api(api), namespace
        self._trainjobs = (trainer.GROUP, trainer.VERSION, namespace, trainer.TRAINJOB_PLURAL)

    def own_pod(self) -> dict[str, Any]:
        """The pod of this process, as Kubernetes writes it."""
        pod = self._core.read_namespaced_pod(socket.gethostname(), self._namespace)
        return dict(self._core.api_client.sanitize_for_serialization(pod))

    @contextlib.contextmanager
    def running(self, manifest: dict[str, Any]) -> Iterator[str]:
        """Within, the TrainJob is there; yields its name. It is removed whatever ends the block, SIGTERM included."""

        def stop(number: int, frame: object) -> None:
            sys.exit(128 + number)

        before = signal.signal(signal.SIGTERM, stop)
        name = manifest["metadata"]["name"]
        try:
            try:
                self._jobs.create_namespaced_custom_object(*self._trainjobs, manifest)
            except client.ApiException as error:
                if error.status != 409:  # an answer was lost, and the request repeated
                    raise
            log.info("TrainJob %s: %d nodes", name, manifest["spec"]["trainer"]["numNodes"])
            yield name
        finally:
            self.remove(f"{_FOLDER}={manifest['metadata']['labels'][_FOLDER]}")
            signal.signal(signal.SIGTERM, before)

    def remove(self, label: str) -> None:
        """Remove the TrainJobs with a label, and wait until none of their nodes writes any more."""
        found = self._jobs.list_namespaced_custom_object(*self._trainjobs, label_selector=label)
        names = [job["metadata"]["name"] for job in found["items"]]
        for name in names:
            with contextlib.suppress(client.ApiException):  # it is gone, or the next attempt removes it
                self._jobs.delete_namespaced_custom_object(*self._trainjobs, name, propagation_policy="Background")
        end = time.monotonic() + _GONE
        while any(pod.status.phase in ("Pending", "Running") for name in names for pod in self.pods(name)):
            if time.monotonic() > end:
                log.warning("nodes of TrainJob %s still run %d s after it was removed", ", ".join(names), _GONE)
                return
            time.sleep(_POLL)

    def ended(self, name: str) -> tuple[str, str]:
        """Complete or Failed and what is said of it; two empty strings while the TrainJob runs."""
        try:
            job = self._jobs.get_namespaced_custom_object(*self._trainjobs, name)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return trainer.TRAINJOB_FAILED, "somebody removed it"
        for condition in job.get("status", {}).get("conditions", []):
            kind = condition["type"]
            if kind in (trainer.TRAINJOB_COMPLETE, trainer.TRAINJOB_FAILED) and condition["status"] == "True":
                return kind, condition.get("message", "")
        return "", ""

    def pods(self, name: str) -> list[Any]:
        """The pods of a TrainJob's nodes."""
        label = f"{trainer.JOBSET_NAME_LABEL}={name}"
        return list(self._core.list_namespaced_pod(self._namespace, label_selector=label).items)

    def lines(self, pod: str, seconds: int | None, before: bool) -> list[str]:
        """What a pod said in the last seconds, each line behind its time; `before`: it was started again."""
        try:
            said = self._core.read_namespaced_pod_log(
                pod,
                self._namespace,
                container=trainer.NODE,
                timestamps=True,
                since_seconds=seconds,
                previous=before,
                _preload_content=False,
            )
        except client.ApiException as error:
            if error.status != 404:
                raise
            return []  # when one node fails, the others are removed
        return [line for line in said.data.decode("utf-8", "replace").split("\n") if line]


class _Node:
    """One pod of a TrainJob, and what was heard from it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._until, self._read, self._waits = "", None, ""

    def listen(self, cluster: _Cluster, pod: Any) -> None:
        """Log what the node has said since the last time, or what it waits for."""
        if (waits := _waits_for(pod)) and waits != self._waits:
            log.info("node %d waits: %s", self.number, waits)
        self._waits = waits
        started = [one for one in pod.status.container_statuses or [] if one.restart_count or not one.state.waiting]
        if not started:
            return
        now = time.monotonic()
        # The API takes no time to start from, only an age: the overlap is read twice and told once.
        seconds = None if self._read is None else math.ceil(now - self._read) + _OVERLAP
        for stamped in cluster.lines(pod.metadata.name, seconds, before=bool(started[0].restart_count)):
            stamp, _, line = stamped.partition(" ")
            if stamp > self._until:
                self._until, line = stamp, line.rstrip("\r").rpartition("\r")[2]  # of a progress bar, what is seen
                self.last.append(line)
                log.info("node %d: %s", self.number, line)
        self._read = now


def _follow(cluster: _Cluster, name: str, nodes: int) -> None:
    """Pass on what the nodes say until all have ended. Raises RunFailed: one failed."""
    heard: dict[str, _Node] = {}
    while True:
        kind, message = cluster.ended(name)  # before the pods: after it they say nothing more
        pods = cluster.pods(name)
        for pod in pods:
            number = int(pod.metadata.labels[trainer.JOB_INDEX_LABEL])
            heard.setdefault(pod.metadata.name, _Node(number)).listen(cluster, pod)
        failed = [(failure, heard[pod.metadata.name]) for pod in pods if (failure := _failure(pod))]
        if failed:  # the first took the others along
            (_, reason), node = min(failed, key=itemgetter(0))
            said = "".join(f"\n    {line}" for line in node.last)
            raise RunFailed(f"node {node.number} of {nodes} ended: {reason}. Its last lines:{said}")
        if kind == trainer.TRAINJOB_FAILED:
            raise RunFailed(f"TrainJob {name} failed: {message}")
        if kind == trainer.TRAINJOB_COMPLETE:
            return
        time.sleep(_POLL)


def _waits_for(pod: Any) -> str:
    """What keeps a pod from starting, where Kubernetes says so: no node for it, or no image."""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False" and condition.message:
            return str(condition.message)
    for status in pod.status.container_statuses or []:
        if status.state.waiting and status.state.waiting.message:
            return f"{status.state.waiting.reason}: {status.state.waiting.message}"
    return ""


def _failure(pod: Any) -> tuple[datetime, str] | None:
    """When and why a node failed. Kubernetes would start it again, in place or as another pod, but without the others."""
    for status in pod.status.container_statuses or []:
        for state in (status.state, status.last_state):
            if (ended := state.terminated) and ended.exit_code:
                limits = next(one.resources.limits for one in pod.spec.containers if one.name == status.name) or {}
                of = f" with {limits['memory']} of memory" if ended.reason == "OOMKilled" and "memory" in limits else ""
                return ended.finished_at, f"{ended.reason}{of}, exit code {ended.exit_code}"
    if pod.status.phase == "Failed":
        return datetime.now(UTC), f"{pod.status.reason or 'its pod failed'} {pod.status.message or ''}".strip()
    return None


def _manifest(
    pod: dict[str, Any], arguments: Sequence[str], nodes: int, processes: int, shared: Path
) -> dict[str, Any]:
    """The TrainJob whose nodes are as the given pod. Raises BadConfiguration: `shared` is on no volume of others."""
    spec = pod["spec"]
    step = next((one for one in spec["containers"] if one["name"] == "main"), spec["containers"][0])
    volumes = {volume["name"]: volume for volume in spec.get("volumes", []) if _others_have(volume)}
    mounts = [mount for mount in step.get("volumeMounts", []) if mount["name"] in volumes]
    volumes = {mount["name"]: volumes[mount["name"]] for mount in mounts}
    if not any(
        PurePosixPath(shared).is_relative_to(mount["mountPath"])
        for mount in mounts
        if "emptyDir" not in volumes[mount["name"]]
    ):
        raise BadConfiguration(
            f"reward.nodes {nodes}: the nodes share the folder {shared}, which is on no volume. Name a volume claim that "
            "several nodes can mount (ReadWriteMany) as `checkpoints` of the stage reward in the placement."
        )
    shaped = {
        "nodeSelector": spec.get("nodeSelector"),
        "tolerations": spec.get("tolerations"),
        "imagePullSecrets": spec.get("imagePullSecrets"),
        "volumes": list(volumes.values()),
        "containers": [{"name": trainer.NODE, "volumeMounts": mounts}],
    }
    shaped = {key: value for key, value in shaped.items() if value}
    job: dict[str, Any] = {"name": trainer.NODE, "template": {"spec": {"template": {"spec": shaped}}}}
    return {
        "apiVersion": trainer.API_VERSION,
        "kind": trainer.TRAINJOB_KIND,
        "metadata": {
            "name": f"coterie-{uuid.uuid4().hex[:12]}",  # the address of an earlier one lingers in DNS
            "labels": {"app.kubernetes.io/part-of": "coterie", _FOLDER: shared.name},
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            ],
        },
        "spec": {
            "runtimeRef": {"kind": "ClusterTrainingRuntime", "name": trainer.DEFAULT_TRAINING_RUNTIME},
            "trainer": {
                "image": step["image"],
                # How many and where, the runtime tells torchrun by PET_*.
                "command": ["python3", "-m", "torch.distributed.run"],
                "args": list(arguments),
                "numNodes": nodes,
                "numProcPerNode": processes,
                "resourcesPerNode": {
                    kind: step["resources"][kind] for kind in ("requests", "limits") if step["resources"].get(kind)
                },
                "env": [one for one in step.get("env", []) if not one["name"].startswith(_PLATFORM)],
            },
            # One thing under two names: Trainer up to 2.1 knows the first, later ones the second, and the API drops the other.
            "podTemplateOverrides": [{"targetJobs": [{"name": trainer.NODE}], "spec": shaped}],
            "runtimePatches": [
                {"manager": "coterie/reward", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
            ],
        },
    }


def _others_have(volume: dict[str, Any]) -> bool:
    """Whether a volume means the same in another pod; memory that is shared (/dev/shm) is each node's own."""
    return "projected" not in volume and volume.get("emptyDir", {"medium": "Memory"}).get("medium") == "Memory"


def _refused(error: client.ApiException) -> CoterieError:
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = f"{error.status} {error.reason}"
    if error.status is not None and 400 <= error.status < 500:
        return BadConfiguration(
            f"the cluster refuses the TrainJob of several nodes: {said}. It needs Kubeflow Trainer with the runtime "
            f"{trainer.DEFAULT_TRAINING_RUNTIME}, and the role of docs/kubeflow.md; or set reward.nodes to 1."
        )
    return BackendUnavailable(f"the cluster's API fails: {said}. Run the step again.")
