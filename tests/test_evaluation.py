"""Held-out quality: macro means, intervals that cover, the gate, the coterie-by-model matrix."""

import json
import shutil

import numpy as np
import pytest
from staged import judge, train_all, write_stages

from coterie.contracts import Estimate
from coterie.discovery.votes import Votes, load_votes
from coterie.errors import BadData
from coterie.evaluation import TwoWayBootstrap
from coterie.rewards import RewardHead


def bootstrap(worker, prompt=None, replicates=400, seed=0, level=0.95):
    worker = np.asarray(worker)
    votes = Votes.of(np.zeros((len(worker), 1)), np.ones(len(worker)), worker, prompt)
    return TwoWayBootstrap(votes, replicates, level, seed)


def test_every_worker_counts_once_however_many_comparisons():
    worker = [0] * 8 + [1] * 2
    values = np.array([1.0] * 8 + [0.0, 0.5])
    made = bootstrap(worker)
    everybody, all_of_them = np.ones(2, bool), np.ones(10, bool)
    assert made.estimate(values, all_of_them, everybody).value == pytest.approx((1 + 0.25) / 2)
    assert made.estimate(values, np.arange(10) != 8, everybody).value == pytest.approx((1 + 0.5) / 2)
    assert made.estimate(values, all_of_them, np.array([True, False])).value == 1


def test_fewer_than_ten_workers_get_no_interval():
    for workers, given in ((9, False), (10, True)):
        worker = np.repeat(np.arange(workers), 5)
        values = np.random.default_rng(0).standard_normal(len(worker))
        made = bootstrap(worker).estimate(values, np.ones(len(worker), bool), np.ones(workers, bool))
        assert (made.low is not None) is given


@pytest.mark.parametrize(
    ("workers", "prompts", "each", "of_worker", "of_prompt"),
    [(12, 0, 10, 0.4, 0.0), (30, 0, 8, 0.0, 0.0), (60, 50, 6, 0.2, 0.4)],
    ids=["few workers who differ", "votes are noise", "prompts differ"],
)
def test_intervals_cover_the_truth_as_often_as_they_say_and_are_not_wasteful(
    workers, prompts, each, of_worker, of_prompt
):
    repetitions, covered, widths, values = 200, 0, [], []
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        worker = np.repeat(np.arange(workers), each)
        if prompts:
            prompt = np.concatenate([rng.choice(prompts, each, replace=False) for _ in range(workers)])
        else:
            prompt = np.arange(len(worker))
        value = of_worker * rng.standard_normal(workers)[worker] + rng.standard_normal(len(worker))
        value += of_prompt * rng.standard_normal(prompt.max() + 1)[prompt]
        made = bootstrap(worker, prompt, replicates=250, seed=seed).estimate(
            value, np.ones(len(worker), bool), np.ones(workers, bool)
        )
        covered += made.low <= 0 <= made.high
        widths.append(made.high - made.low)
        values.append(made.value)
    # 95 % of 200: standard error .015. The pigeonhole bootstrap is 1.7 times too wide where votes are noise.
    assert 0.9 <= covered / repetitions <= 0.99
    assert 0.85 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 1.25


def test_more_units_than_groups_change_little():
    rng = np.random.default_rng(0)
    worker = np.repeat(np.arange(5000), 2)
    values = rng.standard_normal(len(worker))
    made = bootstrap(worker).estimate(values, np.ones(len(worker), bool), np.ones(5000, bool))
    assert made.high - made.low == pytest.approx(2 * 1.96 / np.sqrt(10_000), rel=0.15)


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
    votes = load_votes(staged.embed / "differences.parquet", ("test",))
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
    assert result["heldout"]["seen"]["difference_to_pooled"]["accuracy"]["value"] == 0


def test_ties_count_in_the_log_loss_and_not_in_the_accuracy(tmp_path):
    staged = write_stages(tmp_path, ties=0.3)
    train_all(staged)
    result = judge(staged)
    votes = load_votes(staged.embed / "differences.parquet", ("test",))
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


def test_an_estimate_of_nobody_is_no_number():
    made = bootstrap([0, 0, 1, 1]).estimate(np.zeros(4), np.ones(4, bool), np.zeros(2, bool))
    assert isinstance(made, Estimate)
    assert made.value is None
