"""The chart rendered by helm: what each value does, and what is refused in which words."""

import json
import os
import shutil
import subprocess
from base64 import b64decode
from functools import cache

import pytest
import yaml

from charts.readme import CHART
from coterie.config import ServeSettings

ROOT = CHART.parents[1]
CI = sorted((CHART / "ci").glob("*-values.yaml"))
DASHBOARD = json.loads((CHART / "dashboards" / "coterie.json").read_text(encoding="utf-8"))

HELM = shutil.which(os.environ.get("HELM", "helm"))
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not on PATH; HELM names another")

DIGEST = "@sha256:" + 64 * "a"
IMAGES = {f"images.{name}": f"registry.example/{name}{DIGEST}" for name in ("train", "predictor", "router")}
ANYWHERE = {"checks.kserve": "false", "checks.pipelines": "false"}
RELEASE, NAMESPACE = "people", "tastes"


@cache
def helm(*arguments):
    return subprocess.run([HELM, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def template(values=None, *arguments, checks=False, release=RELEASE, chart=CHART):
    """`helm template` with values by dotted name over images by digest; the documents, or the error in words."""
    given = IMAGES | ({} if checks else ANYWHERE) | (values or {})
    sets = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    done = helm("template", release, chart, "-n", NAMESPACE, *sets, *arguments)
    if done.returncode:
        return done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def one(documents, kind, name):
    assert isinstance(documents, list), documents
    [found] = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def names(documents, kind):
    return {d["metadata"]["name"] for d in documents if d["kind"] == kind}


def service(documents):
    """The InferenceService that the deploy step fills in."""
    serving = one(documents, "ConfigMap", f"{RELEASE}-serving")
    return yaml.safe_load(serving["data"]["inferenceservice.yaml"])


def environment(container):
    return {variable["name"]: variable for variable in container.get("env", [])}


def pod_specs(documents):
    """Every pod that the chart makes, by what makes it; the InferenceService's among them."""
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        name = f"{kind}/{document['metadata']['name']}"
        if kind == "Pod":
            yield name, spec
        elif kind in ("Job", "StatefulSet", "Deployment"):
            yield name, spec["template"]["spec"]
        elif kind == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
    for part in ("predictor", "transformer"):
        yield part, service(documents)["spec"][part]


@needs_helm
@pytest.mark.parametrize("file", [None, *CI], ids=lambda file: file.stem if file else "defaults")
def test_lint(file):
    done = helm("lint", "--strict", CHART, *(["-f", file] if file else []))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
@pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)
def test_every_pod_is_restricted(file):
    documents = template(ANYWHERE, "-f", file)
    found = dict(pod_specs(documents))
    assert {"predictor", "transformer"} < found.keys()
    for name, spec in found.items():
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True, name
        assert pod["runAsUser"] > 0, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert all(isinstance(v.get("value", ""), str) for v in container.get("env", [])), name
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts, name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert all("hostPath" not in volume for volume in volumes.values()), name
        # Only who deploys talks to the API server.
        assert spec["automountServiceAccountToken"] is name.endswith(("-deploy", "-remove")), name


@needs_helm
@pytest.mark.parametrize("file", CI, ids=lambda file: file.stem)
def test_images_go_through_as_they_are_given(file):
    documents = template(ANYWHERE, "-f", file)
    images = {
        c["image"] for _, spec in pod_specs(documents) for c in spec["containers"] + spec.get("initContainers", [])
    }
    assert {IMAGES["images.predictor"], IMAGES["images.router"]} <= images
    assert not [image for image in images if image.endswith(":latest")]
    air_gapped = [image for image in images if not image.startswith(("registry.", "docker.io/"))]
    assert not air_gapped


@needs_helm
def test_air_gapped_values_name_no_registry_outside():
    file = CHART / "ci" / "air-gapped-values.yaml"
    own = yaml.safe_load(file.read_text(encoding="utf-8"))["images"]
    documents = template({f"images.{name}": image for name, image in own.items()}, "-f", file)
    images = {
        c["image"] for _, spec in pod_specs(documents) for c in spec["containers"] + spec.get("initContainers", [])
    }
    assert {image.partition("/")[0] for image in images} == {"registry.internal:5000"}


@needs_helm
def test_the_inference_service():
    made = service(template())
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (RELEASE, NAMESPACE)
    annotations = made["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    assert {"coterie.dev/bundle", "coterie.dev/model-version", "coterie.dev/profiles"} < annotations.keys()
    for part, module, argument, folder in (
        ("predictor", "bundle", "--bundle", "/mnt/models"),
        ("transformer", "profiles", "--profiles", "/mnt/profiles"),
    ):
        spec = made["spec"][part]
        assert spec["deploymentStrategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 2)
        assert spec["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
        [container], [fetch] = spec["containers"], spec["initContainers"]
        assert container["name"] == "kserve-container"
        assert container["image"] == fetch["image"]
        assert container["args"][:4] == [argument, folder, "--model_name", "coterie"]
        assert fetch["name"] == "fetch"
        assert fetch["command"] == ["python3", "-m", "serving.fetch", module]
        assert "AWS_ACCESS_KEY_ID" in environment(fetch)
        assert "AWS_ACCESS_KEY_ID" not in environment(container)
        ready = {"path": "/v2/models/coterie/ready", "port": 8080}
        assert container["readinessProbe"]["httpGet"] == ready
        assert container["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": 8080}
        assert [port["name"] for port in container["ports"]] == ["http", "grpc"]
        told, _, pause = container["lifecycle"]["preStop"]["exec"]["command"][2].partition("; sleep ")
        assert told == "kill -USR1 1"
        assert spec["terminationGracePeriodSeconds"] > int(pause) + ServeSettings().grace_seconds
    told = environment(made["spec"]["transformer"]["containers"][0])
    secrets = {name: v["valueFrom"]["secretKeyRef"]["name"] for name, v in told.items() if "valueFrom" in v}
    stores = dict.fromkeys(("COTERIE_REDIS", "COTERIE_FEEDBACK_DATABASE", "PGPASSWORD"), f"{RELEASE}-stores")
    assert secrets == stores | {"COTERIE_PSEUDONYM_KEY": f"{RELEASE}-pseudonym"}
    assert told["COTERIE_FEEDBACK"]["value"] == "true"
    # The predictor needs no secret of anybody, and has none.
    assert all("valueFrom" not in v for v in made["spec"]["predictor"]["containers"][0]["env"])


@needs_helm
def test_a_service_leads_to_the_routers_grpc():
    documents = template()
    grpc = one(documents, "Service", f"{RELEASE}-grpc")
    router = service(documents)["spec"]["transformer"]
    selector = grpc["spec"]["selector"]
    assert selector.items() <= (service(documents)["metadata"]["labels"] | router["labels"]).items()
    [port] = grpc["spec"]["ports"]
    assert port["targetPort"] in {named["name"] for named in router["containers"][0]["ports"]}


@needs_helm
def test_the_deploy_step_can_fill_the_template_in():
    from serving.deploy import Served, render

    text = one(template(), "ConfigMap", f"{RELEASE}-serving")["data"]["inferenceservice.yaml"]
    made = render(text, RELEASE, Served("pvc://claim/runs/bundle", "v1", ("s3://a/publish", "s3://b/publish")))
    predictor, transformer = made["spec"]["predictor"], made["spec"]["transformer"]
    assert environment(predictor["initContainers"][0])["COTERIE_BUNDLE"]["value"] == "pvc://claim/runs/bundle"
    fetched = environment(transformer["initContainers"][0])["COTERIE_PROFILES"]["value"]
    assert fetched == "s3://a/publish,s3://b/publish"
    assert {"name": "bundle", "persistentVolumeClaim": {"claimName": "claim", "readOnly": True}} in predictor["volumes"]
    mounts = [m for c in predictor["initContainers"] + predictor["containers"] for m in c["volumeMounts"]]
    assert [m["subPath"] for m in mounts if m["name"] == "bundle"] == ["runs/bundle", "runs/bundle"]


@needs_helm
def test_scaling_gpus_nodes_and_settings():
    made = service(
        template(
            {
                "router.autoscaling.enabled": "true",
                "router.settings.cache_workers": 2000000,
                "router.settings.policies": "http://vllm:8000",
                "predictor.gpus": 2,
                "predictor.replicas": 1,
                "predictor.nodeSelector.pool": "gpu",
                "predictor.tolerations[0].key": "nvidia.com/gpu",
                "predictor.priorityClassName": "high",
                "predictor.podAnnotations.team": "tastes",
                "predictor.startupSeconds": 60,
                "predictor.settings.grace_seconds": 100,
                "imagePullSecrets[0]": "registry",
            }
        )
    )
    router, predictor = made["spec"]["transformer"], made["spec"]["predictor"]
    assert router["annotations"]["serving.kserve.io/autoscalerClass"] == "hpa"
    assert (router["minReplicas"], router["maxReplicas"], router["scaleTarget"]) == (2, 10, 70)
    told = environment(router["containers"][0])
    assert told["COTERIE_CACHE_WORKERS"]["value"] == "2000000"
    assert told["COTERIE_POLICIES"]["value"] == "http://vllm:8000"
    for part in ("requests", "limits"):
        assert predictor["containers"][0]["resources"][part]["nvidia.com/gpu"] == 2
        assert "nvidia.com/gpu" not in predictor["initContainers"][0]["resources"][part]
    assert predictor["minReplicas"] == predictor["maxReplicas"] == 1
    assert predictor["nodeSelector"] == {"pool": "gpu"}
    assert predictor["tolerations"] == [{"key": "nvidia.com/gpu"}]
    assert predictor["priorityClassName"] == "high"
    assert predictor["annotations"]["team"] == "tastes"
    assert predictor["containers"][0]["startupProbe"]["failureThreshold"] == 30
    assert predictor["terminationGracePeriodSeconds"] == 115
    assert router["imagePullSecrets"] == predictor["imagePullSecrets"] == [{"name": "registry"}]


@needs_helm
def test_a_large_whole_number_of_a_file_is_written_as_one(tmp_path):
    file = tmp_path / "values.yaml"
    file.write_text("predictor: {settings: {queue_texts: 2000000, batch_wait_ms: 2.5}}\nfeedback: {dailyCap: 3000000}")
    made = service(template(None, "-f", file))["spec"]
    told = environment(made["predictor"]["containers"][0])
    assert (told["COTERIE_QUEUE_TEXTS"]["value"], told["COTERIE_BATCH_WAIT_MS"]["value"]) == ("2000000", "2.5")
    assert environment(made["transformer"]["containers"][0])["COTERIE_FEEDBACK_DAILY_CAP"]["value"] == "3000000"


def decoded(secret):
    return {name: b64decode(value).decode() for name, value in secret["data"].items()}


@needs_helm
def test_secrets_agree_with_each_other_and_are_kept():
    documents = template(
        {"token.enabled": "true", "s3.accessKey": "reader", "s3.secretKey": "s", "s3.endpoint": "http://m:9"}
    )
    stores, told = (decoded(one(documents, "Secret", name)) for name in (f"{RELEASE}-stores", "coterie-pipeline"))
    key = decoded(one(documents, "Secret", f"{RELEASE}-pseudonym"))["COTERIE_PSEUDONYM_KEY"]
    assert len(key) >= 32
    assert stores["COTERIE_REDIS"] == f"{RELEASE}-redis.{NAMESPACE}:6379,password={stores['REDIS_PASSWORD']}"
    assert stores["PGPASSWORD"] == stores["POSTGRESQL_PASSWORD"] != stores["REDIS_PASSWORD"]
    address = f"postgresql+psycopg://coterie@{RELEASE}-postgresql.{NAMESPACE}:5432/coterie"
    assert stores["COTERIE_FEEDBACK_DATABASE"] == address
    token = decoded(one(documents, "Secret", f"{RELEASE}-token"))["COTERIE_TOKEN"]
    wanted = {name: stores[name] for name in ("COTERIE_REDIS", "COTERIE_FEEDBACK_DATABASE", "PGPASSWORD")}
    store = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "http://m:9"}
    region = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    assert told == wanted | store | region | {"COTERIE_PSEUDONYM_KEY": key, "COTERIE_TOKEN": token}
    for name in ("stores", "pseudonym", "token"):
        kept = one(documents, "Secret", f"{RELEASE}-{name}")["metadata"]["annotations"]
        assert kept == {"helm.sh/resource-policy": "keep"}
    # What is generated is another at every install; another value, so that helm is asked again.
    again = decoded(one(template({"s3.region": "elsewhere"}), "Secret", f"{RELEASE}-stores"))
    assert again["REDIS_PASSWORD"] != stores["REDIS_PASSWORD"]
    # Volumes of a StatefulSet stay when it goes.
    for name in ("redis", "postgresql"):
        policy = one(documents, "StatefulSet", f"{RELEASE}-{name}")["spec"]["persistentVolumeClaimRetentionPolicy"]
        assert policy == {"whenDeleted": "Retain", "whenScaled": "Retain"}


@needs_helm
def test_existing_stores_and_secrets_take_the_place_of_the_charts():
    documents = template(None, "-f", CHART / "ci" / "existing-stores-values.yaml")
    assert not names(documents, "StatefulSet")
    assert not names(documents, "Secret")
    told = environment(service(documents)["spec"]["transformer"]["containers"][0])
    assert told["COTERIE_REDIS"]["valueFrom"]["secretKeyRef"]["name"] == "coterie-stores-of-ours"
    assert told["COTERIE_PSEUDONYM_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "coterie-pseudonym-of-ours"
    policy = one(documents, "NetworkPolicy", f"{RELEASE}-router")
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert ports == {53, 443, 8080, 8081, 6380, 5433}
    given = template({"redis.enabled": "false", "redis.connection": "redis.stores:6379", "redis.password": "pw"})
    assert decoded(one(given, "Secret", f"{RELEASE}-stores"))["COTERIE_REDIS"] == "redis.stores:6379,password=pw"


@needs_helm
def test_who_may_do_what():
    documents = template()
    role = one(documents, "Role", f"{RELEASE}-deployer")
    assert role["metadata"]["namespace"] == NAMESPACE
    verbs = {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}
    assert verbs == {
        "inferenceservices": {"get", "list", "watch", "create", "update", "patch", "delete"},
        "deployments": {"get", "list", "watch"},
        "pods": {"get", "list", "watch"},
        "pods/log": {"get"},
        "events": {"get", "list"},
        "configmaps": {"get"},
    }
    [of_configmaps] = [rule for rule in role["rules"] if rule["resources"] == ["configmaps"]]
    assert of_configmaps["resourceNames"] == [f"{RELEASE}-serving"]
    bound = one(documents, "RoleBinding", f"{RELEASE}-deployer")["subjects"]
    assert [(s["name"], s["namespace"]) for s in bound] == [
        (f"{RELEASE}-deployer", NAMESPACE),
        ("pipeline-runner", "kubeflow"),
    ]
    nodes = one(documents, "Role", f"{NAMESPACE}-{RELEASE}-pipeline")
    assert nodes["metadata"]["namespace"] == "kubeflow"
    assert {resource for rule in nodes["rules"] for resource in rule["resources"]} == {
        "trainjobs",
        "trainingruntimes",
        "pods",
        "pods/log",
    }
    assert not [d for d in documents if d["kind"].startswith("Cluster")]
    alone = template({"pipelines.enabled": "false"})
    assert {d["metadata"].get("namespace") for d in alone} == {NAMESPACE}
    assert len(one(alone, "RoleBinding", f"{RELEASE}-deployer")["subjects"]) == 1


def job(documents, name):
    made = one(documents, "Job", f"{RELEASE}-{name}")
    [container] = made["spec"]["template"]["spec"]["containers"]
    return made["metadata"]["annotations"]["helm.sh/hook"], container["command"], container["args"]


@needs_helm
def test_the_deploy_step_is_a_hook():
    release = [f"--namespace={NAMESPACE}", f"--release={RELEASE}"]
    bundle = {"bundle.uri": "s3://b/bundle", "bundle.profiles": "s3://b/publish", "deploy.timeout": 600}
    hook, command, arguments = job(template(bundle), "deploy")
    assert (hook, command) == ("post-install", ["python3", "-m", "serving.deploy"])
    assert arguments == [*release, "--timeout=600", "--bundle=s3://b/bundle", "--profiles=s3://b/publish"]
    assert f"{RELEASE}-deploy" not in names(template(), "Job")
    hook, _, arguments = job(template(None, "--is-upgrade"), "deploy")
    assert hook == "post-upgrade,post-rollback"
    assert arguments == [*release, "--timeout=900", "--incumbent"]
    hook, _, arguments = job(template(), "remove")
    assert hook == "pre-delete"
    assert arguments == [*release, "--timeout=240", "--remove"]


@needs_helm
def test_the_hooks_arguments_are_the_deploy_steps_own():
    from serving.deploy import main

    options = {option for parameter in main.params for option in parameter.opts}
    bundle = {"bundle.uri": "s3://b/bundle", "bundle.profiles": "s3://b/publish"}
    for documents in (template(bundle), template(None, "--is-upgrade")):
        for name in ("deploy", "remove"):
            if f"{RELEASE}-{name}" in names(documents, "Job"):
                given = {argument.partition("=")[0] for argument in job(documents, name)[2]}
                assert given <= options


@needs_helm
def test_the_upload_and_the_refresh():
    documents = template(
        {
            "pipelines.host": "http://kfp:8888",
            "pipelines.defaults.ingest_source": "{s3://a/votes.jsonl}",
            "pipelines.defaults.deploy_release": "other",
            "pipelines.placement.stages.reward.gpus": 1,
            "pipelines.multiUser": "true",
            "refresh.enabled": "true",
            "refresh.run": "s3://a/runs/first",
            "refresh.schedule": "@weekly",
        }
    )
    hook, command, arguments = job(documents, "upload")
    assert (hook, command) == ("post-install,post-upgrade,post-rollback", ["python3", "-m", "pipelines.upload"])
    assert arguments[:3] == [
        "--host=http://kfp:8888",
        f"--image={IMAGES['images.train']}",
        "--placement=/etc/coterie-placement/placement.yaml",
    ]
    form = dict(value.split("=", 1) for value in arguments[4::2])
    assert set(arguments[3::2]) == {"--default"}
    database = f"postgresql+psycopg://coterie@{RELEASE}-postgresql.{NAMESPACE}:5432/coterie"
    assert form == {
        "database": database,
        "deploy_namespace": NAMESPACE,
        "deploy_release": "other",
        "deploy_timeout": "900",
        "ingest_source": '["s3://a/votes.jsonl"]',
        "publish_online_store": "redis",
        "publish_project": RELEASE,
    }
    placement = one(documents, "ConfigMap", f"{RELEASE}-placement")["data"]["placement.yaml"]
    assert yaml.safe_load(placement) == {"stages": {"reward": {"gpus": 1}}}
    refresh = one(documents, "CronJob", f"{RELEASE}-refresh")["spec"]
    assert refresh["schedule"] == "@weekly"
    pod = refresh["jobTemplate"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"][:2] == ["--host=http://kfp:8888", "--run=refresh"]
    given = dict(value.split("=", 1) for value in container["args"][3::2])
    assert given == {k: v for k, v in form.items() if k != "ingest_source"} | {
        "run": "s3://a/runs/first",
        "always": "false",
    }
    [token] = [volume for volume in pod["volumes"] if volume["name"] == "token"]
    assert token["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert f"{RELEASE}-refresh" not in names(template(), "CronJob")
    assert f"{RELEASE}-upload" not in names(template({"pipelines.upload": "false"}), "Job")


@needs_helm
def test_the_forms_defaults_are_parameters_of_the_pipelines():
    arguments = job(template(), "upload")[2]
    given = {value.partition("=")[0] for value in arguments[3::2]}
    parameters = set()
    for name in ("coteries", "refresh"):
        text = (ROOT / "pipelines" / f"{name}.yaml").read_text(encoding="utf-8")
        pipeline = next(document for document in yaml.safe_load_all(text) if "root" in document)
        parameters |= pipeline["root"]["inputDefinitions"]["parameters"].keys()
    assert given <= parameters


@needs_helm
def test_sqlite_for_one_router():
    values = {"feedback.database": "sqlite:////var/lib/coterie/feedback.db", "postgresql.enabled": "false"}
    assert "one router" in template(values)
    one_router = values | {"router.replicas": 1}
    assert "router allows 10" in template(one_router | {"router.autoscaling.enabled": "true"})
    documents = template(one_router)
    router = service(documents)["spec"]["transformer"]
    # Two routers must not write to one file, not even during a rollout.
    assert router["deploymentStrategy"] == {"type": "Recreate"}
    assert {"name": "feedback", "mountPath": "/var/lib/coterie"} in router["containers"][0]["volumeMounts"]
    claim = one(documents, "PersistentVolumeClaim", f"{RELEASE}-feedback")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"router.replica": 3}, ["/router", "replica"]),
        ({"router.replicas": "many"}, ["/router/replicas", "got string, want integer"]),
        ({"monitorin.rules.enabled": "true"}, ["monitorin"]),
        ({"router.settings.profile_deadline": 3}, ["/router/settings", "profile_deadline"]),
        ({"pipelines.placement.stages.rewards.gpus": 1}, ["/pipelines/placement/stages", "rewards"]),
        ({"feedback.holdout": 0.9}, ["/feedback/holdout"]),
        ({"feedback.database": "mysql://a@b/c"}, ["/feedback/database"]),
        ({"bundle.uri": "models/bundle"}, ["/bundle/uri"]),
        ({"images.router": ""}, ["images.router is not given", "make images"]),
        ({"images.router": "registry.example/router"}, ["images.router", "neither digest nor tag"]),
        ({"images.router": "registry.example/router:latest"}, ["images.router", "by digest"]),
        ({"images.router": "registry.example/router@sha256:abc"}, ["images.router", "64 hexadecimal"]),
        ({"redis.enabled": "false"}, ["Without Redis", "redis.enabled=true"]),
        ({"postgresql.enabled": "false"}, ["feedback.enabled needs a database"]),
        ({"redis.connection": "a:1"}, ["redis.enabled=false"]),
        ({"feedback.database": "postgresql+psycopg://a@b/c"}, ["postgresql.enabled=false"]),
        (
            {"router.autoscaling.enabled": "true", "router.autoscaling.maxReplicas": 1},
            ["router.autoscaling.maxReplicas"],
        ),
        ({"bundle.uri": "s3://b/bundle"}, ["bundle.profiles"]),
        ({"s3.accessKey": "a"}, ["s3.secretKey"]),
        ({"refresh.enabled": "true"}, ["refresh.run"]),
        ({"pseudonym.key": "short"}, ["/pseudonym/key"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_words(values, words):
    said = template(values)
    assert isinstance(said, str), "rendered"
    for word in words:
        assert word in said


@needs_helm
def test_a_cluster_without_kserve_or_kubeflow_is_told_what_is_missing():
    new = ("--kube-version", "1.34.0")
    kserve, argo = "serving.kserve.io/v1beta1/InferenceService", "argoproj.io/v1alpha1/Workflow"
    assert "Install KServe first" in template(None, *new, checks=True)
    assert "pipelines.enabled=false" in template(None, *new, "--api-versions", kserve, checks=True)
    both = (*new, "--api-versions", kserve, "--api-versions", argo)
    assert isinstance(template(None, *both, checks=True), list)
    assert "1.27" in template(None, *both[2:], "--kube-version", "1.26.0", checks=True)
    assert "begins with a letter" in template(release="1st")


@needs_helm
def test_network_policies_name_who_may_connect():
    documents = template({"networkPolicies.enabled": "true", "s3.endpoint": "http://minio-service.kubeflow:9000"})
    made = {name: one(documents, "NetworkPolicy", name)["spec"] for name in names(documents, "NetworkPolicy")}
    assert made.keys() == {f"{RELEASE}-{name}" for name in ("router", "predictor", "redis", "postgresql")}

    def components(rules, side):
        return {
            peer["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
            for rule in rules
            for peer in rule.get(side, [])
            if "podSelector" in peer
        }

    assert components(made[f"{RELEASE}-router"]["egress"], "to") == {"predictor", "redis", "postgresql"}
    assert components(made[f"{RELEASE}-predictor"]["ingress"], "from") == {"router", None}  # None: the chart's Jobs
    assert made[f"{RELEASE}-postgresql"]["egress"] == []
    assert {"ports": [{"port": 9000}]} in made[f"{RELEASE}-predictor"]["egress"]
    runs = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}
    assert runs in made[f"{RELEASE}-redis"]["ingress"][0]["from"]
    assert not names(template(), "NetworkPolicy")
    # Each policy, budget and monitor finds the pods that the InferenceService has.
    labels = service(documents)["metadata"]["labels"]
    for part, component in (("predictor", "predictor"), ("transformer", "router")):
        of_pod = labels | service(documents)["spec"][part]["labels"]
        for document in (
            made[f"{RELEASE}-{component}"]["podSelector"],
            one(documents, "PodDisruptionBudget", f"{RELEASE}-{component}")["spec"]["selector"],
        ):
            assert document["matchLabels"].items() <= of_pod.items()


@needs_helm
def test_monitoring():
    on = dict.fromkeys((f"monitoring.{what}.enabled" for what in ("serviceMonitor", "rules", "dashboard")), "true")
    documents = template(
        on | {"monitoring.rules.runbook": "https://docs.example/operate", "monitoring.rules.labels.a": "b"}
    )
    rules = one(documents, "PrometheusRule", RELEASE)
    assert rules["metadata"]["labels"]["a"] == "b"
    [group] = rules["spec"]["groups"]
    for rule in group["rules"]:
        assert f'namespace="{NAMESPACE}"' in rule["expr"], rule["alert"]
        assert rule["annotations"]["runbook_url"] == f"https://docs.example/operate#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["expr"].count("{") == rule["expr"].count("}")
        assert rule["expr"].count("(") == rule["expr"].count(")")
    dashboard = one(documents, "ConfigMap", f"{RELEASE}-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["coterie.json"]) == DASHBOARD
    monitor = one(documents, "ServiceMonitor", RELEASE)["spec"]
    assert monitor["selector"] == {"matchLabels": {"serving.kserve.io/inferenceservice": RELEASE}}
    # KServe names the Service's port as the container's.
    assert (
        monitor["endpoints"][0]["port"] == service(documents)["spec"]["predictor"]["containers"][0]["ports"][0]["name"]
    )
    quiet = template(on | {"feedback.enabled": "false"})
    [group] = one(quiet, "PrometheusRule", RELEASE)["spec"]["groups"]
    assert not [rule for rule in group["rules"] if "Feedback" in rule["alert"]]


@needs_helm
def test_names_of_two_releases_differ():
    first, second = template(), template(release="others")
    theirs = {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in first} & {
        (d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in second
    }
    assert theirs == {("Secret", "kubeflow", "coterie-pipeline")}  # which the second is refused, by its owner


@needs_helm
def test_the_test_pod_runs_the_check():
    pod = one(template(), "Pod", f"{RELEASE}-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    script = (CHART / "files" / "check.py").read_text(encoding="utf-8")
    assert container["args"][0].strip() == script.strip()
    told = environment(container)
    assert told["ROUTER"]["value"] == f"http://{RELEASE}-transformer.{NAMESPACE}"


@needs_helm
def test_notes_say_what_to_do_next(tmp_path):
    # `helm template` renders the notes and does not show them; a document that holds them is shown.
    chart = shutil.copytree(CHART, tmp_path / "coterie")
    notes = (chart / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    shown = "".join(f"  {line}\n" for line in notes.splitlines())
    (chart / "templates" / "shown.yaml").write_text(f"kind: Notes\nmetadata: {{name: notes}}\ntext: |\n{shown}")
    said = one(template(chart=chart), "Notes", "notes")["text"]
    assert f"helm test {RELEASE} -n {NAMESPACE}" in said
    assert f"service/{RELEASE}-transformer" in said
    assert "Nothing is served yet" in said
    assert "WARNING" not in said
    tagged = one(template({"images.router": "registry.example/router:dev"}, chart=chart), "Notes", "notes")["text"]
    assert "WARNING: images.router is registry.example/router:dev, a tag." in tagged
