"""pipelines.upload against what stands in for Kubeflow Pipelines' API, with Kubeflow's own client."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from click.testing import CliRunner
from stand_ins import JsonHandler

from coterie.errors import BackendUnavailable, BadConfiguration, RunFailed
from pipelines import upload
from pipelines.placement import ANYWHERE, Placement

IMAGE = "registry.example/coterie-train@sha256:" + "a" * 64


class Kubeflow(ThreadingHTTPServer):
    """Pipelines, versions and runs, as API v2beta1 tells them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pipelines: dict[str, str] = {}
        self.versions: dict[str, list[dict[str, str]]] = {}
        self.uploaded: list[bytes] = []
        self.runs: list[dict] = []
        self.ended = {"state": "SUCCEEDED"}
        self.refuses = False
        self.away = 0  # looks at a run that are not answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(JsonHandler):
    server: Kubeflow

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        path = parts.path.removeprefix("/apis/v2beta1/")
        if self.server.refuses:
            self.answer({"error": "database is away"}, 500)
        elif path == "healthz":
            self.answer({"multi_user": False})
        elif path == "pipelines":
            wanted = json.loads(query["filter"][0])["predicates"][0]["stringValue"]
            found = [{"pipeline_id": i, "display_name": n} for i, n in self.server.pipelines.items() if n == wanted]
            self.answer({"pipelines": found} if found else {})
        elif match := re.fullmatch("pipelines/(.*)/versions", path):
            known = self.server.versions.get(match[1], [])[:: -1 if query.get("sort_by") == ["created_at desc"] else 1]
            first = int(query.get("page_token", ["0"])[0] or 0)
            page = known[first : first + 1]  # of one, so that paging is seen
            more = {"next_page_token": str(first + 1)} if first + 1 < len(known) else {}
            self.answer({"pipeline_versions": page} | more)
        elif path == "experiments":
            self.answer({"experiments": [{"experiment_id": "e-1", "display_name": "coterie"}]})
        elif path.startswith("runs/") and self.server.away:
            self.server.away -= 1
            self.answer({"error": "database is away"}, 500)
        elif path.startswith("runs/"):
            self.answer({"run_id": path.removeprefix("runs/")} | self.server.ended)
        else:
            self.answer({"error": f"no {path}"}, 404)

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        path = parts.path.removeprefix("/apis/v2beta1/")
        body = self.body()
        if path == "pipelines":
            identity = f"p-{len(self.server.pipelines)}"
            self.server.pipelines[identity] = json.loads(body)["display_name"]
            self.answer({"pipeline_id": identity})
        elif path == "pipelines/upload_version":
            self.server.uploaded.append(body)
            version = {"display_name": query["name"][0], "pipeline_version_id": f"v-{len(self.server.uploaded)}"}
            self.server.versions.setdefault(query["pipelineid"][0], []).append(version)
            self.answer(version)
        elif path == "runs":
            self.server.runs.append(json.loads(body))
            self.answer({"run_id": "r-1"})
        else:
            self.answer({"error": f"no {path}"}, 404)


@pytest.fixture
def kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubeflow]:
    monkeypatch.setenv("HOME", str(tmp_path))
    # To compile takes seconds, and tests of the pipelines hold what was compiled against it.
    for name, (component, _) in upload.PIPELINES.items():
        text = Path(upload.__file__).with_name(f"{name}.yaml").read_text()

        def write(path: Path, image: str, _: Placement, text: str = text) -> None:
            path.write_text(text.replace("coterie-train:unset", image))

        monkeypatch.setitem(upload.PIPELINES, name, (component, write))
    server = Kubeflow()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def invoke(kubeflow: Kubeflow, *arguments: str) -> str:
    result = CliRunner().invoke(upload.main, ["--host", kubeflow.url, *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_same_again_uploads_nothing_and_another_image_is_another_version(kubeflow):
    told = invoke(kubeflow, "--image", IMAGE, "--default", "publish_online_store=redis")
    assert sorted(kubeflow.pipelines.values()) == ["coteries", "refresh"]
    assert told.count("uploaded") == len(kubeflow.uploaded) == 2
    assert all(IMAGE.encode() in body and b"coterie-train:unset" not in body for body in kubeflow.uploaded)

    told = invoke(kubeflow, "--image", IMAGE, "--default", "publish_online_store=redis")
    assert told.count("is there already") == 2
    assert len(kubeflow.uploaded) == 2

    invoke(kubeflow, "--image", IMAGE.replace("aaa", "bbb"), "--default", "publish_online_store=redis")
    assert len(kubeflow.uploaded) == 4
    assert len(kubeflow.pipelines) == 2


def test_values_become_defaults_of_the_form_and_nothing_else_changes(tmp_path):
    file, plain = tmp_path / "changed.yaml", tmp_path / "plain.yaml"
    defaults = {"cluster_replicates": "19", "ingest_source": "[s3://bucket/votes]", "joint_enabled": "true", "run": "x"}
    assert upload.write("coteries", file, IMAGE, ANYWHERE, defaults) != upload.write(
        "coteries", plain, IMAGE, ANYWHERE, {}
    )
    changed, before = (next(yaml.safe_load_all(path.read_text())) for path in (file, plain))
    known, other = (of["root"]["inputDefinitions"]["parameters"] for of in (changed, before))
    assert known["cluster_replicates"]["defaultValue"] == 19
    assert known["ingest_source"]["defaultValue"] == ["s3://bucket/votes"]
    assert known["joint_enabled"]["defaultValue"] is True
    for name in ("cluster_replicates", "ingest_source", "joint_enabled"):
        known[name]["defaultValue"] = other[name]["defaultValue"]
    assert changed == before


def test_a_placement_is_part_of_the_version(tmp_path):
    placement = Placement(stages={"align": {"gpus": 1}})
    file = tmp_path / "pipeline.yaml"
    assert upload.write("coteries", file, IMAGE, placement, {}) != upload.write("coteries", file, IMAGE, ANYWHERE, {})
    upload.write("refresh", file, IMAGE, Placement(stages={"refresh": {"memory": "64Gi"}}), {})
    executors = next(yaml.safe_load_all(file.read_text()))["deploymentSpec"]["executors"]
    limits = {
        name: one["container"].get("resources", {}).get("resourceMemoryLimit")
        for name, one in executors.items()
        if "container" in one
    }
    assert limits == {"exec-refresh": "64Gi", "exec-publish": None, "exec-deploy": None}


@pytest.mark.parametrize(
    ("default", "message"),
    [
        ("cluster_replicates=many", "cluster_replicates=many: is a number integer"),
        ("joint_enabled=1", "joint_enabled=1: is a boolean"),
        ("cluster_replicate=19", "no pipeline has a parameter cluster_replicate"),
        ("cluster_replicates", "write name=value"),
    ],
)
def test_a_default_that_is_none(kubeflow, default, message):
    result = CliRunner().invoke(upload.main, ["--host", kubeflow.url, "--image", IMAGE, "--default", default])
    assert result.exit_code != 0
    assert message in result.output
    assert kubeflow.uploaded == []


def test_a_tag_is_warned_of(kubeflow):
    assert "is no digest" in invoke(kubeflow, "--image", "registry.example/coterie-train:1.0")


def test_a_run_of_the_newest_version_is_started_and_awaited(kubeflow):
    for image in (IMAGE, IMAGE.replace("aaa", "bbb")):
        invoke(kubeflow, "--image", image)
    told = invoke(kubeflow, "--run", "refresh", "--set", "run=s3://runs/first", "--set", "always=true", "--wait", "5")
    assert "succeeded" in told
    [run] = kubeflow.runs
    refresh = next(identity for identity, name in kubeflow.pipelines.items() if name == "refresh")
    assert run["pipeline_version_reference"] == {
        "pipeline_id": refresh,
        "pipeline_version_id": kubeflow.versions[refresh][-1]["pipeline_version_id"],
    }
    assert run["runtime_config"]["parameters"] == {"run": "s3://runs/first", "always": True}


def test_a_run_is_awaited_while_kubeflow_is_away_for_a_while(kubeflow, monkeypatch):
    monkeypatch.setattr(upload, "_EVERY", 0.01)
    client, kubeflow.away = upload._client(kubeflow.url, None), 3
    upload.await_run(client, "r-1", 5)
    assert kubeflow.away == 0
    monkeypatch.setattr(upload, "_AWAY", 0.1)
    kubeflow.away = 1000
    with pytest.raises(BackendUnavailable, match=r"answers 500.*database is away"):
        upload.await_run(client, "r-1", 5)
    kubeflow.away, kubeflow.ended = 0, {"state": "RUNNING"}
    with pytest.raises(RunFailed, match="has not ended in 0 s"):
        upload.await_run(client, "r-1", 0)


def test_a_run_that_fails_says_which_step_and_why(kubeflow):
    kubeflow.ended = {
        "state": "FAILED",
        "run_details": {
            "task_details": [
                {"display_name": "ingest", "state": "SUCCEEDED"},
                {"display_name": "encode", "state": "FAILED", "error": {"code": 1, "message": "no such encoder"}},
            ]
        },
    }
    with pytest.raises(RunFailed, match="failed: encode: no such encoder"):
        upload.await_run(upload._client(kubeflow.url, None), "r-1", 5)


def test_what_kubeflow_has_not_or_does_not_say(kubeflow):
    client = upload._client(kubeflow.url, None)
    with pytest.raises(BadConfiguration, match="no pipeline refresh: upload it first"):
        upload.start(client, "refresh", {}, "coterie", None, None)
    result = CliRunner().invoke(upload.main, ["--host", kubeflow.url, "--run", "refresh", "--set", "runs=x"])
    assert "refresh has no parameter runs" in result.output
    kubeflow.refuses = True
    with pytest.raises(BackendUnavailable, match=r"answers 500.*database is away"):
        upload.start(client, "refresh", {}, "coterie", None, None)
    result = CliRunner().invoke(upload.main, ["--host", "http://127.0.0.1:9", "--image", IMAGE])
    assert result.exit_code != 0
    assert "does not answer" in result.output
