"""Peers learn what they are said to learn, and the protocol shows nobody what they are judged on."""

import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from benchmarks.peers import EFFORT, SPLITS, LinearReward, chosen, inner_splits, tuned
from benchmarks.peers.every import OURS, PEERS, POOLED, REFERENCE
from benchmarks.peers.lore import LoRe, place
from benchmarks.peers.meta import Meta
from benchmarks.peers.neighbours import Neighbours
from benchmarks.peers.own import Own, ridge
from benchmarks.peers.pal import Pal
from benchmarks.peers.pooled import Pooled
from benchmarks.peers.protocol import Split, Tally, confront, tallies, turns, worst_tenth
from benchmarks.peers.vpl import Vpl
from benchmarks.settings import together
from benchmarks.study import comparison
from coterie.discovery import Votes
from coterie.discovery.votes import one_thread
from tests.discovery_data import simulate

PERSONAL = {
    peer.name: (peer, settings)
    for peer, settings in (
        (Own(), {"start": "pooled", "precision": 10.0}),
        (LoRe(), {"bases": 2, "pull": 100.0}),
        (Pal(), {"prototypes": 2, "precision": 1.0}),
        (Vpl(), {"steps": 150, "kl": 0.001}),
        (Meta(), {"rate": 100.0, "precision": 1.0}),
        (Neighbours(), {"neighbours": 20, "precision": 10.0}),
    )
}


@pytest.fixture(autouse=True)
def _calmly():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def groups():
    """Two groups at cosine 0.7; the last five workers have no training votes."""
    people = simulate("groups", workers=85, comparisons=60, features=6, groups=2, seed=1)
    return people.train.subset(people.train.worker < 80), people.test


def rows_of(votes: Votes) -> set[bytes]:
    return {row.tobytes() for row in votes.x}


@pytest.mark.parametrize("name", PERSONAL)
def test_a_peer_learns_who_wants_what_from_few_votes_too(name: str, groups) -> None:
    train, test = groups
    peer, settings = PERSONAL[name]
    seen, new = np.arange(60), np.arange(60, 80)
    fitted = peer.fit(train.of_workers(seen), settings, seed=0)
    common = Pooled().fit(train.of_workers(seen), {"precision": 10.0}, 0)
    held_out, shots, asked = test.of_workers(seen), train.of_workers(new), test.of_workers(new)
    assert fitted.losses(held_out).mean() < common.losses(held_out).mean() - 0.005
    after, before = fitted.adapt(shots), fitted.adapt(shots.subset(np.zeros(len(shots), bool)))
    assert after.losses(asked).mean() < before.losses(asked).mean() - 0.005
    assert before.losses(asked).mean() < common.adapt(shots).losses(asked).mean() + 0.03
    assert np.isfinite(before.decision_function(asked)).all()


@pytest.mark.parametrize("name", [*PERSONAL, POOLED, REFERENCE])
def test_the_same_votes_give_the_same_rewards_and_who_has_none_is_a_stranger(name: str, groups) -> None:
    peer, settings = PERSONAL.get(name) or (PEERS[name], PEERS[name].grid[0])
    train, test = (votes.of_workers(np.arange(60, 85)) for votes in groups)
    one, again = (peer.fit(train, settings, seed=3) for _ in range(2))
    logits = one.decision_function(test)
    np.testing.assert_array_equal(logits, again.decision_function(test))
    stranger = one.adapt(train.subset(np.zeros(len(train), bool))).decision_function(test)
    silent = test.worker >= 20
    np.testing.assert_allclose(logits[silent], stranger[silent], rtol=1e-3, atol=1e-3)


def test_all_peers_have_as_many_candidates() -> None:
    for name, peer in PEERS.items():
        assert peer.name == name
        assert peer.source
        assert len({json.dumps(settings) for settings in peer.grid}) == (1 if name == OURS else EFFORT)


class Constant(LinearReward):
    def adapt(self, shots: Votes) -> LinearReward:
        return LinearReward(np.tile(self.weights[0], (shots.n_workers, 1)))


class Spy:
    """A peer that gives everybody the same weights, times a factor that is tuned, and remembers what it saw."""

    name, source = "spy", "none"
    grid = ({"factor": 5.0}, {"factor": 1.0}, {"factor": 0.0})

    def __init__(self, weights: np.ndarray) -> None:
        self.weights, self.fits = weights, []

    def fit(self, train: Votes, settings, seed: int) -> Constant:
        self.fits.append((train, settings))
        return Constant(np.tile(settings["factor"] * self.weights, (train.n_workers, 1)))


def test_the_candidate_of_least_held_out_loss_is_chosen_and_fitted_to_all_votes() -> None:
    rng = np.random.default_rng(0)
    theta = np.array([1.0, -1.0, 0.5])
    x = rng.standard_normal((600, 3))
    x[rng.random(600) > expit(x @ theta)] *= -1
    votes = Votes.of(x, np.ones(600), np.arange(600) % 20, np.arange(600) % 50)
    spy = Spy(theta)
    splits = inner_splits(votes, 0)
    assert chosen(spy, splits, 0) == {"factor": 1.0}
    fitted_on = [train for train, _ in spy.fits]
    assert len(fitted_on) == SPLITS * len(spy.grid)
    for (train, judge), seen in zip(splits, fitted_on[:SPLITS], strict=True):
        assert seen is train
        assert not np.intersect1d(train.prompt, judge.prompt).size
    tuned(spy, votes, 0)
    assert len(spy.fits[-1][0]) == 600


def test_a_model_of_each_worker_is_logistic_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 4)), (rng.random(200) < 0.6).astype(float)
    votes = Votes.of(x, y, np.repeat([0, 1], [60, 140]), n_workers=3)
    center = np.array([0.3, 0.0, -0.2, 0.1])
    weights = ridge(votes, center, 2.0)
    np.testing.assert_array_equal(weights[2], center)
    around_zero = ridge(votes, np.zeros(4), 2.0)
    for worker, rows in enumerate((slice(0, 60), slice(60, 200))):
        alone = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-8).fit(x[rows], y[rows])
        np.testing.assert_allclose(around_zero[worker], alone.coef_[0], atol=2e-3)


def test_shares_of_known_rewards_are_found_from_shots() -> None:
    rng = np.random.default_rng(0)
    vertices = np.array([[3.0, -3.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    x = rng.standard_normal((400, 3)).astype(np.float32)
    worker = np.repeat([0, 1], 200)
    x[rng.random(400) > expit((x * vertices.T[worker]).sum(axis=1))] *= -1
    shares = place(Votes.of(x, np.ones(400), worker, n_workers=3), vertices, np.array([0.4, 0.6], np.float32))
    np.testing.assert_allclose(shares[:2], np.eye(2), atol=0.1)
    np.testing.assert_allclose(shares[2], [0.4, 0.6], atol=1e-5)


def test_adaptation_of_the_meta_learned_reward_is_one_gradient_step(groups) -> None:
    train, _ = groups
    fitted = Meta().fit(train, {"rate": 10.0, "precision": 10.0}, 0)
    mine = train.subset(train.worker == 0)
    rewards, start = mine.x @ fitted.bases, fitted.start
    shares = np.exp(start) / np.exp(start).sum()
    margins = rewards @ shares
    by_share = -((1 - expit(margins))[:, None] * rewards).mean(axis=0)
    own = start - 10.0 * shares * (by_share - shares @ by_share)
    expected = fitted.bases @ (np.exp(own) / np.exp(own).sum())
    np.testing.assert_allclose(fitted.weights[0], expected, rtol=1e-3, atol=1e-4)


def test_a_latent_user_does_not_depend_on_the_order_of_votes_and_learns_nothing_of_ties(groups) -> None:
    train, test = groups
    fitted = Vpl().fit(train, {"steps": 30, "kl": 0.001}, 0)
    few = train.subset(turns(train, np.random.default_rng(0)) < 20)
    backwards = Votes(few.x[::-1], few.y[::-1], few.worker[::-1], few.prompt[::-1], few.n_workers)
    again = Votes.of(backwards.x, backwards.y, backwards.worker, backwards.prompt, few.n_workers)
    np.testing.assert_allclose(
        fitted.adapt(few).decision_function(test), fitted.adapt(again).decision_function(test), atol=1e-4
    )
    tied, turned = (Votes(x, np.full(len(few), 0.5, np.float32), few.worker, few.prompt, 85) for x in (few.x, -few.x))
    np.testing.assert_array_equal(
        fitted.adapt(tied).decision_function(test), fitted.adapt(turned).decision_function(test)
    )


def test_neighbours_lend_their_taste_to_who_has_said_little(groups) -> None:
    train, test = groups
    fitted = Neighbours().fit(train, {"neighbours": 5, "precision": 10.0}, 0)
    few = train.subset(turns(train, np.random.default_rng(0)) < 5)
    alone = LinearReward(ridge(few, fitted.center, 10.0))
    voting = few.present
    assert fitted.adapt(few).losses(test)[voting].mean() < alone.losses(test)[voting].mean()


def test_nothing_is_fitted_to_what_is_judged() -> None:
    people = simulate("groups", workers=40, comparisons=40, features=4, groups=2, seed=2, held_out=12, prompts=60)
    votes = together([people.train, people.test])
    part = votes.prompt % 5
    split = Split(votes.subset(part > 1), votes.subset(part == 1), votes.subset(part == 0))
    new = np.arange(40) % 4 == 0
    spy, into = Spy(np.ones(4)), tallies(split.test)
    told = confront(split, new, into, draws=3, seed=0, peers={"spy": spy})
    allowed = rows_of(split.train.of_workers(np.flatnonzero(~new)))
    assert all(rows_of(train) <= allowed for train, _ in spy.fits)
    seen = ~new[split.test.worker]
    np.testing.assert_array_equal(into["seen"].judged, seen)
    np.testing.assert_array_equal(into["0"].judged, ~seen)
    pool = together([split.train, split.validation]).counts
    np.testing.assert_array_equal(into["20"].judged, (new & (pool >= 20))[split.test.worker])
    assert set(into["20"].sums["spy"][0]) == {0, 3}  # as often as shots were drawn
    assert not into["50"].judged.any()
    assert told["spy"]["settings"] in spy.grid
    assert 0 < told["spy"]["factor"] < 5


def test_shots_of_few_are_part_of_the_shots_of_more() -> None:
    votes = Votes.of(np.ones((9, 1)), np.ones(9), [0, 0, 0, 0, 2, 2, 3, 3, 3])
    turn = turns(votes, np.random.default_rng(0))
    assert sorted(turn[:4]) == [0, 1, 2, 3]
    assert sorted(turn[4:6]) == [0, 1]
    assert any((turns(votes, np.random.default_rng(s)) != turn).any() for s in range(1, 4))


def test_what_was_said_is_averaged_over_draws() -> None:
    tally = Tally(np.array([1.0, 1.0, 0.5], np.float32))
    tally.add("a", np.array([0, 2]), np.array([2.0, 1.0]))
    tally.add("a", np.array([0]), np.array([-2.0]))
    np.testing.assert_array_equal(tally.judged, [True, False, True])
    np.testing.assert_allclose(tally.right("a")[0], 0.5)
    np.testing.assert_allclose(tally.log_loss("a")[0], np.log1p(np.exp([2.0, -2.0])).mean())


def test_the_worst_tenth_is_of_those_who_voted_often() -> None:
    worker = np.concatenate([np.repeat(np.arange(20), 5), [20]])
    votes = Votes.of(np.ones((101, 1)), np.ones(101), worker)
    right = np.ones(101)
    right[:5], right[5:7], right[100] = 0, 0, 0
    assert worst_tenth(votes, right, np.ones(101, bool)) == pytest.approx((0 + 0.6) / 2)
    assert worst_tenth(votes, right, np.arange(101) % 5 == 0) is None


def test_both_arms_of_the_leak_have_as_many_votes_and_only_one_has_seen_the_responses() -> None:
    rng = np.random.default_rng(0)
    h = rng.standard_normal((12, 4, 3))
    prompt = rng.integers(0, 12, 400)
    sides = np.array([rng.choice(4, 2, replace=False) for _ in range(400)])
    votes = Votes.of(h[prompt, sides[:, 0]] - h[prompt, sides[:, 1]], np.ones(400), np.arange(400) % 10, prompt)
    pair = comparison.pairs(votes)
    same = (np.abs(votes.x[0]) == np.abs(votes.x)).all(axis=1)
    np.testing.assert_array_equal(pair == pair[0], same)
    asked = votes.prompt < 4
    shown = asked & (pair % 2 == 0)
    most = np.full(10, 20)
    free, leaking = (
        comparison.training(votes, ~asked, first, most, np.random.default_rng(0)) for first in (None, shown)
    )
    counts = [np.bincount(votes.worker[kept], minlength=10) for kept in (free, leaking)]
    np.testing.assert_array_equal(*counts)
    assert (counts[0] == 20).all()
    assert not (free & asked).any()
    assert not (leaking & asked & ~shown).any()
    assert (leaking & shown).sum() == np.minimum(np.bincount(votes.worker[shown], minlength=10), 20).sum()


def estimate(value: float, reach: float | None = 0.01) -> dict:
    low, high = (None, None) if reach is None else (value - reach, value + reach)
    return {"value": value, "low": low, "high": high, "level": 0.95}


def audience(**less: float) -> dict:
    """Methods by how much their log-loss is less than coterie's."""
    methods = {
        name: {
            "log_loss": estimate(0.6 + by),
            "accuracy": estimate(0.7 - by),
            "worst_tenth": 0.5,
            "less coterie": {"log_loss": estimate(by), "accuracy": estimate(-by)},
            "less reliability": {"log_loss": estimate(by - 0.02), "accuracy": estimate(0.02 - by)},
        }
        for name, by in {OURS: 0.0, **less}.items()
    }
    return {"workers": 30, "votes": 300, "methods": methods}


def row(kind: str, audiences: dict, verdict: str = "coteries") -> dict:
    fits = [{"found": {"verdict": verdict, "p_value": 0.02}}]
    return {"task": [kind, "set", 0], "seconds": 1.0, "audiences": audiences, "fits": fits}


def test_targets_are_about_what_is_sure() -> None:
    level, ahead = ({POOLED: by} for by in (-0.005, -0.02))
    rows = [row("real", {"seen": audience(**level), "10": audience(**ahead)}) for _ in range(2)]
    told = comparison.summary(rows)
    assert list(told["targets"].values()) == [True, True, False]
    worse = comparison.summary([row("real", {"seen": audience(**ahead), "10": audience(**level)}, "one-taste")])
    assert list(worse["targets"].values()) == [False, True]  # one taste: nothing to be better at
    seen = told["real"]["set"]["audiences"]["seen"]["methods"]
    assert seen[POOLED]["less coterie"]["log_loss"]["low"] == pytest.approx(-0.015)


def test_the_section_has_every_method_in_every_table() -> None:
    audiences = {"seen": audience(pooled=0.01), "0": audience(pooled=0.01), "10": audience(pooled=0.01)}
    values = {"log_loss": 0.6, "accuracy": 0.7, "worst_tenth": 0.5}
    simulated = {
        a: told | {"methods": {OURS: values, REFERENCE: values, POOLED: values}} for a, told in audiences.items()
    }
    arm = {"accuracy": estimate(0.7), "log_loss": estimate(0.6)}
    leaked = {"workers": 9, "votes": 90, "methods": {POOLED: {"published": arm, "leak-free": arm, "worth": arm}}}
    rows = [row("real", audiences), row("leak", {"seen": leaked, "10": leaked, "50": leaked})]
    rows += [row("simulated", simulated) for _ in range(3)]
    told = comparison.summary(rows)
    assert told["simulated"]["set"]["audiences"]["10"]["methods"][POOLED]["less coterie"]["log_loss"]["low"] == 0
    lines = comparison.markdown(json.loads(json.dumps(told))).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith(f"| {POOLED} |") for line in tables) == 3
    assert {line.count("|") for line in tables} == {7, 5}


@pytest.mark.data
@pytest.mark.skipif(not comparison.available(), reason="there is no shared/data")
def test_real_tasks_are_planned_where_the_data_are() -> None:
    few, all_of_them = (comparison.tasks(full) for full in (False, True))
    assert {task[1] for task in few if task[0] == "real"} == set(comparison.available())
    assert len(all_of_them) > len(few)
    json.dumps(all_of_them)
