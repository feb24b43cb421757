"""Embeddings, heads and LoRA learned together: what it finds, what it leaves, and that a kill does not change it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import adjusted_rand_score
from staged import write_stages
from test_adapters import same_bytes, write_comparisons
from tiny_models import one_thread, write_backbone  # noqa: F401

from coterie.cli import main
from coterie.config import ClusterSettings, EmbedSettings, JointSettings, RewardSettings
from coterie.contracts import ASSIGNMENT, COMPARISON, EMBEDDING, VECTOR, matrix
from coterie.discovery import cluster
from coterie.discovery import embed as embed_stage
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.votes import Votes, load_votes
from coterie.errors import BadData
from coterie.rewards import PersonalHead, train_reward
from coterie.rewards.adapters import AdapterRewards
from coterie.rewards.heads import mean_loss
from coterie.rewards.joint import joint
from coterie.rewards.scored import compared
from coterie.staging import read_metrics, record_of


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"), hidden=32)


def settings_of(backbone, **changed):
    wanted = {"learning_rate": 3e-3, "epochs": 2, "max_tokens": 200, "lora_rank": 4, "device": "cpu", **changed}
    return JointSettings(backbone=str(backbone), **wanted)


def embed(staged):
    """What embed would leave: the low rank of one direction, fitted to the training votes."""
    votes = load_votes(staged.embed / "differences.parquet", "train")
    model = LowRankReward(1).fit(votes)
    model.save(staged.embed / "lowrank.safetensors")
    EMBEDDING.write(
        staged.embed / "embeddings.parquet",
        {
            "worker_id": ASSIGNMENT.read(staged.cluster / "assignments.parquet")["worker_id"],
            "embedding": model.embeddings_,
            "reliability": np.exp(model.log_reliability_),
            "comparisons": votes.counts,
        },
        {"chosen": json.dumps({"member": "lowrank", "size": 1, "prior": 100.0}), "candidates": "[]"},
        embedding=1,
    )
    (staged.embed / "metrics.json").write_text(json.dumps({"rank": 1}))
    return model


@pytest.fixture(scope="module")
def learned(tmp_path_factory, backbone):
    staged = write_stages(tmp_path_factory.mktemp("joint"), workers=24, comparisons=40)
    before = embed(staged)
    out = staged.root / "joint"
    out.mkdir()
    told = joint(staged.embed, staged.ingest / "comparisons.parquet", out, settings_of(backbone))
    return staged, before, told, out


def test_it_starts_from_the_frozen_solution_and_says_what_became_of_it(learned):
    staged, before, told, out = learned
    figures = told["joint"]
    assert told["rank"] == 1
    assert figures["steps"] == figures["curve"][-1][0] == 152
    assert figures["validation_log_loss"]["joint"] < 0.69
    table = EMBEDDING.read(out / "embeddings.parquet")
    after = matrix(table["embedding"])
    assert figures["correlation"] == pytest.approx(np.corrcoef(before.embeddings_[:, 0], after[:, 0])[0, 1], abs=1e-6)
    assert 0.7 < figures["correlation"] < 0.99999
    assert EMBEDDING.metadata(out / "embeddings.parquet") == EMBEDDING.metadata(staged.embed / "embeddings.parquet")
    group = ASSIGNMENT.read(staged.cluster / "assignments.parquet")["coterie"].to_numpy()
    assert adjusted_rand_score(group, after[:, 0] > np.median(after)) > 0.5


def test_the_reward_that_it_leaves_is_the_one_that_it_judged(learned):
    staged, _, told, out = learned
    table = EMBEDDING.read(out / "embeddings.parquet")
    places, reliability = matrix(table["embedding"]), table["reliability"].to_numpy()
    votes = load_votes(staged.embed / "differences.parquet", "validation")
    texts = COMPARISON.read(staged.ingest / "comparisons.parquet").to_pandas()
    states = {}
    rewards = AdapterRewards.load({"joint": out}, "cpu")
    for side, ids in zip(
        ("chosen", "rejected"), compared(staged.embed, staged.ingest / "comparisons.parquet", "validation"), strict=True
    ):
        rows = texts.drop_duplicates(f"{side}_id").set_index(f"{side}_id").loc[ids]
        states[side] = rewards.states(rows["prompt"].tolist(), rows[side].tolist())["joint"]
    head = PersonalHead.load(out)
    margin = head.margin(states["chosen"] - states["rejected"], places[votes.worker]) / head.common.scale
    loss = mean_loss(reliability[votes.worker] * margin, votes.y, np.ones(len(votes)))
    assert loss == pytest.approx(told["joint"]["validation_log_loss"]["joint"], abs=1e-4)


def test_its_folder_goes_through_cluster_and_reward(learned, tmp_path):
    staged, _, _, out = learned
    (out / "metrics.json").write_text(json.dumps({"rank": 1}))
    folder = tmp_path / "cluster"
    folder.mkdir()
    figures = cluster(out, folder, ClusterSettings(coteries=2, method="kmeans", replicates=0))
    (folder / "metrics.json").write_text(json.dumps(figures))
    found = ASSIGNMENT.read(folder / "assignments.parquet")
    np.testing.assert_array_equal(
        matrix(found["embedding"]), matrix(EMBEDDING.read(out / "embeddings.parquet")["embedding"])
    )
    truth = ASSIGNMENT.read(staged.cluster / "assignments.parquet")["coterie"].to_numpy()
    assert adjusted_rand_score(truth, found["coterie"].to_numpy()) > 0.8
    for k in ("global", 0, "embedding"):
        (tmp_path / f"{k}").mkdir()
        told = train_reward(out, folder, tmp_path / f"{k}", k, RewardSettings(), tmp_path / "global")
    # The directions of the frozen features are those that the new embeddings stand for.
    assert told["validation_log_loss"] < 0.55


def test_new_workers_are_placed_among_those_who_are_known(learned):
    staged, _, _, out = learned
    votes = load_votes(staged.embed / "differences.parquet", "test")
    model = LowRankReward(1).restore(out / "lowrank.safetensors", np.zeros((0, 1)), np.zeros(0))
    placed = model.infer(Votes.of(votes.x, votes.y, votes.worker, n_workers=votes.n_workers))[0]
    known = matrix(EMBEDDING.read(out / "embeddings.parquet")["embedding"])
    assert np.corrcoef(placed[:, 0], known[:, 0])[0, 1] > 0.6


KILLED = """
import os, signal, sys
from pathlib import Path
from coterie.rewards import trainer
from coterie.rewards.joint import joint
from test_joint import settings_of
import torch

torch.set_num_threads(1)
step_ended = trainer._Watch.on_step_end

def kill(self, args, state, control, **kwargs):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    step_ended(self, args, state, control, **kwargs)

trainer._Watch.on_step_end = kill
root, out, backbone = (Path(given) for given in sys.argv[1:])
joint(root / "embed", root / "ingest" / "comparisons.parquet", out, settings_of(backbone, max_steps=12, checkpoint_steps=3))
"""


def test_killed_and_started_again_it_ends_where_no_kill_would_have(learned, backbone, tmp_path):
    staged = learned[0]
    settings, texts = settings_of(backbone, max_steps=12, checkpoint_steps=3), staged.ingest / "comparisons.parquet"
    killed, whole = tmp_path / "killed" / "out", tmp_path / "whole" / "out"
    for folder in (killed, whole):
        folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(staged.root), str(killed), str(backbone)], cwd="tests"
    )
    undisturbed = joint(staged.embed, texts, whole, settings)
    assert process.wait(timeout=300) == -9
    (checkpoints,) = (killed.parent / ".checkpoints").iterdir()
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    shutil.rmtree(killed)
    killed.mkdir()
    assert joint(staged.embed, texts, killed, settings) == undisturbed
    assert same_bytes(killed, whole)


def test_less_than_a_batch_is_refused_with_the_remedy(learned, backbone, tmp_path):
    with pytest.raises(BadData, match=r"fewer than a batch of 9999, are left .* Lower joint.batch_size"):
        joint(
            learned[0].embed,
            learned[0].ingest / "comparisons.parquet",
            tmp_path,
            settings_of(backbone, batch_size=9999),
        )


def test_it_learns_what_the_frozen_features_hardly_show(backbone, tmp_path):
    """Two groups want opposite ends of a text, of which the encoder tells little."""
    data = write_comparisons(tmp_path / "data", "!!!!????", each=64)
    texts = COMPARISON.read(data / "comparisons.parquet").to_pandas()
    ids = {
        i: end
        for side in ("chosen", "rejected")
        for i, end in zip(texts[f"{side}_id"], texts[side].str[-1], strict=True)
    }
    rng = np.random.default_rng(0)
    told = np.array([end == "!" for end in ids.values()])[:, None] + 3 * rng.standard_normal((len(ids), 4))
    VECTOR.write(
        data / "vectors.parquet",
        {"response_id": list(ids), "vector": told, "style": np.zeros((len(ids), 1))},
        {"style_names": '["none"]'},
        vector=4,
        style=1,
    )
    embedded, out = tmp_path / "embed", tmp_path / "joint"
    embedded.mkdir(), out.mkdir()
    comparisons = data / "comparisons.parquet"
    figures = embed_stage(comparisons, data / "vectors.parquet", embedded, EmbedSettings(rank=1, style=False))
    (embedded / "metrics.json").write_text(json.dumps(figures))
    settings = settings_of(backbone, epochs=4, max_tokens=40, learning_rate=1e-2)
    losses = joint(embedded, comparisons, out, settings)["joint"]["validation_log_loss"]
    assert losses["joint"] < losses["start"] - 0.05
    assert losses["joint"] < losses["frozen"] - 0.1
    places = matrix(EMBEDDING.read(out / "embeddings.parquet")["embedding"])[:, 0]
    assert np.sign(places[:4] - np.median(places)).sum() in (-4, 4)


def test_the_component_leaves_it_in_the_place_of_embed_and_the_command_says_the_same(backbone, tmp_path, monkeypatch):
    from kfp import dsl

    from components.discovery import embed as component

    for name in ("COTERIE_STAGE_CACHE", "COTERIE_RUN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    staged, out = write_stages(tmp_path, workers=8, comparisons=20), dsl.Dataset(uri=str(tmp_path / "out"))
    given = {name: dsl.Dataset(uri=str(staged.root / name)) for name in ("ingest", "encode")}
    settings = settings_of(backbone, max_steps=2)
    component.python_func(
        comparisons=given["ingest"], vectors=given["encode"], embedded=out, metrics=dsl.Metrics(),
        **EmbedSettings(rank=1).model_dump() | {"rank": "1"},
        **{f"joint_{name}": value for name, value in settings.model_dump().items()} | {"joint_enabled": True},
    )  # fmt: skip
    assert record_of(tmp_path / "out")["stage"] == "joint"
    assert record_of(tmp_path / "frozen")["stage"] == "embed"
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in settings.model_dump(exclude={"enabled"}).items()
    ]
    command = ["joint", "--embedded", tmp_path / "frozen", "--comparisons", staged.ingest, "--out", tmp_path / "again"]
    done = CliRunner().invoke(main, [*map(str, command), *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == read_metrics(tmp_path / "out")
