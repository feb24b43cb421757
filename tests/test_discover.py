"""The verdict and what it rests on: the test, the stability, what is shipped."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from coterie.config import ClusterSettings, EmbedSettings
from coterie.discovery import Votes
from coterie.discovery.discover import discover
from coterie.discovery.heterogeneity import heterogeneity
from coterie.discovery.selection import HeldOut
from coterie.errors import BadData
from tests.discovery_data import simulate

EMBED = EmbedSettings(max_rank=3, splits=2)
CLUSTER = ClusterSettings(max_coteries=4, splits=2, replicates=39)


@pytest.fixture(scope="module")
def groups():
    return simulate("groups", workers=160, comparisons=60, features=8, groups=2, seed=1)


def test_groups_are_coteries_and_their_rewards_are_shipped(groups) -> None:
    found = discover(groups.train, EMBED, CLUSTER)
    chosen = found.selection
    assert (chosen.verdict, chosen.member, chosen.coteries, chosen.ships) == ("coteries", "mixture", 2, "coteries")
    assert not chosen.insisted
    assert found.heterogeneity.p_value == pytest.approx(1 / 40)
    assert found.stability > 0.3
    assert found.reward is found.mixture
    assert adjusted_rand_score(groups.group, found.mixture.responsibilities_.argmax(axis=1)) > 0.85
    assert found.reward.score(groups.test) > found.base.score(groups.test) + 0.02
    again = discover(groups.train, EMBED, CLUSTER)
    assert again.selection == chosen
    np.testing.assert_array_equal(again.mixture.theta_, found.mixture.theta_)


def test_tastes_by_degrees_are_continuous_and_each_person_has_a_reward() -> None:
    people = simulate("continuous", workers=160, comparisons=80, features=8, seed=2)
    found = discover(people.train, EMBED, CLUSTER)
    assert (found.selection.verdict, found.selection.member, found.selection.ships) == (
        "continuous",
        "lowrank",
        "embedding",
    )
    assert found.reward.score(people.test) > found.mixture.score(people.test)


@pytest.mark.parametrize("careless", [0.0, 0.3])
def test_one_taste_is_one_reward_and_the_gain_that_is_ruled_out_is_said(careless) -> None:
    people = simulate("null", workers=80, comparisons=40, features=6, careless=careless, seed=3)
    found = discover(people.train, EMBED, CLUSTER)
    assert (found.selection.verdict, found.selection.ships, found.selection.coteries) == ("one-taste", "one-reward", 1)
    assert found.heterogeneity.p_value >= 0.05
    assert found.selection.gain.high < 0.02
    assert found.reward is found.base


def test_the_recipe_can_insist_and_that_is_said(groups) -> None:
    quick = CLUSTER.model_copy(update={"replicates": 0})
    for change, ships in (({"ship": "embedding"}, "embedding"), ({"ship": "one-reward"}, "one-reward")):
        chosen = discover(groups.train, EMBED, quick.model_copy(update=change)).selection
        assert (chosen.verdict, chosen.ships, chosen.insisted) == ("coteries", ships, True)
    three = discover(groups.train, EMBED, quick.model_copy(update={"coteries": 3, "min_workers": 1})).selection
    assert (three.coteries, three.ships, three.insisted) == (3, "coteries", True)
    with pytest.raises(BadData, match="at least 100 are asked for"):
        discover(groups.train, EMBED, quick.model_copy(update={"coteries": 2, "min_workers": 100}))


def test_the_test_is_about_tastes_and_not_about_carelessness(groups) -> None:
    heldout = HeldOut(groups.train, 2, 0)
    found = heterogeneity(heldout, 39, 0)
    assert found.p_value == pytest.approx(1 / 40)
    assert found.statistic > 0.005
    one = simulate("null", workers=80, comparisons=40, features=6, careless=0.5, seed=4)
    assert heterogeneity(HeldOut(one.train, 2, 0), 39, 0).p_value > 0.05
    assert heterogeneity(HeldOut(one.train, 2, 0), 0, 0).replicates == 0


ODD = {
    "disconnected workers": lambda rng: (
        np.repeat(np.eye(12), 6, axis=0),
        np.ones(72),
        np.repeat(np.arange(12), 6),
        None,
    ),
    "all tied": lambda rng: (rng.standard_normal((120, 3)), np.full(120, 0.5), np.arange(120) % 8, None),
    "one prompt": lambda rng: (rng.standard_normal((120, 3)), np.ones(120), np.arange(120) % 8, np.zeros(120)),
    "separable": lambda rng: (np.abs(rng.standard_normal((120, 3))), np.ones(120), np.arange(120) % 8, None),
    "one vote each": lambda rng: (rng.standard_normal((400, 3)), np.ones(400), np.arange(400), None),
    "constant feature": lambda rng: (np.tile([1.0, 0.0, 2.0], (120, 1)), np.ones(120), np.arange(120) % 8, None),
    "one worker": lambda rng: (rng.standard_normal((60, 3)), np.ones(60), np.zeros(60), None),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_data_get_a_verdict_and_finite_numbers(name) -> None:
    x, y, worker, prompt = ODD[name](np.random.default_rng(0))
    votes = Votes.of(x, y, worker, prompt)
    found = discover(votes, EMBED, CLUSTER.model_copy(update={"replicates": 9}))
    assert found.selection.verdict == "one-taste"
    assert np.isfinite(found.reward.decision_function(votes)).all()
    assert np.isfinite(found.mixture.responsibilities_).all()
    assert np.isfinite(found.embedding.embeddings_).all()
