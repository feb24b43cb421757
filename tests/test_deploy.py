"""The deploy step against a Kubernetes API over HTTP, by the real clients; what its pods would answer comes from real bundles."""

import copy
import json
import os
import shutil
import signal
import threading

import pytest
import yaml
from click.testing import CliRunner
from kserve_cluster import SERVICES, TEMPLATE, Cluster, status
from kubernetes.config import kube_config
from staged import TextEncoder, everything
from test_promotion import turned

from coterie import stages
from coterie.bundle import Bundle
from coterie.config import DeploySettings
from coterie.errors import BackendUnavailable, BadConfiguration, RunFailed
from coterie.promotion import compare_versions
from coterie.scoring import Scorer
from serving import confirmation, rollout
from serving import deploy as step
from serving.deploy import ANNOTATIONS, deploy, deploy_incumbent, remove
from serving.rollout import revision
from tests import served

SETTINGS = DeploySettings(namespace="team", release="mine", timeout=120)
PROFILES = "s3://runs/first/publish"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    made = Cluster()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": made.address}}],
        "users": [{"name": "test", "user": {"token": "test"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(rollout, "_POLL", 0.02)
    monkeypatch.setattr(rollout, "_RETRY", rollout._RETRY.new(total=2, backoff_factor=0))
    monkeypatch.setattr(confirmation, "_PAUSE", 0.01)
    monkeypatch.setattr(step, "_LEAST", 0.5)
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Folders of a bundle of two coteries, one of a single taste, and one that wants the opposite; and the run of the first."""
    root = tmp_path_factory.mktemp("bundles")
    two, one = everything(root / "two"), everything(root / "one", coteries=1)
    return {"two": two.bundle, "one": one.bundle, "worse": turned(two.bundle, root / "worse"), "run": two}


def put(bundle, cluster, profiles=PROFILES, settings=SETTINGS, **more):
    return deploy(str(bundle), profiles, settings, url=cluster.address, **more)


def environment(service, part):
    return {one["name"]: one["value"] for one in service["spec"][part]["initContainers"][0]["env"]}


# ---------------------------------------------------------------------------------------------------------------- tests
def test_a_first_bundle_is_deployed_and_confirmed_by_a_real_server(cluster, tmp_path):
    served.make_bundle(tmp_path)
    served.publish_profiles(tmp_path)
    with served.serving(tmp_path, environ={"COTERIE_TOKEN": "open sesame"}) as (_, url, _log):
        with pytest.raises(RunFailed, match=r"answered 401: .*Give this step the router's COTERIE_TOKEN"):
            deploy(str(tmp_path / "bundle"), PROFILES, SETTINGS, url=url)
        assert cluster.service is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COTERIE_TOKEN", "open sesame")
            told = deploy(str(tmp_path / "bundle"), PROFILES, SETTINGS, url=url)
    version = Bundle.load(tmp_path / "bundle").manifest.model_version
    assert (told["deployed"], told["model_version"], told["mixture_version"]) == (True, version, "m1")
    service = cluster.service
    template = yaml.safe_load(cluster.template)
    told = {"bundle": str(tmp_path / "bundle"), "version": version, "profiles": PROFILES}
    annotations = template["metadata"]["annotations"] | {ANNOTATIONS[name]: value for name, value in told.items()}
    assert service["metadata"]["annotations"] == annotations
    assert service["metadata"]["labels"] == template["metadata"]["labels"]
    of_predictor, of_transformer = (environment(service, part) for part in ("predictor", "transformer"))
    assert of_predictor.pop("COTERIE_REVISION") == of_transformer.pop("COTERIE_REVISION")
    assert of_predictor == {"AWS_REGION": "here", "COTERIE_BUNDLE": told["bundle"], "COTERIE_MODEL_VERSION": version}
    assert of_transformer == {"COTERIE_PROFILES": PROFILES}
    for part in ("predictor", "transformer"):
        service["spec"][part]["initContainers"][0].pop("env")
        template["spec"][part]["initContainers"][0].pop("env", None)
    assert service["spec"] == template["spec"]


def test_a_bundle_with_another_number_of_coteries_follows_and_both_profiles_stay_online(cluster, bundles, caplog):
    caplog.set_level("INFO", "coterie")
    put(bundles["two"], cluster, "s3://runs/older/publish")
    put(bundles["worse"], cluster, "s3://runs/two/publish")
    caplog.clear()
    told = put(bundles["one"], cluster, "s3://runs/one/publish")
    assert told["model_version"] == Bundle.load(bundles["one"]).manifest.model_version
    assert cluster.serves == str(bundles["one"])
    assert (
        environment(cluster.service, "transformer")["COTERIE_PROFILES"] == "s3://runs/one/publish,s3://runs/two/publish"
    )
    assert cluster.service["metadata"]["finalizers"] == ["inferenceservice.finalizers"]
    # The service says Ready all the time: what is waited for is each Deployment's own rollout.
    seen = [record.message for record in caplog.records if record.message.startswith("mine-predictor")]
    assert seen == [
        "mine-predictor: KServe has not updated it yet",
        "mine-predictor: its update is not seen yet",
        "mine-predictor: 1 of 2 replicas are new, 2 old ones are there, 2 answer",
        "mine-predictor: all replicas are new and answer",
    ]


def test_the_same_again_changes_nothing_and_is_confirmed(cluster, bundles):
    put(bundles["two"], cluster)
    assert put(bundles["two"], cluster)["deployed"]
    assert len(cluster.written) == 1


def test_old_replicas_that_still_answer_are_waited_for(cluster, bundles):
    put(bundles["two"], cluster)
    asked = ("POST", "/v1/models/coterie:predict")
    before = cluster.log.count(asked)
    old, new = str(bundles["two"]), str(bundles["one"])
    cluster.answers = [new, new, old, new, new, new, new]
    cluster.trouble = [(*asked, 503, "no endpoints")]
    assert put(bundles["one"], cluster)["deployed"]
    assert cluster.log.count(asked) - before == 1 + 3 + 5  # one unanswered, two and an old one, five in a row
    cluster.answers = [new] * 10_000
    with pytest.raises(RunFailed, match=r"the bundle \w+ answers, not \w+\..*\n.*what served before serves again"):
        put(bundles["two"], cluster, settings=SETTINGS.model_copy(update={"timeout": 5}))


def test_a_bundle_whose_golden_scores_come_out_otherwise_is_undone(cluster, bundles):
    put(bundles["two"], cluster)
    before = copy.deepcopy(cluster.service)
    cluster.off = 0.05
    with pytest.raises(RunFailed, match=r"golden score \(global\) .* is off by .*\n.*what served before serves again"):
        put(bundles["one"], cluster, "s3://runs/one/publish")
    assert cluster.serves == str(bundles["two"])
    for place in ("spec", "metadata"):
        then, now = (dict(one[place]) for one in (before, cluster.service))
        assert now | {"resourceVersion": 0} == then | {"resourceVersion": 0}
    cluster.delete()
    with pytest.raises(RunFailed, match="nothing serves, as before"):
        put(bundles["two"], cluster)
    assert cluster.service is None


def crash(restarts):
    ended = {"terminated": {"exitCode": 2, "reason": "Error"}}
    return status("kserve-container", restarts, ended, waiting={"reason": "CrashLoopBackOff", "message": "back-off"})


NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}


@pytest.mark.parametrize(
    ("told", "said", "quoted"),
    [
        (
            {"containerStatuses": [crash(2)]},
            "container kserve-container of the pod predictor-new: Error, exit code 2, 2 times",
            True,
        ),
        (
            {"initContainerStatuses": [status("fetch", terminated={"exitCode": 2})]},
            r"container fetch of the pod predictor-new: Error, exit code 2\.",
            True,
        ),
        (
            {"containerStatuses": [status("c", waiting={"reason": "ImagePullBackOff", "message": "no such image"})]},
            r"container c of the pod predictor-new: ImagePullBackOff: no such image\.",
            False,
        ),
        (
            {"containerStatuses": [status("c", waiting={"reason": "CreateContainerConfigError", "message": "no key"})]},
            "CreateContainerConfigError: no key",
            False,
        ),
        ({"conditions": [NO_NODE]}, "no node takes the pod predictor-new: 0/3 nodes: no GPU", False),
    ],
    ids=["crash", "fetch", "image", "secret", "node"],
)
def test_a_pod_that_cannot_start_ends_the_wait_with_its_reason(cluster, bundles, monkeypatch, told, said, quoted):
    monkeypatch.setattr(rollout, "_NO_NODE", 0.1)
    put(bundles["two"], cluster)
    cluster.broken = lambda service: told if cluster.serves == str(bundles["one"]) else None
    for container, previous in (("kserve-container", "True"), ("fetch", "False")):
        cluster.lines["predictor-new", container, previous] = [f"line {i}" for i in range(30)]
    with pytest.raises(RunFailed, match=said) as failed:
        put(bundles["one"], cluster, settings=SETTINGS.model_copy(update={"timeout": 600}))
    lines = [line.strip() for line in str(failed.value).splitlines() if line.startswith("    line")]
    assert lines == ([f"line {i}" for i in range(10, 30)] if quoted else [])
    assert "what served before serves again" in str(failed.value)
    assert cluster.serves == str(bundles["two"])


def test_one_restart_is_no_crash_loop_and_a_rollout_that_takes_too_long_is_undone(cluster, bundles):
    put(bundles["two"], cluster)
    cluster.broken = lambda service: (
        {"containerStatuses": [crash(1)]} if cluster.serves == str(bundles["one"]) else None
    )
    with pytest.raises(RunFailed, match="the rollout did not end in time: mine-predictor: 1 of 2 replicas are new"):
        put(bundles["one"], cluster, settings=SETTINGS.model_copy(update={"timeout": 5}))
    assert cluster.serves == str(bundles["two"])


def test_a_step_that_is_stopped_puts_back_what_served(cluster, bundles):
    put(bundles["two"], cluster)
    stopped = threading.Event()

    def pending(service):
        if cluster.serves != str(bundles["one"]):
            return None
        if not stopped.is_set():  # in the midst of the rollout, and not before
            stopped.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return {"phase": "Pending"}

    cluster.broken = pending
    with pytest.raises(SystemExit) as ended:
        put(bundles["one"], cluster)
    assert ended.value.code == 128 + signal.SIGTERM
    assert cluster.serves == str(bundles["two"])


def test_a_change_of_the_same_moment_is_written_over_and_another_deployment_is_not(cluster, bundles):
    put(bundles["two"], cluster)

    def moved():  # KServe writes the status, and the version moves on
        cluster.version += 1
        cluster.service["metadata"]["resourceVersion"] = str(cluster.version)

    cluster.between = moved
    assert put(bundles["one"], cluster)["deployed"]
    puts = cluster.log.count(("PUT", f"{SERVICES}/mine"))
    assert puts == 2

    def somebody():
        other = copy.deepcopy(cluster.service)
        other["spec"]["predictor"]["initContainers"][0]["env"].append({"name": "COTERIE_REVISION", "value": "theirs"})
        other["spec"]["predictor"]["initContainers"][0]["env"].sort(key=lambda one: one["value"] != "theirs")
        cluster.write(other)

    cluster.between = somebody
    with pytest.raises(RunFailed, match="another deployment of mine has taken the place"):
        put(bundles["two"], cluster)
    assert revision(cluster.service) == "theirs"


def test_an_address_keeps_its_bundle(cluster, bundles, tmp_path):
    shutil.copytree(bundles["two"], tmp_path / "bundle")
    put(tmp_path / "bundle", cluster)
    shutil.rmtree(tmp_path / "bundle")
    shutil.copytree(bundles["one"], tmp_path / "bundle")
    with pytest.raises(BadConfiguration, match="Bundle addresses are immutable"):
        put(tmp_path / "bundle", cluster)
    with pytest.raises(BadConfiguration, match="Bundle addresses are immutable"):
        deploy_incumbent(SETTINGS)
    assert len(cluster.written) == 1


def test_the_gate_lets_a_better_bundle_pass_and_keeps_the_incumbent_before_a_worse_one(
    cluster, bundles, tmp_path, monkeypatch
):
    def promote(candidate, incumbent, comparisons, out, settings):
        return compare_versions(candidate, incumbent, comparisons, settings, TextEncoder())

    monkeypatch.setattr(stages, "promote", promote)
    votes = bundles["run"].ingest / "comparisons.parquet"
    assert put(bundles["worse"], cluster, comparisons=votes)["deployed"]  # there is nothing to compare with
    assert put(bundles["two"], cluster, comparisons=votes)["deployed"]
    made = stages.deploy(bundles["worse"], str(bundles["worse"]), PROFILES, tmp_path / "deploy", SETTINGS, votes)
    assert not made["deployed"]
    assert made["reason"].startswith("not promoted: it is worse than the incumbent on validation prompts: log-loss +")
    assert made == json.loads((tmp_path / "deploy" / "metrics.json").read_text())
    assert made["model_version"] == Bundle.load(bundles["two"]).manifest.model_version
    assert cluster.serves == str(bundles["two"])
    assert len(cluster.written) == 2


def command(*arguments):
    return CliRunner().invoke(step.main, ["--namespace", "team", "--release", "mine", *map(str, arguments)])


def test_the_incumbent_is_deployed_by_the_charts_new_template(cluster, bundles):
    nothing = command("--incumbent")
    assert nothing.exit_code == 0
    assert json.loads(nothing.stdout)["reason"] == "nothing is deployed yet"
    put(bundles["two"], cluster)
    before = cluster.service
    cluster.template = TEMPLATE.replace("IMAGE", "another")
    done = command("--incumbent", "--url", cluster.address)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["deployed"]
    assert cluster.service["metadata"]["annotations"] == before["metadata"]["annotations"]
    assert cluster.service["spec"]["predictor"]["containers"][0]["image"] == "another"


def test_a_release_is_removed_and_nothing_to_remove_is_no_failure(cluster, bundles):
    assert command("--remove").stdout == "nothing was deployed\n"
    put(bundles["two"], cluster)
    assert command("--remove").stdout == "removed\n"
    assert cluster.service is None
    put(bundles["two"], cluster)
    cluster.delete = lambda: None  # a finalizer that nobody serves
    with pytest.raises(RunFailed, match=r"InferenceService mine, .* did not go"):
        remove(SETTINGS.model_copy(update={"timeout": 1}))


def test_bundles_and_profiles_on_claims_are_mounted(cluster, bundles):
    cluster.scorers["pvc://models/runs/two", 0.0] = Scorer(Bundle.load(bundles["two"]), TextEncoder())
    profiles = "pvc://profiles/first"
    told = put("pvc://models/runs/two", cluster, profiles)
    assert told["model_version"] == Bundle.load(bundles["two"]).manifest.model_version
    spec = cluster.service["spec"]["predictor"]
    claim = {"claimName": "models", "readOnly": True}
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {}}, {"name": "bundle", "persistentVolumeClaim": claim}]
    mount = {"name": "bundle", "mountPath": "/mnt/models", "readOnly": True, "subPath": "runs/two"}
    assert spec["initContainers"][0]["volumeMounts"] == [mount]
    assert spec["containers"][0]["volumeMounts"] == [mount, {"name": "tmp", "mountPath": "/tmp"}]
    spec = cluster.service["spec"]["transformer"]
    assert spec["volumes"][1:] == [
        {"name": "claim-profiles", "persistentVolumeClaim": {"claimName": "profiles", "readOnly": True}}
    ]
    assert {"name": "claim-profiles", "mountPath": "/mnt/claims/profiles", "readOnly": True} in spec["initContainers"][
        0
    ]["volumeMounts"]


def test_a_cluster_that_refuses_is_quoted_with_the_remedy(cluster, bundles, monkeypatch):
    cluster.trouble = [("GET", f"{SERVICES}/mine", 403, "pipeline-runner cannot get inferenceservices")]
    with pytest.raises(BadConfiguration, match=r"pipeline-runner cannot get .*Role mine-deployer in namespace team"):
        put(bundles["two"], cluster)
    cluster.trouble = [("POST", SERVICES, 404, "page not found")]
    with pytest.raises(BadConfiguration, match="Install KServe there"):
        put(bundles["two"], cluster)
    cluster.trouble = [("POST", SERVICES, 422, "spec.predictor: not right")]
    with pytest.raises(BadConfiguration, match=r"refuses the InferenceService mine: spec\.predictor: not right"):
        put(bundles["two"], cluster)
    cluster.trouble = [("POST", SERVICES, 500, "no space")] * 3
    with pytest.raises(BackendUnavailable, match="no space"):
        put(bundles["two"], cluster)
    cluster.trouble = [("POST", SERVICES, 503, "restarting")]
    assert put(bundles["two"], cluster)["deployed"]
    cluster.template = None
    with pytest.raises(BadConfiguration, match=r"no ConfigMap mine-serving .* no release mine of the chart"):
        put(bundles["one"], cluster)
    cluster.template = "kind: Service"
    with pytest.raises(BadConfiguration, match="is no InferenceService"):
        deploy_incumbent(SETTINGS)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere/kubeconfig")
    with pytest.raises(BadConfiguration, match="no cluster to deploy to"):
        put(bundles["two"], cluster)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bundle", "b", "--remove"], "give one of --bundle, --incumbent and --remove"),
        (["--bundle", "s3:nothing"], "no such file"),
        (["--remove", "--namespace", "Team"], "namespace: string should match pattern"),
        (["--incumbent", "--namespace", ""], "no namespace"),
    ],
)
def test_a_command_that_is_wrong_is_told(cluster, arguments, said):
    done = command(*arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_first_bundle_needs_profiles(cluster, bundles):
    with pytest.raises(BadConfiguration, match="no profiles to serve it with"):
        put(bundles["two"], cluster, None)
    assert not cluster.written
