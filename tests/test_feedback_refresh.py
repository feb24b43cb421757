"""Feedback folded into a run: posteriors as the router makes them, and a new run when people have changed."""

import json

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from coterie import stages
from coterie.cli import main
from coterie.config import (
    BundleSettings,
    ClusterSettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    PublishSettings,
    RewardSettings,
)
from coterie.contracts import ASSIGNMENT, COMPARISON
from coterie.feedback.database import Database
from coterie.feedback.intake import read_comparisons
from coterie.feedback.journal import Journal
from coterie.feedback.posteriors import Posteriors
from coterie.feedback.relay import Published, Relay
from coterie.feedback.tables import FOLDED, STAMP
from coterie.simulation import SimulationSettings, write_simulation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of two groups, without pseudonyms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = tmp_path_factory.mktemp("runs")
        simulation = SimulationSettings(
            setting="groups", groups=2, workers=24, comparisons_per_worker=60, prompts=30, responses=4, seed=3
        )
        write_simulation(simulation, root / "simulated")
        out, source = root / "first", str(root / "simulated" / "preferences.jsonl")
        stages.ingest(out / "ingest", IngestSettings(source=[source], pseudonyms="none"))
        stages.encode(out / "ingest", out / "encode", EncodeSettings())
        stages.embed(out / "ingest", out / "encode", out / "embed", EmbedSettings(max_rank=1, splits=1))
        stages.cluster(
            out / "embed", out / "cluster", ClusterSettings(max_coteries=2, splits=1, ship="coteries", coteries=2)
        )
        rewards = [out / "rewards" / name for name in ("global", "coterie-0", "coterie-1")]
        for k, folder in zip((None, 0, 1), rewards, strict=True):
            stages.reward(
                out / "embed", out / "cluster", folder, RewardSettings(), k, None if k is None else rewards[0]
            )
        judging = EvaluateSettings(replicates=200)
        stages.evaluate(out / "embed", out / "cluster", rewards, out / "evaluate", judging)
        folders = (out / "ingest", out / "encode", out / "embed", out / "cluster", rewards, out / "evaluate")
        stages.bundle(*folders, out / "bundle", BundleSettings())
        yield out


def comparisons(run, workers, flipped, note=" indeed"):
    """The run's own comparisons of some workers about prompts that are new by a word; who is flipped says the opposite."""
    table = COMPARISON.read(run / "ingest" / "comparisons.parquet").to_pylist()
    for row in table:
        if row["worker_id"] in workers:
            sides = ("rejected", "chosen") if row["worker_id"] in flipped else ("chosen", "rejected")
            chosen, rejected = (row[side] for side in sides)
            yield {
                "worker_id": row["worker_id"],
                "prompt": row["prompt"] + note,
                "chosen": chosen,
                "rejected": rejected,
            }


def commit(url, records):
    database = Database(url)
    journal = Journal(database, daily_cap=10**6)
    records = list(records)
    for start in range(0, len(records), 500):
        journal.submit(read_comparisons(records[start : start + 500], None)).result(60)
    journal.close()
    database.close()


def assignments(folder):
    table = ASSIGNMENT.read(folder / "assignments.parquet")
    return {row["worker_id"]: row for row in table.to_pylist()}


@pytest.mark.timeout(600)
def test_posteriors_are_folded_in_as_the_router_makes_them_and_once(run, tmp_path):
    from coterie.bundle import Bundle
    from coterie.scoring import load_scorer

    url, old = f"sqlite:///{tmp_path / 'feedback.db'}", assignments(run / "cluster")
    known = sorted(old)[:12]
    commit(url, comparisons(run, known, ()))
    commit(url, [row | {"worker_id": "new"} for row in comparisons(run, known[:1], ())])
    done = CliRunner().invoke(main, ["refresh", str(run), "--database", url, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["drifted"], told["promoted"], told["serves"]) == (False, False, str(run))
    assert (told["known_workers"], told["new_workers"]) == (12, 1)
    assert told == json.loads((tmp_path / "out" / "refresh.json").read_text())

    # What a router would have put online is what will be published.
    stages.adapter("feature_repo.publish").publish(run / "cluster", tmp_path / "before", PublishSettings())
    database, pushed = Database(url), {}
    infer = Posteriors(load_scorer(Bundle.load(run / "bundle")))
    push = lambda profiles: pushed.update({profile.worker_id: profile for profile in profiles})  # noqa: E731
    Relay(database, Published(tmp_path / "before" / "profiles.parquet"), infer, push).round()
    new = assignments(tmp_path / "out" / "clustered")
    assert new.keys() == old.keys() | {"new"}
    assert pushed.keys() == {*known, "new"}
    for worker, profile in pushed.items():
        np.testing.assert_allclose(new[worker]["posterior"], profile.posterior, atol=1e-4)
        np.testing.assert_allclose(new[worker]["embedding"], profile.embedding, atol=1e-3)
        assert new[worker]["comparisons"] == profile.comparisons
    assert all(new[worker] == old[worker] for worker in old if worker not in known)

    # After publication nobody's feedback is left to be added.
    stages.publish(tmp_path / "out" / "clustered", tmp_path / "after", PublishSettings())
    relay = Relay(database, Published(tmp_path / "after" / "profiles.parquet"), infer, push)
    assert relay.replay() == 0
    commit(url, [{"worker_id": known[0], "prompt": "one more", "chosen": "a b c", "rejected": "d"}])
    relay.round()
    assert pushed[known[0]].comparisons == new[known[0]]["comparisons"] + 1
    database.close()


@pytest.mark.timeout(900)
def test_people_who_change_make_a_new_run_that_passes_the_gate(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    url, everybody = f"sqlite:///{tmp_path / 'feedback.db'}", sorted(assignments(run / "cluster"))
    # Everybody says the opposite of what they said, three times as often.
    for note in (" now", " today", " again"):
        commit(url, comparisons(run, everybody, everybody, note=note))
    told = stages.refresh(run, url, tmp_path / "out")
    assert told["drifted"], told["drift"]
    assert told["promoted"], told["promotion"]
    assert told["serves"] == str(tmp_path / "out" / "run")
    assert (tmp_path / "out" / "run" / "report" / "report.html").is_file()
    table = ASSIGNMENT.metadata(tmp_path / "out" / "clustered" / "assignments.parquet")
    [before] = {row["mixture_version"] for row in assignments(run / "cluster").values()}
    assert table["mixture_version"] == told["mixture_version"] != before
    database = Database(url)
    with database.reading() as connection:
        folded = connection.scalar(sa.select(sa.func.count()).where(FOLDED.c.folding == table["folding"]))
        assert connection.scalar(sa.select(sa.func.count()).select_from(STAMP)) == 0
    database.close()
    trained = COMPARISON.read(tmp_path / "out" / "run" / "ingest" / "comparisons.parquet").to_pylist()
    assert folded == sum(row["split"] == "train" and row["source"].startswith("sqlite") for row in trained)


def test_the_committed_pipeline_is_compiled_and_folds_feedback_in(run, tmp_path):
    import yaml
    from kfp import local

    from pipelines.refresh import COMPILED, compile_to, refresh

    compile_to(tmp_path / "fresh.yaml")
    fresh, committed = ([*yaml.safe_load_all(path.read_text())] for path in (tmp_path / "fresh.yaml", COMPILED))
    assert fresh == committed, "the pipeline has changed: run `python -m pipelines.refresh`"
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    commit(url, comparisons(run, sorted(assignments(run / "cluster"))[:12], ()))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "pipeline"), raise_on_error=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(stages.repository()))
        refresh(run=str(run), database=url, publish_online_store="sqlite")
    [profiles] = (tmp_path / "pipeline").rglob("profiles.parquet")
    assert Published(profiles).folding
    [manifest] = [path for path in (tmp_path / "pipeline").rglob("manifest.json") if path.parent.name == "model"]
    assert manifest.read_bytes() == (run / "bundle" / "manifest.json").read_bytes()
