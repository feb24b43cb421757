"""Reward heads: the optimum, the prior, the weights, the calibration, and the files."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from staged import write_stages

from coterie.config import RewardSettings
from coterie.contracts import HEAD_FILE
from coterie.discovery.votes import Votes
from coterie.errors import BadData
from coterie.rewards import RewardHead, fit_coterie, fit_global, fit_head, train_reward


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((800, 5)).astype(np.float32)
    theta = np.array([1.0, -0.5, 0.0, 0.3, 0.8])
    x[rng.random(800) > expit(x @ theta)] *= -1  # oriented chosen over rejected
    return x, np.ones(800), theta


def test_the_optimum_is_that_of_logistic_regression(problem):
    x, _, _ = problem
    both, labels = np.vstack([x, -x]), np.repeat([1, 0], len(x))
    reference = LogisticRegression(C=1 / 20, fit_intercept=False, tol=1e-8).fit(both, labels).coef_[0]
    ours = fit_head(np.vstack([x, x]), np.ones(2 * len(x)), np.ones(2 * len(x)), np.zeros(5), 20.0)
    np.testing.assert_allclose(ours, reference, atol=2e-4)


def test_a_strong_prior_holds_and_a_weight_counts_as_repetition(problem):
    x, y, _ = problem
    mean = np.arange(5.0)
    np.testing.assert_allclose(fit_head(x, y, np.ones(800), mean, 1e9), mean, atol=1e-4)
    weights = np.where(np.arange(800) < 100, 2.0, 1.0)
    repeated = fit_head(np.vstack([x, x[:100]]), np.ones(900), np.ones(900), mean, 5.0)
    np.testing.assert_allclose(fit_head(x, y, weights, mean, 5.0), repeated, atol=2e-4)


def test_ties_alone_leave_no_preference(problem):
    x, _, _ = problem
    np.testing.assert_allclose(fit_head(x, np.full(800, 0.5), np.ones(800), np.zeros(5), 1.0), 0, atol=1e-5)


def test_features_that_are_not_finite_are_refused_in_words(problem):
    x, y, _ = problem
    x[3, 2] = np.nan
    with pytest.raises(BadData, match="not finite"):
        fit_head(x, y, np.ones(800), np.zeros(5), 1.0)


def test_scale_makes_score_differences_probabilities_and_centre_makes_them_zero_on_average(problem):
    _, _, theta = problem
    rng = np.random.default_rng(1)
    large = rng.standard_normal((20_000, 5))
    large[rng.random(20_000) > expit(large @ theta)] *= -1
    head = RewardHead(theta / 3).calibrated(large, np.ones(20_000), np.ones(20_000))
    assert head.scale == pytest.approx(3, rel=0.05)
    reference = rng.standard_normal((50, 5)) + 2
    centred = head.centered(reference)
    assert centred.score(reference).mean() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(
        centred.score(large[:1]) - centred.score(large[1:2]), head.margin(large[:1] - large[1:2])
    )


def test_calibration_on_separable_comparisons_stays_finite():
    head = RewardHead(np.ones(1)).calibrated(np.ones((5, 1)), np.ones(5), np.ones(5))
    assert 1 < head.scale < 50


def votes_of(theta, workers, n, seed):
    rng = np.random.default_rng(seed)
    worker = np.repeat(np.arange(workers), n)
    x = rng.standard_normal((len(worker), theta.shape[1]))
    x[rng.random(len(x)) > expit((x * theta[worker]).sum(1))] *= -1
    return Votes.of(x, np.ones(len(x)), worker, n_workers=workers)


def test_a_coteries_head_learns_its_own_taste_and_keeps_to_the_global_one_without_cause():
    taste = np.zeros((40, 4))
    taste[:, 0] = 1.0
    taste[:20, 1] = 2.0
    train, validation = votes_of(taste, 40, 60, 0), votes_of(taste, 40, 20, 1)
    reliability = np.ones(40)
    common = fit_global(train, validation, reliability).head
    mine = (np.arange(40) < 20).astype(float)
    own = fit_coterie(train, validation, mine, reliability, common)
    weight = own.head.scale * own.head.weight
    assert weight[1] == pytest.approx(2.0, abs=0.35)
    assert common.scale * common.weight[1] < 1.4
    held = fit_coterie(train, validation, mine, reliability, common, precision=1e8)
    np.testing.assert_allclose(held.head.weight, common.weight, atol=1e-3)


def test_workers_below_the_smallest_responsibility_do_not_count():
    taste = np.zeros((20, 3))
    taste[:10, 0], taste[10:, 0] = 2.0, -2.0
    train, validation = votes_of(taste, 20, 50, 2), votes_of(taste, 20, 20, 3)
    common = RewardHead(np.zeros(3))
    doubtful, none = np.where(np.arange(20) < 10, 1.0, 0.04), np.where(np.arange(20) < 10, 1.0, 0.0)
    fitted = [fit_coterie(train, validation, r, np.ones(20), common, 10.0).head.weight for r in (doubtful, none)]
    np.testing.assert_array_equal(*fitted)
    with pytest.raises(BadData, match="no training comparison belongs"):
        fit_coterie(train, validation, np.full(20, 0.04), np.ones(20), common)


def test_carelessness_does_not_shrink_the_taste():
    taste = np.zeros((40, 2))
    taste[:20, 0], taste[20:, 0] = 2.0, 0.2
    train, validation = votes_of(taste, 40, 80, 4), votes_of(taste, 40, 20, 5)
    told = fit_global(train, validation, np.where(np.arange(40) < 20, 1.0, 0.1), 1.0).head.weight[0]
    untold = fit_global(train, validation, np.ones(40), 1.0).head.weight[0]
    assert told == pytest.approx(2.0, abs=0.25)
    assert untold < 1.4


def test_heads_survive_the_disk_and_damage_is_named(tmp_path):
    head = RewardHead(np.array([0.5, -2.0]), 0.25, 1.5)
    for name in ("a", "b"):
        head.save(tmp_path / name / HEAD_FILE)
    assert (tmp_path / "a" / HEAD_FILE).read_bytes() == (tmp_path / "b" / HEAD_FILE).read_bytes()
    loaded = RewardHead.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.weight, head.weight)
    assert (loaded.center, loaded.scale) == (0.25, 1.5)
    with pytest.raises(BadData, match="no reward head"):
        RewardHead.load(tmp_path / "c")
    (tmp_path / "b" / HEAD_FILE).write_bytes(b"not a tensor")
    with pytest.raises(BadData, match="not a readable safetensors"):
        RewardHead.load(tmp_path / "b")


def test_training_writes_a_head_and_says_how_good_it_is(tmp_path):
    staged = write_stages(tmp_path)
    base = tmp_path / "rewards" / "global"
    told = train_reward(staged.embed, staged.cluster, base, "global", RewardSettings())
    assert told["workers"] == 40
    own = train_reward(staged.embed, staged.cluster, base.with_name("coterie-0"), 0, RewardSettings(), base)
    assert own["validation_log_loss"] < own["global_validation_log_loss"] - 0.02
    assert RewardHead.load(base.with_name("coterie-0")).weight.shape == (20,)
    with pytest.raises(BadData, match="no coterie 2; there are 2"):
        train_reward(staged.embed, staged.cluster, tmp_path / "x", 2, RewardSettings(), base)
    with pytest.raises(BadData, match="give the global reward's folder"):
        train_reward(staged.embed, staged.cluster, tmp_path / "x", 1, RewardSettings())
