"""What stands in for a cluster in tests of the deploy step: Kubernetes' API over HTTP, and what KServe makes of a service."""

import copy
import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from staged import TextEncoder
from stand_ins import JsonHandler

from coterie.answers import Asked, answer
from coterie.bundle import Bundle
from coterie.contracts import PredictResponse, RoutedInstance
from coterie.scoring import Scorer
from serving.deploy import ANNOTATIONS

CORE, APPS = "/api/v1/namespaces/team", "/apis/apps/v1/namespaces/team"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices"
TEMPLATE = """
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: mine
  labels: {app.kubernetes.io/part-of: coterie}
  annotations: {serving.kserve.io/deploymentMode: Standard}
spec:
  predictor:
    minReplicas: 2
    deploymentStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 0}}
    initContainers:
      - name: fetch
        image: IMAGE
        command: [python3, -m, serving.fetch, bundle]
        env: [{name: AWS_REGION, value: here}]
        volumeMounts: [{name: bundle, mountPath: /mnt/models}]
    containers:
      - name: kserve-container
        image: IMAGE
        volumeMounts: [{name: bundle, mountPath: /mnt/models, readOnly: true}, {name: tmp, mountPath: /tmp}]
    volumes: [{name: bundle, emptyDir: {}}, {name: tmp, emptyDir: {}}]
  transformer:
    minReplicas: 2
    initContainers:
      - {name: fetch, image: IMAGE, volumeMounts: [{name: profiles, mountPath: /mnt/profiles}]}
    containers: [{name: kserve-container, image: IMAGE}]
    volumes: [{name: profiles, emptyDir: {}}]
"""


def status(name, restarts=0, last=None, **state):
    """Of a container."""
    told = {"name": name, "image": "", "imageID": "", "ready": False, "restartCount": restarts, "state": state}
    return told | ({"lastState": last} if last else {})


class Cluster:
    """One InferenceService and what KServe would make of it.

    Attributes:
        service: the InferenceService that is there, None without one.
        written: every one that was written, oldest first.
        template: of the chart; None: it is not installed.
        trouble: answers to the next requests that they name, in place of the real ones: (method, path, code, message).
        broken: what the pods of a revision look like that cannot start, by whether it is this InferenceService's.
        off: what the encoder of the pods computes otherwise.
        between: called before a write is looked at.
    """

    def __init__(self):
        self.service, self.written, self.template, self.trouble, self.log = (
            None,
            [],
            TEMPLATE.replace("IMAGE", "one"),
            [],
            [],
        )
        self.deployments, self.broken, self.off, self.lines, self.between = {}, lambda service: None, 0.0, {}, None
        self.scorers, self.answers, self.version, self.lock = {}, [], 0, threading.RLock()
        handler = type("Handler", (_Handler,), {"cluster": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def write(self, body):
        """As the API server and KServe's controller do."""
        self.version += 1
        body["metadata"] |= {
            "resourceVersion": str(self.version),
            "uid": "1",
            "finalizers": ["inferenceservice.finalizers"],
        }
        body["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}  # stale at once
        self.service = body
        self.written.append(copy.deepcopy(body))
        for part in ("predictor", "transformer"):
            stale = self.deployments[part][-1] if part in self.deployments else None
            self.deployments[part] = [*([stale] if stale else []), *self.rollout(part, body, stale)]
        return body

    def rollout(self, part, service, stale):
        """What is seen of a Deployment, one look after the other; the last stays."""
        spec, number = service["spec"][part], self.version
        new = {
            "metadata": {"name": f"mine-{part}", "generation": number},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"app": f"isvc.mine-{part}"}},
                "template": {"spec": {key: spec[key] for key in ("initContainers", "containers", "volumes")}},
            },
        }
        done = {"observedGeneration": number, "updatedReplicas": 2, "replicas": 2, "availableReplicas": 2}
        half = done | {"updatedReplicas": 1, "replicas": 3 if stale else 1, "availableReplicas": 2 if stale else 0}
        unseen = [new | {"status": stale["status"]}] if stale else []
        ends = [] if self.broken(service) else [new | {"status": done}]
        return [*unseen, new | {"status": half}, *ends]

    def look(self, part):
        states = self.deployments[part]
        return states.pop(0) if len(states) > 1 else states[0]

    def pods(self, part):
        """One of before, and of a rollout that is not done one of the new revision."""
        spec = self.deployments[part][-1]["spec"]["template"]["spec"]
        trouble = self.broken(self.service) if part == "predictor" else None
        found = [{"metadata": {"name": f"{part}-new"}, "spec": spec, "status": trouble or {"phase": "Running"}}]
        old = {"initContainers": [{"name": "fetch", "env": [{"name": "COTERIE_REVISION", "value": "of before"}]}]}
        old["containers"], failed = [], status("kserve-container", 9, terminated={"exitCode": 1})
        return [{"metadata": {"name": f"{part}-old"}, "spec": old, "status": {"containerStatuses": [failed]}}, *found]

    def delete(self):
        self.service, self.deployments = None, {}

    def predict(self, body):
        """The router's answer, by the bundle that the predictor's Deployment holds, or that `answers` name first."""
        container = self.deployments["predictor"][-1]["spec"]["template"]["spec"]["initContainers"][0]
        bundle = next(one["value"] for one in container["env"] if one["name"] == "COTERIE_BUNDLE")
        bundle = self.answers.pop(0) if self.answers else bundle
        if (bundle, self.off) not in self.scorers:
            self.scorers[bundle, self.off] = Scorer(Bundle.load(Path(bundle)), TextEncoder(self.off))
        scorer = self.scorers[bundle, self.off]
        asked = [Asked(RoutedInstance(**one), body["explain"]) for one in body["instances"]]
        return PredictResponse(predictions=answer(scorer, asked)).model_dump()

    @property
    def serves(self):
        """Address of the bundle that serves."""
        return self.service["metadata"]["annotations"][ANNOTATIONS["bundle"]]


class _Handler(JsonHandler):
    def refuse(self, code, message):
        self.answer({"kind": "Status", "message": message, "code": code}, code)

    def handle_any(self):
        with self.cluster.lock:
            self.route()

    def route(self):
        cluster, url = self.cluster, urlparse(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        path, asked = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        cluster.log.append((self.command, path))
        if cluster.trouble and (self.command, path) == cluster.trouble[0][:2]:
            return self.refuse(*cluster.trouble.pop(0)[2:])
        if path == "/v1/models/coterie:predict":
            return self.answer(cluster.predict(body))
        if path == f"{CORE}/configmaps/mine-serving" and cluster.template is not None:
            return self.answer({"data": {"inferenceservice.yaml": cluster.template}})
        if path == SERVICES and self.command == "POST":
            return self.answer(cluster.write(body), 201)
        if path == f"{SERVICES}/mine" and cluster.service is not None:
            if self.command == "PUT":
                between, cluster.between = cluster.between, None
                if between is not None:
                    between()
                if body["metadata"]["resourceVersion"] != cluster.service["metadata"]["resourceVersion"]:
                    return self.refuse(409, "the object has been modified")
                return self.answer(cluster.write(body))
            if self.command == "DELETE":
                cluster.delete()
                return self.answer({"status": "Success"})
            return self.answer(cluster.service)
        part = path.rpartition("-")[2]
        if path.startswith(f"{APPS}/deployments/mine-") and part in cluster.deployments:
            return self.answer(cluster.look(part))
        if path == f"{CORE}/pods":
            return self.answer({"items": cluster.pods(asked["labelSelector"].rpartition("-")[2])})
        if path.endswith("/log"):
            lines = cluster.lines.get((path.split("/")[-2], asked["container"], asked["previous"]), [])
            return self.answer("".join(f"{line}\n" for line in lines[-int(asked["tailLines"]) :]))
        return self.refuse(404, f"{path} not found")

    do_GET = do_POST = do_PUT = do_DELETE = handle_any
