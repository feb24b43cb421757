"""The InferenceService of a release in its cluster: read, written, removed, and its rollout followed to the end.

KServe's Ready condition says nothing of an update: it may still be that of the pods before (docs of KServe's Standard mode).
So a deployment is told by a revision, which the InferenceService hands on to its Deployments, and by their rollout.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import urllib3
from kubernetes import client, config

from coterie.errors import BackendUnavailable, BadConfiguration, RunFailed

log = logging.getLogger("coterie.serving")

PARTS = ("predictor", "transformer")
FETCH, REVISION = (
    "fetch",
    "COTERIE_REVISION",
)  # the init container of both parts, and what tells a deployment from another
TEMPLATE_KEY = "inferenceservice.yaml"

_POLL = 2.0  # seconds between two looks
_NO_NODE = 60.0  # seconds that a pod may wait for a node: one that is being added takes some
_CRASHES = 2  # restarts before a container that ends is given up
_LINES = 20  # of a log that are quoted
_WITHOUT_HOPE = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "InvalidImageName",
)
_CONFLICTS = 10  # attempts to write over somebody's change of the same moment; KServe writes the status
# Every request may be repeated: what is written names its revision.
_RETRY = urllib3.Retry(
    6,
    allowed_methods=None,
    status_forcelist=(429, 500, 502, 503, 504),
    backoff_factor=0.5,
    backoff_max=10,
    raise_on_status=False,
)


class Cluster:
    """The InferenceService `release` in `namespace`, its Deployments and pods.

    Raises:
        BadConfiguration: neither a pod of a cluster nor a kubeconfig; the cluster refuses a request.
        BackendUnavailable: its API does not answer. Both of all methods.
    """

    def __init__(self, namespace: str, release: str) -> None:
        from kserve import KServeClient

        self.namespace, self.release = namespace, release
        try:
            self._services = KServeClient()
        except config.ConfigException as error:
            raise BadConfiguration(
                f"no cluster to deploy to: {error}. Run this in a pod, or let KUBECONFIG name a cluster."
            ) from error
        settings = client.Configuration.get_default_copy()
        settings.retries = _RETRY
        api = client.ApiClient(settings)
        self._plain = api.sanitize_for_serialization
        self._services.api_instance = client.CustomObjectsApi(api)  # KServe's own has no retries
        self._apps, self._core = client.AppsV1Api(api), client.CoreV1Api(api)

    def template(self) -> str:
        """The InferenceService as the chart renders it. Raises BadConfiguration: there is no such release."""
        name = f"{self.release}-serving"
        with self._in_words():
            found = _or_none(lambda: self._core.read_namespaced_config_map(name, self.namespace))
        text = None if found is None else (found.data or {}).get(TEMPLATE_KEY)
        if text is None:
            raise BadConfiguration(
                f"namespace {self.namespace} has no ConfigMap {name} with {TEMPLATE_KEY}, so no release {self.release} of the "
                "chart. Install it there first, or name another release or namespace."
            )
        return str(text)

    def read(self) -> dict[str, Any] | None:
        """The InferenceService that is there, None without one."""
        with self._in_words():
            found: dict[str, Any] | None = _or_none(lambda: self._services.get(self.release, self.namespace))
        return found

    def write(self, manifest: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        """Create the InferenceService, or let `manifest` take the place of `before`.

        Raises:
            RunFailed: somebody else has deployed since `before` was read.
        """
        for _ in range(_CONFLICTS):
            now = self.read()
            if now is not None and revision(now) == revision(manifest):  # an answer was lost, or there is nothing to do
                return
            if revision(now) != revision(before):
                raise RunFailed(self._taken())
            with self._in_words():
                try:
                    if now is None:
                        self._services.create(_model(manifest, {}), self.namespace)
                    else:
                        self._services.replace(self.release, _model(manifest, now["metadata"]), self.namespace)
                    return
                except RuntimeError as error:
                    if _status(error) != 409:
                        raise
            time.sleep(_POLL / _CONFLICTS)
        raise BackendUnavailable(
            f"the InferenceService {self.release} was changed by somebody else {_CONFLICTS} times. Run the step again."
        )

    def remove(self, deadline: float) -> bool:
        """Remove the InferenceService and wait until its Deployments are gone; return whether there was one.

        Raises:
            RunFailed: they are still there at `deadline` (time.monotonic).
        """
        with self._in_words():
            there = _or_none(lambda: self._services.delete(self.release, self.namespace)) is not None
        while left := [name for name, found in self._all() if found is not None]:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{', '.join(left)} of namespace {self.namespace} did not go. See whether KServe's controller runs."
                )
            time.sleep(_POLL)
        return there

    def follow(self, manifest: Mapping[str, Any], deadline: float) -> None:
        """Wait until both Deployments carry the manifest's revision, and all their pods are of it and ready.

        Raises:
            RunFailed: a pod cannot start or ends again and again, with its reason and last lines; somebody else has
                deployed meanwhile; or the deadline (time.monotonic) has passed.
        """
        wanted, told, since = revision(manifest), dict.fromkeys(PARTS, ""), dict[str, float]()
        while True:
            if revision(self.read()) != wanted:
                raise RunFailed(self._taken())
            for part in PARTS:
                deployment = self._deployment(part)
                state = _progress(deployment, wanted)
                if state != told[part]:
                    log.info("%s-%s: %s", self.release, part, state or "all replicas are new and answer")
                told[part] = state
                if state and deployment is not None:
                    self._look_for_trouble(deployment, wanted, since)
            if not any(told.values()):
                return
            if time.monotonic() > deadline:
                late = "; ".join(f"{self.release}-{part}: {state}" for part, state in told.items() if state)
                raise RunFailed(f"the rollout did not end in time: {late}")
            time.sleep(_POLL)

    def _taken(self) -> str:
        return (
            f"another deployment of {self.release} has taken the place of this one meanwhile, and was left alone. Deploy again "
            "when it has ended."
        )

    def _all(self) -> list[tuple[str, Any]]:
        parts = [(f"Deployment {self.release}-{part}", self._deployment(part)) for part in PARTS]
        return [(f"InferenceService {self.release}", self.read()), *parts]

    def _deployment(self, part: str) -> dict[str, Any] | None:
        with self._in_words():
            name = f"{self.release}-{part}"
            found = _or_none(lambda: self._apps.read_namespaced_deployment(name, self.namespace))
        return None if found is None else self._plain(found)

    def _look_for_trouble(self, deployment: Mapping[str, Any], wanted: str | None, since: dict[str, float]) -> None:
        labels = deployment["spec"]["selector"]["matchLabels"]
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        with self._in_words():
            pods = self._plain(self._core.list_namespaced_pod(self.namespace, label_selector=selector).items)
        for pod in pods:
            if _revision_in(pod["spec"]) != wanted:
                continue
            name = pod["metadata"]["name"]
            if (waits := _no_node(pod)) and time.monotonic() - since.setdefault(name, time.monotonic()) > _NO_NODE:
                raise RunFailed(f"no node takes the pod {name}: {waits}")
            if (trouble := _trouble(pod)) is not None:
                said = "".join(f"\n    {line}" for line in self._last_lines(name, trouble))
                quoted = f" Its last lines:{said}" if said else ""
                raise RunFailed(f"container {trouble.container} of the pod {name}: {trouble.words}.{quoted}")

    def _last_lines(self, pod: str, trouble: _Trouble) -> list[str]:
        try:
            said = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=trouble.container,
                previous=trouble.restarted,
                tail_lines=_LINES,
                _preload_content=False,
            )
        except client.ApiException:  # a container that never ran has said nothing
            return []
        return [line for line in said.data.decode("utf-8", "replace").split("\n") if line.strip()]

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Turn what the clients raise into errors in words."""
        try:
            yield
        except (client.ApiException, RuntimeError) as error:
            status = _status(error)
            if status is None:
                raise
            said = _message(error)
            if status in (401, 403):
                raise BadConfiguration(
                    f"the cluster does not let this service account deploy: {said}. The chart's Role {self.release}-deployer "
                    f"in namespace {self.namespace} is what it needs: see `pipelines` in the values."
                ) from error
            if status == 404:
                raise BadConfiguration(
                    f"the cluster knows no InferenceService, or no namespace {self.namespace}: {said}. Install KServe there."
                ) from error
            if status < 500 and status != 429:
                raise BadConfiguration(f"the cluster refuses the InferenceService {self.release}: {said}") from error
            raise BackendUnavailable(f"the cluster's API fails: {said}. Run the step again.") from error
        except urllib3.exceptions.HTTPError as error:
            raise BackendUnavailable(f"the cluster's API does not answer: {error}. Run the step again.") from error


class _Trouble(NamedTuple):
    """Why a container will not run, whether it ran before, and its name."""

    container: str
    words: str
    restarted: bool


def revision(manifest: Mapping[str, Any] | None) -> str | None:
    """Which deployment an InferenceService is of; None without one, or of none of ours."""
    return None if manifest is None else _revision_in(manifest["spec"].get(PARTS[0], {}))


def _revision_in(spec: Mapping[str, Any]) -> str | None:
    """The revision that a pod's specification carries."""
    for container in spec.get("initContainers") or []:
        if container["name"] == FETCH:
            for variable in container.get("env") or []:
                if variable["name"] == REVISION:
                    return str(variable["value"])
    return None


def _progress(deployment: Mapping[str, Any] | None, wanted: str | None) -> str:
    """What a rollout waits for, in words; empty when it has ended."""
    if deployment is None:
        return "KServe has not made it yet"
    metadata, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    if _revision_in(spec["template"]["spec"]) != wanted:
        return "KServe has not updated it yet"
    if status.get("observedGeneration", 0) < metadata.get("generation", 0):
        return "its update is not seen yet"
    replicas = spec.get("replicas", 1)
    new, there, answer = (status.get(name, 0) for name in ("updatedReplicas", "replicas", "availableReplicas"))
    if new < replicas or there > new or answer < new:
        return f"{new} of {replicas} replicas are new, {there - new} old ones are there, {answer} answer"
    return ""


def _no_node(pod: Mapping[str, Any]) -> str:
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return str(condition.get("message", "Unschedulable"))
    return ""


def _trouble(pod: Mapping[str, Any]) -> _Trouble | None:
    """The first container of a pod that waiting will not help."""
    status = pod.get("status", {})
    starting = status.get("initContainerStatuses") or []
    for one in [*starting, *(status.get("containerStatuses") or [])]:
        restarts = int(one.get("restartCount", 0))
        ended = [state["terminated"] for key in ("state", "lastState") if "terminated" in (state := one.get(key) or {})]
        failed = next((end for end in ended if end.get("exitCode")), None)
        waiting = (one.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _WITHOUT_HOPE:
            return _Trouble(
                one["name"], f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ."), restarts > 0
            )
        if failed and (one in starting or restarts >= _CRASHES):
            again = f", {restarts} times started again" if restarts else ""
            words = f"{failed.get('reason', 'Error')}, exit code {failed['exitCode']}{again}"
            return _Trouble(one["name"], words, restarts > 0)
    return None


def _model(manifest: Mapping[str, Any], there: Mapping[str, Any]) -> Any:
    """A manifest as KServe's client wants it, in place of the object whose metadata are `there`."""
    from kserve import V1beta1InferenceService

    own = manifest["metadata"]
    metadata = client.V1ObjectMeta(
        name=own["name"],
        labels=own.get("labels"),
        annotations=own.get("annotations"),
        # Whoever set these, KServe among them, relies on them.
        finalizers=there.get("finalizers"),
        owner_references=there.get("ownerReferences"),
        resource_version=there.get("resourceVersion"),
    )
    return V1beta1InferenceService(
        api_version=manifest["apiVersion"], kind=manifest["kind"], metadata=metadata, spec=manifest["spec"]
    )


def _or_none(ask: Any) -> Any:
    """What is asked for, None if it is not there."""
    try:
        return ask()
    except (client.ApiException, RuntimeError) as error:
        if _status(error) != 404:
            raise
        return None


def _refusal(error: BaseException) -> client.ApiException | None:
    """The API's own exception, which KServe's client wraps in a RuntimeError."""
    inner = error if isinstance(error, client.ApiException) else error.__context__
    return inner if isinstance(inner, client.ApiException) else None


def _status(error: BaseException) -> int | None:
    refusal = _refusal(error)
    return None if refusal is None else refusal.status


def _message(error: BaseException) -> str:
    refusal = _refusal(error)
    assert refusal is not None
    try:
        return str(json.loads(refusal.body)["message"]).rstrip(".")
    except (TypeError, ValueError, KeyError):
        return f"{refusal.status} {refusal.reason}"
