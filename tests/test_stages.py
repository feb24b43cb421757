"""What all stages share: whole results or none, no work twice, errors in words; and the command line's exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from coterie import config, stages
from coterie.cli import main
from coterie.errors import BadConfiguration, BadData, RunFailed

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("COTERIE_PSEUDONYM_KEY", "a key of the tests, long enough")
    monkeypatch.delenv("COTERIE_STAGE_CACHE", raising=False)
    monkeypatch.delenv("COTERIE_RUN_FOLDER", raising=False)


@pytest.fixture
def votes(tmp_path):
    path = tmp_path / "votes.jsonl"
    rows = [
        {"worker": f"w{i % 5}", "prompt": f"question {i % 20}", "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(path, **more):
    return config.IngestSettings.of(source=[str(path)], **more)


def test_a_stage_leaves_its_result_with_the_record_of_what_made_it(votes, tmp_path):
    out = tmp_path / "ingest"
    metrics = stages.ingest(out, settings(votes))
    record = json.loads((out / "stage.json").read_text())
    assert metrics["comparisons"] == 100
    assert record["stage"] == "ingest"
    assert record["settings"]["source"] == [str(votes)]
    assert record["peak_memory"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"ingest", "votes.jsonl"}


def test_the_same_inputs_do_no_work_and_other_inputs_do(votes, tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    out = tmp_path / "ingest"
    stages.ingest(out, settings(votes))
    before = (out / "stage.json").stat().st_mtime_ns
    stages.ingest(out, settings(votes))
    assert "ingest: up to date" in caplog.text
    assert (out / "stage.json").stat().st_mtime_ns == before
    votes.write_text(votes.read_text().replace('yes 7"', 'certainly 7"'))
    stages.ingest(out, settings(votes))
    assert (out / "stage.json").stat().st_mtime_ns != before
    changed = (out / "stage.json").stat().st_mtime_ns
    stages.ingest(out, settings(votes, seed=5))
    assert (out / "stage.json").stat().st_mtime_ns != changed


def test_another_key_is_another_result(votes, tmp_path, monkeypatch):
    out = tmp_path / "ingest"
    first = stages.ingest(out, settings(votes))["key_fingerprint"]
    monkeypatch.setenv("COTERIE_PSEUDONYM_KEY", "another key, long enough")
    assert stages.ingest(out, settings(votes))["key_fingerprint"] != first


def test_what_is_seen_of_the_sources_changes_with_them_and_with_the_key_alone(votes, monkeypatch, tmp_path):
    seen = stages.look(settings(votes))
    assert stages.look(settings(votes, seed=5)) == seen
    monkeypatch.setenv("COTERIE_PSEUDONYM_KEY", "another key, long enough")
    renamed = stages.look(settings(votes))
    votes.write_text(votes.read_text().replace('yes 7"', 'certainly 7"'))
    assert len({told["state"] for told in (seen, renamed, stages.look(settings(votes)))}) == 3
    monkeypatch.setenv("COTERIE_RUN_FOLDER", str(tmp_path))
    votes.unlink()
    with pytest.raises(BadData):
        stages.look(settings(votes))
    assert json.loads((tmp_path / "failure.json").read_text())["type"] == "BadData"


def test_the_cache_serves_another_folder(votes, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="coterie")
    monkeypatch.setenv("COTERIE_STAGE_CACHE", str(tmp_path / "cache"))
    stages.ingest(tmp_path / "a", settings(votes))
    stages.ingest(tmp_path / "b", settings(votes))
    assert "taken from the cache" in caplog.text
    one, two = ((tmp_path / name / "comparisons.parquet").read_bytes() for name in "ab")
    assert one == two


def test_a_failed_stage_keeps_the_old_result_and_leaves_nothing(votes, tmp_path):
    out = tmp_path / "ingest"
    stages.ingest(out, settings(votes))
    before = (out / "comparisons.parquet").read_bytes()
    votes.write_text("{}\n" * 50)
    with pytest.raises(BadData):
        stages.ingest(out, settings(votes))
    assert (out / "comparisons.parquet").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_is_said_in_words(votes, tmp_path):
    """A file size limit stands in for the full disk: the same error, on any machine."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from coterie.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "ingest", str(votes), "--out", str(tmp_path / "ingest")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "Free some" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ingest").exists()


def test_an_interrupted_stage_leaves_nothing_half_written(tmp_path):
    out = tmp_path / "ingest"
    source = "simulated://groups?workers=2000&comparisons_per_worker=400"
    command = [sys.executable, "-m", "coterie.cli", "ingest", source, "--out", str(out)]
    # A worker of pytest-xdist ignores SIGINT, and a child would inherit that.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert process.stderr is not None
    assert "started" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_missing_or_of_another_stage_are_named(votes, tmp_path):
    with pytest.raises(BadData, match="run the stage that writes it first"):
        stages.cluster(tmp_path / "absent", tmp_path / "cluster", config.ClusterSettings())
    stages.ingest(tmp_path / "ingest", settings(votes))
    with pytest.raises(BadData, match="not one of the rewards"):
        stages.evaluate(tmp_path, tmp_path, [tmp_path / "ingest"], tmp_path / "e", config.EvaluateSettings())
    with pytest.raises(BadConfiguration, match="starts from the global one"):
        stages.reward(tmp_path, tmp_path, tmp_path / "r", config.RewardSettings(), coterie=1)


def test_a_disk_error_of_another_kind_is_not_called_a_full_disk(votes, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(RunFailed, match=r"cannot be written.*(Not a directory|File exists)"):
        stages.ingest(blocked / "ingest", settings(votes))


def test_what_a_killed_run_left_is_cleared_away_and_what_a_living_one_writes_is_not(votes, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, living = (tmp_path / f".ingest.{pid}.part" for pid in (dead.pid, os.getppid()))
    left.mkdir()
    living.mkdir()
    stages.ingest(tmp_path / "ingest", settings(votes))
    assert not left.exists()
    assert living.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "absent.yaml", "--out", "x"], 2, "no such recipe"),
        (["ingest", "absent.jsonl", "--out", "x"], 2, "no such file"),
        (["encode", "--comparisons", "absent", "--out", "x"], 2, "does not exist"),
        (["score", "absent", "--prompt", "p", "--response", "r"], 2, "no manifest.json"),
        (
            ["score", "absent", "--worker", "a", "--pseudonym", "b", "--prompt", "p", "--response", "r"],
            2,
            "give one of",
        ),
        (["ingest", "x", "--columns", "worker", "--out", "x"], 2, "write it as KEY=VALUE"),
        (["ingest", "x", "--max-refused", "7", "--out", "x"], 2, "max_refused"),
    ],
)
def test_bad_input_ends_with_words_and_exit_code_2(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    assert words in done.output
    assert "Traceback" not in done.output


def test_no_key_is_an_error_with_its_remedy(votes, tmp_path, monkeypatch):
    monkeypatch.delenv("COTERIE_PSEUDONYM_KEY")
    done = CliRunner().invoke(main, ["ingest", str(votes), "--out", str(tmp_path / "i")])
    assert done.exit_code == 2
    assert "openssl rand -hex 32" in done.output
    aloud = CliRunner().invoke(main, ["ingest", str(votes), "--out", str(tmp_path / "i"), "--pseudonyms", "none"])
    assert aloud.exit_code == 0, aloud.output


def test_every_setting_is_an_option_of_its_command():
    kinds = {"ingest": config.IngestSettings, "encode": config.EncodeSettings, "embed": config.EmbedSettings}
    for name, kind in kinds.items():
        options = {option for parameter in main.commands[name].params for option in (parameter.name,)}
        assert set(kind.model_fields) <= options | {"source"}
