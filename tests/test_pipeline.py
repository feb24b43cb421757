"""The pipeline: compiled as committed, and run under kfp.local from raw preferences to a bundle, twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SMALL = [
    "--set", "ingest.source=simulated://groups?groups=2&workers=24&comparisons_per_worker=60&prompts=30&responses=4&seed=3",
    "--set", "cluster.max_coteries=2", "--set", "cluster.splits=1", "--set", "embed.max_rank=1", "--set", "embed.splits=1",
    "--set", "evaluate.replicates=200",
]  # fmt: skip


def coterie(*arguments, environment):
    command = [sys.executable, "-m", "coterie.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    own = {"COTERIE_CACHE": str(cache), "COTERIE_PSEUDONYM_KEY": "a key of the tests, long enough"}
    return {k: v for k, v in os.environ.items() if not k.startswith("COTERIE_")} | own


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = coterie("run", ROOT / "recipes" / "quickstart.yaml", *SMALL, "--out", out, environment=environment)
    assert done.returncode == 0, done.stderr + (out / "run.log").read_text()[-3000:]
    return out, done


def test_the_committed_yaml_is_the_pipeline(tmp_path):
    from pipelines.coteries import COMPILED, compile_to

    compile_to(tmp_path / "fresh.yaml")
    fresh, committed = ([*yaml.safe_load_all(path.read_text())] for path in (tmp_path / "fresh.yaml", COMPILED))
    assert fresh == committed, "the pipeline has changed: run `python -m pipelines.coteries`"


def test_ingest_is_cached_by_what_a_step_that_never_is_says_of_sources_and_key():
    spec = next(yaml.safe_load_all((ROOT / "pipelines" / "coteries.yaml").read_text()))
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "enableCache" not in tasks["look"]["cachingOptions"]
    assert tasks["ingest"]["cachingOptions"]["enableCache"] is True
    state = tasks["ingest"]["inputs"]["parameters"]["state"]
    assert state["taskOutputParameter"] == {"outputParameterKey": "Output", "producerTask": "look"}


def test_an_image_takes_the_place_of_the_placeholder(tmp_path):
    from components.image import TRAIN_IMAGE
    from pipelines.coteries import compile_to

    compile_to(tmp_path / "p.yaml", "registry.local/train@sha256:" + "0" * 64)
    text = (tmp_path / "p.yaml").read_text()
    assert TRAIN_IMAGE not in text
    executors = yaml.safe_load(text.split("\n---")[0])["deploymentSpec"]["executors"].values()
    assert {e["container"]["image"] for e in executors} == {"registry.local/train@sha256:" + "0" * 64}


def test_a_placement_reaches_the_pods_of_its_stage(tmp_path):
    from pipelines.coteries import COMPILED, compile_to
    from pipelines.placement import load_placement

    file = tmp_path / "placement.yaml"
    file.write_text(
        "defaults: {memory: 8Gi, node_selector: {pool: cpu}}\n"
        "stages: {reward: {gpus: 2, memory: 64Gi, retries: 3, timeout: 600, checkpoints: kept, node_selector: {pool: gpu},"
        " tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}}\n"
    )
    compile_to(tmp_path / "p.yaml", placement=load_placement(file))
    spec, platform = yaml.safe_load_all((tmp_path / "p.yaml").read_text())
    containers = {name: e["container"] for name, e in spec["deploymentSpec"]["executors"].items()}
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name in ("exec-global-reward", "exec-coterie-reward"):
        resources = containers[name]["resources"]
        assert resources["accelerator"]["resourceCount"] == "2"
        assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert resources["resourceMemoryLimit"] == "64Gi"
        assert pods[name]["nodeSelector"]["labels"] == {"pool": "gpu"}
        assert pods[name]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert pods[name]["activeDeadlineSeconds"] == "600"
        assert pods[name]["pvcMount"][0]["constant"] == "kept"
        assert {"name": "COTERIE_CHECKPOINTS", "value": "/checkpoints"} in containers[name]["env"]
    assert containers["exec-embed"]["resources"]["resourceMemoryLimit"] == "8Gi"
    assert "accelerator" not in containers["exec-embed"]["resources"]
    assert pods["exec-embed"]["nodeSelector"]["labels"] == {"pool": "cpu"}
    retried = [t for c in spec["components"].values() for t in c.get("dag", {}).get("tasks", {}).values()]
    assert [t["retryPolicy"]["maxRetryCount"] for t in retried if t["taskInfo"]["name"] == "coterie-reward"] == [3]
    compile_to(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == COMPILED.read_text(), "one compilation must not reach into the next"


def test_a_placement_that_is_wrong_is_named(tmp_path):
    from coterie.errors import BadConfiguration
    from pipelines.placement import load_placement

    file = tmp_path / "placement.yaml"
    file.write_text("stages: {reward: {gpu: 1}}")
    with pytest.raises(BadConfiguration, match=r"stages\.reward\.gpu: there is no such setting"):
        load_placement(file)
    with pytest.raises(BadConfiguration, match="not a placement"):
        load_placement(tmp_path / "absent.yaml")


def test_a_run_leaves_every_stage_and_says_what_it_found(run):
    out, done = run
    folders = {path.parent.relative_to(out).as_posix() for path in out.rglob("stage.json")}
    assert {
        "ingest",
        "encode",
        "embed",
        "cluster",
        "publish",
        "rewards/global",
        "evaluate",
        "bundle",
        "report",
    } <= folders
    assert not (out / ".run").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["data"]["workers"] == 24
    assert metrics["heldout"]["seen"]["accuracy"] > 0.6
    assert metrics["selection"]["coteries"] == len(metrics["coteries"])
    assert "Report:" in done.stdout
    assert "a stranger" in done.stdout
    assert "global reward, unknown-worker" in done.stdout
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_a_second_run_does_no_work_twice(run, environment, tmp_path):
    first, _ = run
    done = coterie("run", ROOT / "recipes" / "quickstart.yaml", *SMALL, "--out", tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run.log").read_text()
    # All but publish, which stamps the profiles with the time.
    assert log.count("done before, taken from the cache") == sum(1 for _ in first.rglob("stage.json")) - 1
    assert re.findall(r"(\S+): started", log) == ["publish"]
    assert (tmp_path / "metrics.json").read_bytes() == (first / "metrics.json").read_bytes()


def test_a_failed_stage_ends_the_run_with_its_reason_and_leaves_the_quarantine(environment, tmp_path):
    bad = tmp_path / "bad.jsonl"
    rows = [{"worker": "w", "prompt": "p", "chosen": f"a{i}", "rejected": "" if i % 2 else "b"} for i in range(40)]
    bad.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "out"
    done = coterie(
        "run", ROOT / "recipes" / "ukp.yaml", "--set", f"ingest.source={bad}", "--out", out, environment=environment
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "quarantine.parquet" in done.stderr
    assert (out / "quarantine.parquet").is_file()
    assert not (out / "ingest").exists()


def test_score_answers_a_stranger_by_the_global_reward(run, environment):
    out, _ = run
    ask = [
        "--prompt",
        "How do I bake bread?",
        "--response",
        "Mix and bake.",
        "--response",
        "Do this:\n- Mix\n- Bake",
        "--json",
    ]
    made = coterie("score", out / "bundle", "--worker", "nobody", *ask, environment=environment)
    assert made.returncode == 0, made.stderr
    prediction = json.loads(made.stdout)
    assert prediction["source"] == "global"
    assert prediction["reason"] == "unknown-worker"
    known = coterie("score", out / "bundle", "--worker", "annotator-03", *ask, environment=environment)
    assert json.loads(known.stdout)["source"] == "profile"
    examples = out / "examples.jsonl"
    examples.write_text(json.dumps({"prompt": "Tea?", "chosen": "- Boil\n- Pour", "rejected": "Boil, then pour."}))
    placed = coterie("score", out / "bundle", "--examples", examples, *ask, environment=environment)
    assert json.loads(placed.stdout)["source"] == "comparisons"
    twice = coterie("score", out / "bundle", "--examples", examples, "--worker", "w", *ask, environment=environment)
    assert twice.returncode == 2
    assert "give one of --worker" in twice.stderr
    other = environment | {"COTERIE_PSEUDONYM_KEY": "another key, just as long"}
    refused = coterie("score", out / "bundle", "--worker", "annotator-03", *ask, environment=other)
    assert refused.returncode == 2
    assert "pseudonym key is not the one" in refused.stderr
