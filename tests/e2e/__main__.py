"""What a platform engineer does, on the cluster that KUBECONFIG points at, from images to an uninstall.

    make e2e REGISTRY=registry.example
    python -m tests.e2e REGISTRY [--images build/images.yaml] [--without policies nodes] [--ui URL] [--keep]

Needs kubectl and helm, and for `--ui`, the address of the Kubeflow UI, what ui.mjs says. The cluster has Kubeflow Pipelines in
the namespace kubeflow with its own object store, KServe, Kubeflow Trainer for `nodes`, and nodes that claim nvidia.com/gpu for
`policies`. All that it makes is in the namespace coterie-e2e, which it removes at both ends, in runs of Kubeflow Pipelines, and a
claim and a Secret beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PODS = Path(__file__).parent / "pods"  # programs that pods of the router's image run: they ask Services by their names
CHART = ROOT / "charts" / "coterie"
NAMESPACE, RELEASE, KUBEFLOW = "coterie-e2e", "coterie", "kubeflow"
SERVICE, GRPC = f"http://{RELEASE}-transformer.{NAMESPACE}", f"{RELEASE}-grpc.{NAMESPACE}:8081"
PIPELINES = f"http://ml-pipeline.{KUBEFLOW}:8888"
OBJECT_STORE, OBJECT_STORE_SECRET = f"http://minio-service.{KUBEFLOW}:9000", "mlpipeline-minio-artifact"
CHECKPOINTS = "coterie-e2e-checkpoints"
READY_SECONDS, QUICKSTART_SECONDS = 60, 15 * 60  # at most, as asked for
PARTS = ("policies", "nodes")

SIMULATED = (
    "simulated://groups?groups=3&workers=90&comparisons_per_worker=100&prompts=150&responses=4&accuracy=0.85&seed=1"
)
QUICKSTART = {
    "ingest_source": [SIMULATED],
    "cluster_coteries": "2",
    "evaluate_replicates": 500,
    "encode_max_tokens": 64,
}
POLICIES = QUICKSTART | {
    "align_method": "ppo",
    "align_sft_steps": 2,
    "align_steps": 3,
    "align_batch_size": 8,
    "align_response_tokens": 16,
    "align_dtype": "bfloat16",
    "judge_prompts": 8,
    "judge_best_of": 2,
    "judge_replicates": 100,
    "deploy_namespace": "",
}
NODES = QUICKSTART | {
    "reward_kind": "adapter",
    "reward_nodes": 2,
    "reward_max_steps": 2,
    "reward_batch_size": 2,
    "reward_max_tokens": 96,
    "reward_dtype": "bfloat16",
    "deploy_namespace": "",
}
PLACEMENT = {"stages": {"align": {"gpus": 1}, "reward": {"checkpoints": CHECKPOINTS}}}

QUESTION = {
    "prompt": "How do I plan a week of meals?",
    "responses": ["Perhaps write a list first.", "Write a list now!"],
}


class Failed(Exception):
    """What was seen is not what should be."""


def run(*command: str, stdin: str | None = None, timeout: float = 900, check: bool = True) -> str:
    """Run a command and return what it said; raises Failed with what it complained of."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)[:200]} did not end in {timeout:g} s") from None
    if check and done.returncode:
        raise Failed(f"{' '.join(command)[:200]}: {(done.stderr or done.stdout).strip()[-3000:]}")
    return done.stdout


def kubectl(*arguments: str, **more: Any) -> str:
    """kubectl in the release's namespace."""
    return run("kubectl", "--namespace", NAMESPACE, *arguments, **more)


def say(words: str) -> None:
    """A line of what was seen."""
    print(f"    {words}", flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"==> {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"    {time.monotonic() - began:.0f} s", flush=True)


def see(holds: bool, words: str) -> None:
    """Say what was seen; raise Failed where it does not hold."""
    if not holds:
        raise Failed(words)
    say(words)


class Cluster:
    """The release on the cluster, and pods that ask it.

    Args:
        images: file with the values `images`.
    """

    def __init__(self, images: Path) -> None:
        self.images = images
        self.named: dict[str, str] = yaml.safe_load(images.read_text(encoding="utf-8"))["images"]
        self.number = 0

    def install(self, **values: Any) -> float:
        """Install or upgrade the chart; seconds until all its pods were ready and its hooks had ended."""
        keys = json.loads(run("kubectl", "-n", KUBEFLOW, "get", "secret", OBJECT_STORE_SECRET, "-o", "json"))["data"]
        of_release = {
            "s3": {
                "endpoint": OBJECT_STORE,
                "accessKey": b64decode(keys["accesskey"]).decode(),
                "secretKey": b64decode(keys["secretkey"]).decode(),
            },
            "pipelines": {"host": PIPELINES, "namespace": KUBEFLOW, "placement": PLACEMENT},
            "predictor": {"resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}},
            "router": {"resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}},
        }
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(of_release | values, file)
            file.flush()
            began = time.monotonic()
            where = ("--namespace", NAMESPACE, "--values", str(self.images), "--values", file.name)
            run("helm", "upgrade", "--install", RELEASE, str(CHART), *where, "--wait", "--timeout", "20m", timeout=1300)
            return time.monotonic() - began

    def start(
        self,
        program: str,
        environment: Mapping[str, str],
        secret: str | None = None,
        image: str = "router",
    ) -> str:
        """Start a pod that runs a program of PODS, under what the pod security standard `restricted` asks for; its name."""
        self.number += 1
        pod = f"e2e-{program}-{self.number}"
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod, "labels": {"app": "coterie-e2e"}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": "asks",
                        "image": self.named[image],
                        "command": ["python3", "-c", (PODS / f"{program}.py").read_text(encoding="utf-8")],
                        "env": [{"name": key, "value": value} for key, value in environment.items()],
                        "envFrom": [{"secretRef": {"name": secret}}] if secret else [],
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                            "readOnlyRootFilesystem": True,
                        },
                        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                    }
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}],
            },
        }
        kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        return pod

    def ask(self, program: str, secret: str | None = None, **environment: str) -> Any:
        """What a program of PODS prints last, read as JSON."""
        told = {"SERVICE": SERVICE, "GRPC": GRPC, "QUESTION": json.dumps(QUESTION)} | environment
        return json.loads(self.await_end(self.start(program, told, secret), 240).splitlines()[-1])

    def pull(self) -> None:
        """Bring the images to a node, which is no part of an install's time."""
        for image in self.named:
            self.await_end(self.start("pulled", {}, image=image), 1200)

    def await_end(self, pod: str, seconds: int) -> str:
        """Wait for a pod to end well; what it said."""
        phase, until = "", time.monotonic() + seconds
        while phase not in ("Succeeded", "Failed") and time.monotonic() < until:
            time.sleep(1)
            phase = kubectl("get", "pod", pod, "-o", "jsonpath={.status.phase}")
        said = kubectl("logs", pod, check=False).strip()
        if phase != "Succeeded":
            raise Failed(f"{pod}: {phase}: {said[-2000:]}")
        return said

    @contextmanager
    def under_load(self, rate: int) -> Iterator[None]:
        """Within, `rate` requests a second are sent, every second on a new connection; none of them may fail."""
        pod = self.start("load", {"SERVICE": SERVICE, "QUESTION": json.dumps(QUESTION), "RATE": str(rate)})
        kubectl("wait", "--for=condition=Ready", "pod", pod, "--timeout=120s")
        time.sleep(10)
        yield
        time.sleep(10)
        told = json.loads(kubectl("logs", pod, "--tail=1"))
        kubectl("delete", "pod", pod, "--wait=false")
        versions = ", ".join(f"{name} {count}" for name, count in told["versions"].items())
        say(
            f"{told['answered']} requests answered of {told['sent']}, {told['rate']:.0f} a second; by bundle: {versions}"
        )
        see(not told["failures"], f"failures: {told['failures'] or 'none'}")


def pipeline(python: str, name: str, seconds: int, arguments: Mapping[str, Any]) -> float:
    """Run an uploaded pipeline from a pod's own command, as a scheduled run would; seconds until it succeeded."""
    began = time.monotonic()
    told = [f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arguments.items()]
    command = (python, "-m", "pipelines.upload", "--host", PIPELINES, "--run", name, "--wait", str(seconds), *told)
    for line in run(*command, timeout=seconds + 120).splitlines():
        say(line)
    return time.monotonic() - began


def annotations() -> dict[str, str]:
    """What the InferenceService says that it serves."""
    told = json.loads(kubectl("get", "inferenceservice", RELEASE, "-o", "json"))["metadata"]["annotations"]
    return {name.removeprefix("coterie.dev/"): value for name, value in told.items() if name.startswith("coterie.dev/")}


def check_answers(said: dict[str, Any]) -> None:
    """Known workers are scored by their coterie, strangers by everybody's reward, and gRPC says the same."""
    known = said["known"]
    sources = Counter(one["reason"] or one["source"] for one in known)
    see(sources == {"profile": len(known)}, f"known workers are scored by: {dict(sources)}")
    of_coteries = {one["coterie"]: one["scores"] for one in known}
    see(len(of_coteries) >= 2, f"they are of {len(of_coteries)} coteries")
    see(len({tuple(scores) for scores in of_coteries.values()}) >= 2, f"whose scores differ: {of_coteries}")
    see(said["unknown"]["source"] == "global", f"a stranger is scored globally: {said['unknown']['reason']}")
    see(said["new"]["source"] == "comparisons", "a new person is placed by three comparisons in the request")
    near = max(abs(a - b) for a, b in zip(said["grpc"], known[0]["scores"], strict=True))
    see(near < 1e-4, f"gRPC gives the scores of REST to {near:.1g}")
    see(said["refused"][0] == 400, f"a bad request is refused: {said['refused'][1]}")


def prepare(registry: str, images: Path | None) -> Path:
    """See that the cluster has what is needed, and that the images are there; the file of their digests."""
    with step("the cluster"):
        for kind in ("inferenceservices.serving.kserve.io", "workflows.argoproj.io"):
            run("kubectl", "get", "crd", kind)
        say(run("helm", "version", "--short").strip())
        run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true", timeout=300)
        run("kubectl", "create", "namespace", NAMESPACE)
        level = "pod-security.kubernetes.io/enforce=restricted"
        run("kubectl", "label", "namespace", NAMESPACE, level)
        say(f"namespace {NAMESPACE} enforces the pod security standard restricted")
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CHECKPOINTS, "namespace": KUBEFLOW},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}},
        }
        run("kubectl", "apply", "-f", "-", stdin=json.dumps(claim))
    if images is None:
        with step(f"images, to {registry}"):
            images = ROOT / "build" / "images.yaml"
            run(str(ROOT / "containers" / "images"), registry, timeout=3600)
    for name, image in yaml.safe_load(images.read_text(encoding="utf-8"))["images"].items():
        say(f"{name}: {image}")
    return images


def everything(cluster: Cluster, without: list[str], rate: int, ui: str | None) -> None:
    """All steps from the install to the uninstall."""
    for file in sorted((CHART / "ci").glob("*-values.yaml")):
        with step(f"a server-side dry run of {file.name}"):
            checks = "checks.kserve=false,checks.pipelines=false"  # helm template knows no cluster
            flags = ("--set", f"{checks},pipelines.namespace={KUBEFLOW}")
            rendered = run(
                "helm", "template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(file), *flags, "--no-hooks"
            )
            run("kubectl", "apply", "--dry-run=server", "-f", "-", stdin=rendered)
            say(f"{len([one for one in yaml.safe_load_all(rendered) if one])} objects are accepted")

    with step("the images come to the node"):
        cluster.pull()
    with step("helm install"):
        seconds = cluster.install()
        say(kubectl("get", "pods", "--no-headers").strip().replace("\n", "\n    "))
        see(seconds < READY_SECONDS, f"all pods were ready after {seconds:.0f} s")
    with step("helm test"):
        run("helm", "test", RELEASE, "-n", NAMESPACE)
        say(kubectl("logs", f"{RELEASE}-test").strip().replace("\n", "\n    "))

    with step("the quickstart pipeline, to a served bundle"):
        seconds = pipeline(sys.executable, "coteries", 2 * QUICKSTART_SECONDS, QUICKSTART)
        see(seconds < QUICKSTART_SECONDS, f"served after {seconds:.0f} s: {annotations()}")
    with step("scores, over REST and gRPC"):
        check_answers(cluster.ask("ask"))
    with step("feedback"):
        said = cluster.ask("vote", VOTES="12")
        see(said["outcomes"] == ["stored"] * 12, "12 votes of a stranger are stored")
        see(said["after"]["source"] == "profile", f"who has a profile then: {said['after']['posterior']}")
    with step("pods of router and predictor are killed under load"), cluster.under_load(rate):
        for part in ("transformer", "predictor"):
            selector = f"serving.kserve.io/inferenceservice={RELEASE},component={part}"
            pod = kubectl("get", "pods", "-l", selector, "-o", "jsonpath={.items[0].metadata.name}")
            kubectl("delete", "pod", pod)
            kubectl("rollout", "status", f"deployment/{RELEASE}-{part}", "--timeout=300s")
            say(f"{pod} was deleted, and another took its place")
    with step("an upgrade of the chart under load"), cluster.under_load(rate):
        cluster.install(router={"podAnnotations": {"coterie.dev/e2e": "upgraded"}, "settings": {"cache_seconds": 5}})

    of_three = QUICKSTART | {"cluster_coteries": "3"}
    with step("a bundle of three coteries is made"):
        pipeline(sys.executable, "coteries", 2 * QUICKSTART_SECONDS, of_three | {"deploy_namespace": ""})
    with step("and takes over under load: all but the deploy step is in the cache"):
        before = annotations()["bundle"]
        with cluster.under_load(rate):
            pipeline(sys.executable, "coteries", QUICKSTART_SECONDS, of_three)
        see(annotations()["bundle"] != before, f"it serves: {annotations()}")
        check_answers(cluster.ask("ask"))

    if ui:
        with step("a run that is started in the Kubeflow UI"):
            settings = json.dumps(QUICKSTART | {"deploy_namespace": ""})
            script = Path(__file__).with_name("ui.mjs")
            for line in run("node", str(script), ui, str(ROOT / "build" / "ui"), settings, timeout=4000).splitlines():
                print(line, flush=True)

    if "policies" not in without:
        with step("three updates of PPO for each coterie, in pods that ask for a GPU"):
            pipeline(sys.executable, "coteries", 3600, POLICIES)
    if "nodes" not in without:
        with step("reward adapters trained on two nodes"):
            pipeline(sys.executable, "coteries", 3600, NODES)

    with step("helm test, with what serves"):
        run("helm", "test", RELEASE, "-n", NAMESPACE)
        say(kubectl("logs", f"{RELEASE}-test").strip().replace("\n", "\n    "))
    serves = annotations()
    with step("uninstall"):
        run("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--wait", "--timeout", "10m")
        # Jobs that have ended go by themselves an hour later.
        left = kubectl("get", "pods", "--field-selector=status.phase=Running", "-o", "name")
        left += kubectl("get", "inferenceservices", "-o", "name")
        see(not left.strip(), f"what runs then: {left.split() or 'nothing'}")
    with step("install again, with the bundle that served"):
        cluster.install(bundle={"uri": serves["bundle"], "profiles": serves["profiles"].split(",")[0]})
        check_answers(cluster.ask("ask"))
        count = cluster.ask("count", secret=f"{RELEASE}-stores")
        see(count == 12, f"{count} votes are there, as before")


def main() -> None:
    """Do all of it; print what was seen, step by step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry")
    parser.add_argument("--images", type=Path, help="digests of images that are there, in place of building them")
    parser.add_argument("--without", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--rate", type=int, default=50, help="requests a second under load")
    parser.add_argument("--ui", help="address of the Kubeflow UI, in which a run is started by hand")
    parser.add_argument("--keep", action="store_true", help="leave the release running")
    options = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    began = time.monotonic()
    try:
        images = prepare(options.registry, options.images)
        everything(Cluster(images), options.without, options.rate, options.ui)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        for what in ("get pods -o wide", "get events --sort-by=.lastTimestamp", "get inferenceservices -o yaml"):
            print(f"\n$ kubectl {what}\n{kubectl(*what.split(), check=False)[-3000:]}", file=sys.stderr)
        sys.exit(1)
    if not options.keep:
        run("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--wait", check=False)
        run("kubectl", "delete", "namespace", NAMESPACE, "--wait=true", timeout=300)
        run("kubectl", "-n", KUBEFLOW, "delete", "pvc", CHECKPOINTS, "--wait=false")
    print(f"passed in {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
