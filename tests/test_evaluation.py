"""Held-out quality: macro means, intervals that cover, the gate, the coterie-by-model matrix."""

import json
import shutil

import numpy as np
import pytest
from staged import judge, train_all, write_stages

from coterie.discovery.votes import load_votes
from coterie.errors import BadData
from coterie.rewards import PersonalHead, RewardHead


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    staged = write_stages(tmp_path_factory.mktemp("groups"))
    train_all(staged)
    return staged, judge(staged)


def test_real_coteries_pass_the_gate_and_own_beats_global_beats_wrong(groups):
    _, result = groups
    assert [gate["serves"] for gate in result["gates"]] == ["own", "own"]
    accuracy = np.array([[cell["value"] for cell in row] for row in result["matrix"]["accuracy"]])
    for k in range(2):
        own, common, wrong = accuracy[k, 1 + k], accuracy[k, 0], accuracy[k, 2 - k]
        assert own > common > wrong
        assert result["own_wrong"][k]["accuracy"]["low"] > 0
    gain = result["heldout"]["seen"]["difference_to_pooled"]
    assert gain["accuracy"]["low"] > 0 > gain["log_loss"]["high"]


def test_what_a_coterie_likes_is_what_was_planted(groups):
    _, result = groups
    assert "longer answers" in result["coteries"][0]["likes"]
    assert "shorter answers" in result["coteries"][1]["likes"]
    assert sum(c["workers"] for c in result["coteries"]) == 40


def test_what_is_judged_is_what_is_served_averaged_over_the_posterior(groups):
    staged, result = groups
    votes = load_votes(staged.embed / "differences.parquet", "test")
    own = [RewardHead.load(staged.rewards[f"coterie-{k}"]).margin(votes.x) for k in range(2)]
    group = np.array([c["coterie"] for c in _assignments(staged)])
    margin = np.where(group[votes.worker] == 0, own[0], own[1])  # .98 is more than the mass that is averaged over
    per_worker = [(margin[votes.worker == w] > 0).mean() for w in np.unique(votes.worker)]
    assert result["heldout"]["seen"]["accuracy"] == pytest.approx(np.mean(per_worker))


def _assignments(staged):
    from coterie.contracts import ASSIGNMENT

    return ASSIGNMENT.read(staged.cluster / "assignments.parquet").to_pylist()


def test_the_same_seed_makes_the_same_figures(groups):
    staged, result = groups
    assert json.dumps(judge(staged)) == json.dumps(result)


def test_coteries_without_a_difference_serve_the_global_reward(tmp_path):
    staged = write_stages(tmp_path, groups=False)
    train_all(staged)
    result = judge(staged)
    assert [gate["serves"] for gate in result["gates"]] == ["global", "global"]
    assert "does not surely beat" in result["gates"][0]["reason"]
    difference = result["heldout"]["seen"]["difference_to_pooled"]["log_loss"]
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)


def test_a_coterie_too_small_for_an_interval_serves_the_global_reward_and_says_so(tmp_path):
    staged = write_stages(tmp_path, workers=14)
    train_all(staged)
    result = judge(staged)
    assert {gate["serves"] for gate in result["gates"]} == {"global"}
    assert "fewer than 10 workers" in result["gates"][0]["reason"]
    assert result["coteries"][0]["own_vs_global"]["accuracy"]["low"] is None


def test_one_taste_is_one_reward_without_a_gate_to_pass(tmp_path):
    staged = write_stages(tmp_path, coteries=1, groups=False)
    train_all(staged, coteries=1)
    result = judge(staged)
    assert result["gates"] == [{"coterie": 0, "serves": "global", "reason": "one reward serves everybody"}]
    assert result["own_wrong"] == []
    shots = result["heldout"]["unseen_by_shots"]
    assert {shots[k]["difference_to_pooled"]["log_loss"]["value"] for k in shots} == {0.0}
    assert result["heldout"]["seen"]["difference_to_pooled"]["accuracy"]["value"] == 0


def test_ties_count_in_the_log_loss_and_not_in_the_accuracy(tmp_path):
    staged = write_stages(tmp_path, ties=0.3)
    train_all(staged)
    result = judge(staged)
    votes = load_votes(staged.embed / "differences.parquet", "test")
    margin = RewardHead.load(staged.rewards["global"]).margin(votes.x)
    decided = votes.y == 1
    workers = np.unique(votes.worker[decided])
    expected = np.mean([(margin[decided & (votes.worker == w)] > 0).mean() for w in workers])
    assert result["heldout"]["seen"]["pooled"]["accuracy"]["value"] == pytest.approx(expected)
    loss = np.logaddexp(0, -margin) + (1 - votes.y) * margin
    expected = np.mean([loss[votes.worker == w].mean() for w in np.unique(votes.worker)])
    assert result["heldout"]["seen"]["pooled"]["log_loss"]["value"] == pytest.approx(expected, abs=1e-6)


def test_calibrated_rewards_have_a_small_calibration_error_and_the_worst_are_below_the_mean(groups):
    _, result = groups
    assert result["calibration"]["expected_calibration_error"] < 0.1
    assert result["worst"]["decile"] < result["worst"]["coterie"] <= result["heldout"]["seen"]["accuracy"]


def test_a_missing_reward_is_named(groups, tmp_path):
    staged, _ = groups
    copied = type(staged)(shutil.copytree(staged.root, tmp_path / "copy"))
    shutil.rmtree(copied.root / "rewards" / "coterie-1")
    with pytest.raises(BadData, match="no reward of coterie 1"):
        judge(copied)


@pytest.fixture(scope="module")
def by_degrees(tmp_path_factory):
    staged = write_stages(tmp_path_factory.mktemp("degrees"), ships="embedding")
    train_all(staged)
    return staged, judge(staged)


def test_people_are_served_by_their_embedding_where_that_ships_and_passes_its_gate(by_degrees):
    staged, result = by_degrees
    assert result["ships"] == "embedding"
    assert result["gates"][-1]["coterie"] is None
    assert result["gates"][-1]["serves"] == "own"
    votes = load_votes(staged.embed / "differences.parquet", "test")
    places = np.array([row["embedding"] for row in _assignments(staged)])
    head = PersonalHead.load(staged.rewards["embedding"])
    margin = head.margin(votes.x, places[votes.worker])
    one = head.of(places[7])
    mine = votes.worker == 7
    np.testing.assert_allclose(one.margin(votes.x[mine]), margin[mine], rtol=1e-5)
    assert one.centered(votes.x).center == pytest.approx(head.centered(votes.x).of(places[7]).center, rel=1e-6)
    per_worker = [(margin[votes.worker == w] > 0).mean() for w in np.unique(votes.worker)]
    assert result["heldout"]["seen"]["accuracy"] == pytest.approx(np.mean(per_worker))
    assert result["heldout"]["seen"]["difference_to_pooled"]["accuracy"]["low"] > 0.05


def test_embeddings_that_say_nothing_do_not_pass_and_one_reward_serves(tmp_path):
    staged = write_stages(tmp_path, groups=False, ships="embedding")
    train_all(staged)
    result = judge(staged)
    assert result["ships"] == "one-reward"
    assert result["gates"][-1]["serves"] == "global"
    assert result["heldout"]["seen"]["difference_to_pooled"]["log_loss"]["value"] == 0


def test_new_workers_are_served_better_the_more_they_have_said(groups):
    _, result = groups
    shots = result["heldout"]["unseen_by_shots"]
    assert list(shots) == ["0", "5", "10", "20"]
    assert shots["0"]["difference_to_pooled"]["log_loss"]["value"] == 0
    gains = [shots[k]["difference_to_pooled"]["log_loss"]["value"] for k in ("0", "5", "20")]
    assert gains[0] > gains[1] > gains[2]
