"""Several nodes: a TrainJob over a real HTTP API, whose nodes are torchrun processes of this machine."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes import config
from stand_ins import JsonHandler
from test_adapters import backbone, settings_of, train, weights, write_comparisons  # noqa: F401
from tiny_models import one_thread  # noqa: F401

from components import nodes
from coterie.errors import BackendUnavailable, BadConfiguration, RunFailed

ROOT = Path(__file__).parents[1]
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"


def step_pod(folder):
    """The pod of a reward step as Kubeflow makes it, with the folder of checkpoints on a claim."""
    main = {
        "name": "main",
        "image": "registry/train@sha256:1",
        "env": [{"name": "HF_ENDPOINT", "value": "http://hub"}, {"name": "ARGO_NODE_ID", "value": "7"}],
        "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": "2"}},
        "volumeMounts": [
            {"name": "kept", "mountPath": str(folder)},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "var-run-argo", "mountPath": "/var/run/argo"},
            {"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
        ],
    }
    return {
        "metadata": {"name": socket.gethostname(), "uid": "uid-of-the-step"},
        "spec": {
            "containers": [{"name": "wait", "image": "argoexec", "resources": {}}, main],
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "volumes": [
                {"name": "kept", "persistentVolumeClaim": {"claimName": "kept"}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                {"name": "var-run-argo", "emptyDir": {}},
                {"name": "kube-api-access", "projected": {"sources": []}},
            ],
        },
    }


class Cluster:
    """The endpoints that a TrainJob needs. Its nodes are processes here; `trouble` answers the next requests instead."""

    def __init__(self, folder):
        self.folder, self.jobs, self.pods, self.log, self.trouble = folder, {}, {}, [], []
        self.step = step_pod(folder)
        handler = type("Handler", (_Handler,), {"cluster": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        for job in list(self.jobs):
            self.delete(job)

    def create(self, job):
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for number in range(trainer["numNodes"]):
            own = {
                "PET_NNODES": trainer["numNodes"],
                "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
                "PET_NODE_RANK": number,
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
            }
            command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
            process = subprocess.Popen(
                command,
                env=os.environ | {key: str(value) for key, value in own.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            pod = _Pod(f"{name}-node-0-{number}", name, number, process)
            self.pods[pod.name] = pod
        self.jobs[name] = job
        return job

    def delete(self, name):
        del self.jobs[name]
        for pod in [pod for pod in self.pods.values() if pod.job == name]:
            if pod.process.poll() is None:
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()
            del self.pods[pod.name]

    def conditions(self, name):
        codes = [pod.process.poll() for pod in self.pods.values() if pod.job == name]
        return [{"type": "Complete", "status": "True"}] if set(codes) == {0} else []


class _Pod:
    def __init__(self, name, job, number, process):
        self.name, self.job, self.number, self.process, self.said = name, job, number, process, []
        self.hearing = threading.Thread(target=self._hear, daemon=True)
        self.hearing.start()

    def _hear(self):
        for line in self.process.stdout:
            self.said.append((time.monotonic(), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z {line.decode()}"))
        self.process.wait()
        self.ended = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"

    def manifest(self):
        """As seen under the runtime torch-distributed: a container that fails is started again in place."""
        state, last, phase = {"running": {}}, {}, "Running"
        if not self.hearing.is_alive():
            code = self.process.returncode
            reason = "OOMKilled" if code == -signal.SIGKILL else "Error" if code else "Completed"
            ended = {"exitCode": code if code >= 0 else 128 - code, "reason": reason, "finishedAt": self.ended}
            state, phase = {"terminated": ended}, "Succeeded"
            if code:
                state, last, phase = {"waiting": {"reason": "CrashLoopBackOff"}}, state, "Running"
        labels = {"batch.kubernetes.io/job-completion-index": str(self.number)}
        status = {"name": "node", "image": "", "imageID": "", "ready": True, "state": state, "lastState": last}
        status["restartCount"] = len(last)
        container = {"name": "node", "resources": {"limits": {"memory": "2Gi"}}}
        return {
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"containers": [container]},
            "status": {"phase": phase, "containerStatuses": [status]},
        }


class _Handler(JsonHandler):
    def handle_any(self):
        cluster, url = self.cluster, urlparse(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.body()
        cluster.log.append((self.command, url.path))
        if cluster.trouble and (self.command, url.path.startswith(cluster.trouble[0][0])) == (
            cluster.trouble[0][1],
            True,
        ):
            _, _, code, message = cluster.trouble.pop(0)
            return self.answer({"kind": "Status", "message": message, "code": code}, code)
        name = url.path.rpartition("/")[2]
        if url.path == JOBS and self.command == "POST":
            return self.answer(cluster.create(json.loads(body)), 201)
        if url.path == JOBS:
            key, _, value = asked["labelSelector"].partition("=")
            found = [job for job in cluster.jobs.values() if job["metadata"]["labels"].get(key) == value]
            return self.answer({"items": found})
        if url.path.startswith(JOBS) and name not in cluster.jobs:
            return self.answer({"message": f"trainjob {name} not found"}, 404)
        if self.command == "DELETE":
            cluster.delete(name)
            return self.answer({"status": "Success"})
        if url.path.startswith(JOBS):
            return self.answer(cluster.jobs[name] | {"status": {"conditions": cluster.conditions(name)}})
        if url.path == PODS:
            job = asked["labelSelector"].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            return self.answer({"items": [pod.manifest() for pod in list(cluster.pods.values()) if pod.job == job]})
        if name == "log":
            assert asked["container"] == "node"
            since = time.monotonic() - float(asked.get("sinceSeconds", "inf"))
            pod = cluster.pods[url.path.split("/")[-2]]
            if asked["previous"] == "False" and pod.manifest()["status"]["containerStatuses"][0]["restartCount"]:
                return self.answer("")  # of the new container
            return self.answer("".join(line for at, line in pod.said if at >= since))
        return self.answer(cluster.step)

    do_GET = do_POST = do_DELETE = handle_any


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    served = Cluster(folder)
    namespace = tmp_path / "namespace"
    namespace.write_text("team")
    monkeypatch.setattr(config, "load_incluster_config", lambda settings: setattr(settings, "host", served.address))
    monkeypatch.setattr(nodes, "_NAMESPACE", namespace)
    monkeypatch.setattr(nodes, "_POLL", 0.1)
    monkeypatch.setenv("COTERIE_CHECKPOINTS", str(folder))
    monkeypatch.setenv("COTERIE_LAUNCHER", "components.nodes:run")
    yield served
    served.close()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write a program for torchrun to run, and return the arguments that name it."""

    def write(text):
        path = tmp_path / "program.py"
        path.write_text(f"import os, sys, time\nnode = int(os.environ['PET_NODE_RANK'])\n{text}\n")
        return [str(path)]

    return write


def test_two_nodes_take_the_steps_of_one_process(backbone, cluster, tmp_path, monkeypatch, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, "coterie")
    data = write_comparisons(tmp_path / "data", "!!!!????")
    settings = settings_of(backbone, learning_rate=1e-3, max_steps=4)
    alone = train(data, tmp_path / "alone" / "global", settings)
    of_two = settings.model_copy(update={"batch_size": 4, "nodes": 2})
    shared = train(data, tmp_path / "together" / "global", of_two)
    np.testing.assert_allclose(shared["curve"], alone["curve"], atol=1e-5)
    for name, tensor in weights(tmp_path / "alone" / "global").items():
        torch.testing.assert_close(weights(tmp_path / "together" / "global")[name], tensor, atol=1e-5, rtol=1e-3)
    # A coterie's starts from the global one, which only the step's own pod holds.
    own = np.array([1.0, 1, 1, 1, 0, 0, 0, 0])
    coterie = train(data, tmp_path / "together" / "own", of_two, own, start=tmp_path / "together" / "global")
    assert coterie["steps"] == 4
    assert not cluster.jobs
    assert not list(cluster.folder.iterdir())
    names = {path.rpartition("/")[2] for method, path in cluster.log if method == "DELETE"}
    assert len(names) == 2, "each attempt has a name of its own"


def test_every_node_is_heard_once_and_in_order(cluster, program, caplog):
    caplog.set_level(logging.INFO, "coterie")
    counts = "for i in range(8): print('0%\\r50%\\rline', i, flush=True); time.sleep(.1)"
    nodes.run(program(counts), 2, 1, cluster.folder / "key")
    for number in (0, 1):
        heard = [record.message for record in caplog.records if record.message.startswith(f"node {number}: line")]
        assert heard == [f"node {number}: line {i}" for i in range(8)]
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("sys.exit(f'cannot go on, node {node}')", r"Error, exit code 1\. .*cannot go on, node 1"),
        ("os.kill(os.getppid(), 9); sys.exit()", r"OOMKilled with 2Gi of memory, exit code 137"),
    ],
)
def test_a_node_that_fails_is_the_failure_of_the_step_with_its_reason(what, reason, cluster, program):
    with pytest.raises(RunFailed, match=re.compile(f"node 1 of 2 ended: {reason}", re.DOTALL)):
        nodes.run(program(f"if node: {what}\ntime.sleep(120)"), 2, 1, cluster.folder / "key")
    assert not cluster.jobs
    assert not cluster.pods


def test_memory_that_runs_out_on_a_node_halves_the_batch(backbone, cluster, tmp_path, monkeypatch):  # noqa: F811
    """The trainer of the nodes is replaced by one that has no memory for more than two comparisons."""
    data = write_comparisons(tmp_path / "data", "!!!!????")
    settings = settings_of(backbone, max_steps=2).model_copy(update={"batch_size": 4, "nodes": 2})
    small = tmp_path / "small_memory.py"
    small.write_text(
        "import os, sys\nfrom coterie.rewards import trainer\nfrom coterie.rewards.launch import OutOfMemory\n"
        "fit = trainer.fit\n"
        "def short(job):\n"
        "    if job.batch_size > 2 and os.environ['RANK'] == '1': raise OutOfMemory('too little')\n"
        "    fit(job)\n"
        "trainer.fit = short\ntrainer.main()\n"
    )
    run = nodes.run
    monkeypatch.setattr(nodes, "run", lambda arguments, **rest: run([str(small), arguments[-1]], **rest))
    told = train(data, tmp_path / "out" / "global", settings)
    assert told["steps"] == 2
    assert [method for method, path in cluster.log if path == JOBS].count("POST") == 2


def test_the_nodes_are_as_the_pod_of_the_step(cluster, program):
    made = []
    create = cluster.create
    cluster.create = lambda job: made.append(job) or create(job)
    nodes.run(program(""), 2, 3, cluster.folder / "key")
    job = made[0]
    owner, trainer = job["metadata"]["ownerReferences"][0], job["spec"]["trainer"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Pod", socket.gethostname(), "uid-of-the-step")
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry/train@sha256:1", 2, 3)
    assert trainer["resourcesPerNode"] == cluster.step["spec"]["containers"][1]["resources"]
    assert trainer["env"] == [{"name": "HF_ENDPOINT", "value": "http://hub"}]
    shaped = job["spec"]["podTemplateOverrides"][0]["spec"]
    assert shaped["nodeSelector"] == {"pool": "gpu"}
    assert shaped["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert [volume["name"] for volume in shaped["volumes"]] == ["kept", "shm"]
    assert [mount["name"] for mount in shaped["containers"][0]["volumeMounts"]] == ["kept", "shm"]
    # As later versions of Trainer read it, by their own types.
    read = TrainerV1alpha1TrainJob.from_dict(job).spec.runtime_patches[0].training_runtime_spec
    later = read.template.spec.replicated_jobs[0].template.spec.template.spec
    assert later.to_dict() == shaped


def test_what_an_earlier_attempt_left_is_removed_first(cluster, program):
    job = {"metadata": {"name": "earlier", "labels": {"coterie/checkpoints": "key"}}}
    job["spec"] = {"trainer": {"numNodes": 1, "numProcPerNode": 1, "command": ["python3", "-c"], "args": ["input()"]}}
    cluster.create(job)
    cluster.create(job | {"metadata": {"name": "another", "labels": {"coterie/checkpoints": "other"}}})
    nodes.run(program(""), 2, 1, cluster.folder / "key")
    assert list(cluster.jobs) == ["another"]
    made = [(method, path) for method, path in cluster.log if method in ("POST", "DELETE")]
    assert made[:2] == [("DELETE", f"{JOBS}/earlier"), ("POST", JOBS)]


def test_a_step_that_is_stopped_takes_its_nodes_along(cluster, program, tmp_path):
    script = (
        "import sys; from pathlib import Path; from kubernetes import config; from components import nodes\n"
        f"config.load_incluster_config = lambda settings: setattr(settings, 'host', {cluster.address!r})\n"
        f"nodes._NAMESPACE = Path({str(tmp_path / 'namespace')!r})\n"
        f"nodes.run({program('time.sleep(300)')!r}, 2, 1, Path({str(cluster.folder / 'key')!r}))"
    )
    step = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not cluster.jobs and time.monotonic() < end:
            time.sleep(0.05)
        assert cluster.jobs
        step.send_signal(signal.SIGTERM)
        assert step.wait(60) == 128 + signal.SIGTERM
    finally:
        step.kill()
    assert not cluster.jobs


def test_an_api_that_is_away_for_a_moment_ends_nothing(cluster, program):
    webhook = (JOBS, "POST", 500, "failed calling webhook: no endpoints available")
    cluster.trouble = [webhook, *[(PODS, "GET", 503, "restarting")] * 2, (JOBS, "GET", 500, "restarting")]
    nodes.run(program(""), 2, 1, cluster.folder / "key")
    assert not cluster.trouble
    assert not cluster.jobs


def test_a_cluster_that_refuses_is_quoted_with_the_remedy(cluster, program, monkeypatch):
    cluster.trouble = [(JOBS, "POST", 403, "pipeline-runner cannot create trainjobs")]
    with pytest.raises(BadConfiguration, match=r"pipeline-runner cannot create trainjobs\. It needs .* the role of"):
        nodes.run(program(""), 2, 1, cluster.folder / "key")
    monkeypatch.setattr(nodes, "_RETRY", nodes._RETRY.new(total=2, backoff_factor=0))
    cluster.trouble = [(JOBS, "POST", 500, "no space")] * 3
    with pytest.raises(BackendUnavailable, match="no space"):
        nodes.run(program(""), 2, 1, cluster.folder / "key")


def test_a_folder_that_no_other_node_sees_is_refused(cluster, program, tmp_path):
    for folder in (tmp_path / "elsewhere", Path("/dev/shm/key"), Path("/var/run/argo/key")):
        with pytest.raises(
            BadConfiguration, match=r"reward\.nodes 2: .*ReadWriteMany.*`checkpoints` of the stage reward"
        ):
            nodes.run(program(""), 2, 1, folder)


def test_where_nothing_starts_nodes_two_of_them_are_refused(backbone, tmp_path, monkeypatch):  # noqa: F811
    data = write_comparisons(tmp_path / "data", "!!!!????")
    settings = settings_of(backbone).model_copy(update={"nodes": 2})
    monkeypatch.delenv("COTERIE_LAUNCHER", raising=False)
    with pytest.raises(
        BadConfiguration, match=r"reward\.nodes 2: nothing here starts other nodes.*set reward\.nodes to 1"
    ):
        train(data, tmp_path / "out" / "global", settings)
    monkeypatch.setenv("COTERIE_LAUNCHER", "components.nodes:run")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(BadConfiguration, match="this is no pod of one"):
        train(data, tmp_path / "again" / "global", settings)
