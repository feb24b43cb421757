"""The members of the model family on simulated workers, and on input that invites trouble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score

from coterie.discovery import (
    LowRankReward,
    MixtureReward,
    PooledReward,
    ReliabilityReward,
    Votes,
    cluster_embeddings,
    fit_coteries,
)
from coterie.errors import BadConfiguration, BadData
from tests.discovery_data import Simulated, simulate

MEMBERS = [PooledReward(), ReliabilityReward(), LowRankReward(2), MixtureReward(2)]
ids = [type(member).__name__ for member in MEMBERS]


def accuracy(member, votes: Votes) -> float:
    right = votes.sum_by_worker((member.decision_function(votes) > 0).astype(float))
    return float((right / votes.counts).mean())


@pytest.fixture(scope="module")
def groups() -> Simulated:
    return simulate("groups", seed=1)


@pytest.fixture(scope="module")
def continuous() -> Simulated:
    return simulate("continuous", seed=1)


def test_pooled_is_ridge_logistic_regression(groups: Simulated) -> None:
    votes = groups.train
    pooled = PooledReward(precision=30.0, tol=1e-7).fit(votes)
    flip = np.where(np.arange(len(votes)) % 2, 1, -1)  # scikit-learn wants both classes
    reference = LogisticRegression(C=1 / 30.0, fit_intercept=False, tol=1e-8).fit(votes.x * flip[:, None], flip > 0)
    np.testing.assert_allclose(pooled.theta_, reference.coef_[0], atol=2e-4)


def test_a_tie_is_half_a_vote_each_way() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)).astype(np.float32)
    y = np.where(rng.random(200) < 0.3, 0.5, 1.0)
    ties = Votes.of(x, y, np.zeros(200, int))
    doubled = Votes.of(
        np.concatenate([x, x[y == 1], -x[y == 0.5]]), np.ones(400), np.zeros(400, int)
    )  # each vote twice, a tie once each way
    one, two = PooledReward(5.0, tol=1e-7).fit(ties), PooledReward(10.0, tol=1e-7).fit(doubled)
    np.testing.assert_allclose(one.theta_, two.theta_, atol=1e-4)


def test_mixture_finds_the_standard_groups(groups: Simulated) -> None:
    mixture = MixtureReward(4).fit(groups.train)
    assert adjusted_rand_score(groups.group, mixture.responsibilities_.argmax(axis=1)) >= 0.9
    assert (np.diff(mixture.weights_) <= 0).all()
    assert accuracy(mixture, groups.test) > accuracy(PooledReward().fit(groups.train), groups.test) + 0.025
    assert mixture.gradient_ <= mixture.tol


def test_low_rank_recovers_continuous_tastes(continuous: Simulated) -> None:
    pooled, low_rank = PooledReward().fit(continuous.train), LowRankReward(3).fit(continuous.train)
    assert accuracy(low_rank, continuous.test) > accuracy(pooled, continuous.test) + 0.035
    assert low_rank.score(continuous.test) > LowRankReward(1).fit(continuous.train).score(continuous.test) + 0.02
    excess = LowRankReward(4).fit(continuous.train)
    assert np.linalg.norm(excess.basis_, axis=0)[3] < 0.3 * np.linalg.norm(excess.basis_, axis=0)[2]
    spread = excess.embeddings_[:, :3].var(axis=0) + np.einsum("irr->ir", excess.covariances_)[:, :3].mean(axis=0)
    np.testing.assert_allclose(spread, 1.0, atol=0.15)  # a_i ~ N(0, I)


def test_basis_is_in_canonical_form(continuous: Simulated) -> None:
    basis = LowRankReward(3).fit(continuous.train).basis_
    gram = basis.T @ basis
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
    assert (np.diff(np.diag(gram)) <= 0).all()
    assert (basis[np.abs(basis).argmax(axis=0), range(3)] > 0).all()


@pytest.mark.parametrize("member", [ReliabilityReward(10, 1.0), LowRankReward(2, reliability_variance=1.0)], ids=str)
def test_careless_workers_get_low_reliability(member) -> None:
    people = simulate("null", workers=200, careless=0.3, seed=3)
    fitted = clone(member).fit(people.train)
    careless, careful = (np.exp(fitted.log_reliability_[who]) for who in (people.careless, ~people.careless))
    assert np.quantile(careless, 0.9) < 0.5 * np.quantile(careful, 0.1)
    assert fitted.score(people.test) > PooledReward().fit(people.train).score(people.test) + 0.02


def test_careless_workers_make_no_coterie_of_their_own() -> None:
    people = simulate("groups", workers=240, comparisons=80, features=12, groups=2, careless=0.3, seed=4)
    base = ReliabilityReward(10, 1.0).fit(people.train)
    for n_coteries in (2, 3):
        found = MixtureReward(n_coteries, base=base).fit(people.train).responsibilities_.argmax(axis=1)
        assert adjusted_rand_score(people.careless, found) < 0.1
    assert adjusted_rand_score(people.group[~people.careless], found[~people.careless]) > 0.5


def test_a_minority_of_opposite_taste_is_no_carelessness() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3000, 3)).astype(np.float32)
    worker = np.arange(3000) % 50
    taste = np.where((worker < 15)[:, None], [0, 4, 0], [4, 0, 0])
    x[rng.random(3000) > 1 / (1 + np.exp(-(x * taste).sum(axis=1)))] *= -1
    votes = Votes.of(x, np.ones(3000), worker)
    base = ReliabilityReward(reliability_variance=1.0).fit(votes)
    for member in (MixtureReward(2, base=base), LowRankReward(1, base=base)):
        assert member.fit(votes).score(votes) > base.score(votes) + 0.05


def test_new_workers_are_placed_from_their_votes_alone(groups: Simulated) -> None:
    half = np.arange(200)
    mixture = MixtureReward(4).fit(groups.train.of_workers(half))
    strangers = groups.train.of_workers(np.arange(200, 400))
    posterior, log_reliability = mixture.infer(strangers)
    assert adjusted_rand_score(groups.group[200:], posterior.argmax(axis=1)) > 0.85
    assert np.isfinite(log_reliability).all()
    low_rank = LowRankReward(3).fit(groups.train.of_workers(half))
    embeddings, _, _ = low_rank.infer(groups.train.of_workers(half))
    np.testing.assert_allclose(embeddings, low_rank.embeddings_, atol=0.05)


def test_workers_without_votes_have_the_prior(groups: Simulated) -> None:
    votes = groups.train.subset((groups.train.worker < 120) & (groups.train.worker != 7))
    mixture, low_rank = MixtureReward(3).fit(votes), LowRankReward(2).fit(votes)
    silent = ~votes.present
    assert silent.sum() == 281
    np.testing.assert_allclose(mixture.infer(votes)[0][silent], np.tile(mixture.weights_, (281, 1)))
    np.testing.assert_allclose(mixture.responsibilities_[silent], np.tile(mixture.weights_, (281, 1)))
    assert (mixture.log_reliability_[silent] == 0).all()
    assert (low_rank.embeddings_[silent] == 0).all()


def test_many_comparisons_start_on_some_workers_and_end_the_same(groups: Simulated, monkeypatch) -> None:
    direct = MixtureReward(4, tol=1e-5).fit(groups.train), LowRankReward(3, tol=1e-5).fit(groups.train)
    for module in ("mixture", "lowrank"):
        monkeypatch.setattr(f"coterie.discovery.{module}.PILOT", 15_000)
    piloted = MixtureReward(4, tol=1e-5).fit(groups.train), LowRankReward(3, tol=1e-5).fit(groups.train)
    np.testing.assert_allclose(direct[0].theta_, piloted[0].theta_, atol=2e-3)
    np.testing.assert_allclose(direct[1].theta_, piloted[1].theta_, atol=5e-3)
    assert direct[1].score(groups.test) == pytest.approx(piloted[1].score(groups.test), abs=1e-3)


@pytest.mark.parametrize("member", [LowRankReward(1), MixtureReward(2)], ids=str)
def test_everybody_may_be_equally_reliable(groups: Simulated, member) -> None:
    fitted = clone(member).set_params(base=PooledReward().fit(groups.train)).fit(groups.train)
    assert np.abs(fitted.log_reliability_).max() < 1e-3
    assert fitted.score(groups.test) > fitted.base.score(groups.test)


def test_a_mixture_survives_its_file(groups: Simulated, tmp_path: Path) -> None:
    mixture = MixtureReward(4).fit(groups.train)
    mixture.save(tmp_path / "mixture.safetensors", "v1")
    again = MixtureReward.load(tmp_path / "mixture.safetensors")
    np.testing.assert_allclose(again.infer(groups.test)[0], mixture.infer(groups.test)[0], atol=1e-5)
    with pytest.raises(BadData, match="coterie cluster"):
        MixtureReward.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("method", ["kmeans", "ward", "average"])
def test_clustered_embeddings_become_coteries(groups: Simulated, method) -> None:
    base = ReliabilityReward().fit(groups.train)
    fitted = fit_coteries(groups.train, 4, method, base, 100.0, rank=3, seed=0)
    found = adjusted_rand_score(groups.group, fitted.responsibilities_.argmax(axis=1))
    assert found > (0.5 if method == "average" else 0.8)
    assert fitted.score(groups.test) > base.score(groups.test) + 0.02


def test_clustering_says_what_it_cannot_do() -> None:
    with pytest.raises(BadData, match="3 coteries of 2 workers"):
        cluster_embeddings(np.eye(2), 3, "kmeans", 0)
    with pytest.raises(BadConfiguration, match="mixture or kmeans"):
        cluster_embeddings(np.zeros((20_001, 1)), 2, "ward", 0)
    for method in ("kmeans", "ward", "average"):
        labels = cluster_embeddings(np.zeros((6, 2)), 2, method, 0)
        assert labels.shape == (6,)
    with pytest.raises(BadData, match="ask for 1 to 2"):
        MixtureReward(3).fit(Votes.of(np.eye(2), [1, 1], [0, 1]))
    with pytest.raises(BadData, match="ask for 1 to 2"):
        LowRankReward(3).fit(Votes.of(np.eye(2), [1, 1], [0, 1]))
    with pytest.raises(BadData, match="fitted on 2 workers and 2 features"):
        PooledReward().fit(Votes.of(np.eye(2), [1, 1], [0, 1])).score(Votes.of(np.eye(3), [1, 1, 1], [0, 1, 1]))


def _odd(kind: str) -> Votes:
    rng = np.random.default_rng(4)
    x, y, worker = rng.standard_normal((60, 5)).astype(np.float32), np.ones(60), np.arange(60) % 6
    if kind == "one worker":
        worker = np.zeros(60, int)
    elif kind == "one comparison a worker":
        worker = np.arange(60)
    elif kind == "separable":
        x[:, 0] = np.abs(x[:, 0]) * 1000
    elif kind == "constant features":
        x[:, 2:] = 0
    elif kind == "all ties":
        y[:] = 0.5
    elif kind == "always alike":  # worker 0 always takes the first response, whatever it says; all others agree
        x[:, 1] = np.abs(x[:, 1])
        x[worker == 0] *= rng.choice([-1, 1], (10, 1))
    elif kind == "no difference":
        x[:] = 0
    elif kind == "huge features":
        x *= 1e4
    return Votes.of(x, y, worker)


@pytest.mark.parametrize("member", MEMBERS, ids=ids)
@pytest.mark.parametrize(
    "kind",
    [
        "one worker",
        "one comparison a worker",
        "separable",
        "constant features",
        "all ties",
        "always alike",
        "no difference",
        "huge features",
    ],
)
def test_odd_votes_give_finite_results(member, kind: str) -> None:
    votes = _odd(kind)
    if kind == "one worker" and isinstance(member, MixtureReward):
        member = MixtureReward(1)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        fitted = clone(member).fit(votes)
        assert np.isfinite(fitted.decision_function(votes)).all()
        assert np.isfinite(fitted.score(votes))
    for name, value in vars(fitted).items():
        if isinstance(value, np.ndarray):
            assert np.isfinite(value).all(), name
    if kind == "all ties":
        assert np.abs(fitted.theta_).max() < 1e-3


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), member=st.sampled_from(MEMBERS))
def test_the_order_of_rows_and_the_numbering_of_workers_do_not_matter(seed: int, member) -> None:
    people = simulate("groups", workers=40, comparisons=40, features=6, groups=2, seed=11, held_out=0).train
    rng = np.random.default_rng(seed)
    rows, number = rng.permutation(len(people)), rng.permutation(people.n_workers)
    shuffled = Votes.of(people.x[rows], people.y[rows], number[people.worker[rows]], people.prompt[rows])
    one, other = clone(member).set_params(tol=1e-6).fit(people), clone(member).set_params(tol=1e-6).fit(shuffled)
    np.testing.assert_allclose(one.theta_, other.theta_, atol=0.01)
    np.testing.assert_allclose(one.log_reliability_, other.log_reliability_[number], atol=0.02)
    assert one.score(people) == pytest.approx(other.score(shuffled), abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30),
    features=st.integers(1, 5),
    workers=st.integers(1, 6),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 999),
    member=st.sampled_from([PooledReward(), ReliabilityReward(), LowRankReward(1), MixtureReward(1), MixtureReward(2)]),
)
def test_any_small_votes_give_probabilities(n, features, workers, scale, seed, member) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 0.0, 1.0, 3.0], (n, features)) * scale
    votes = Votes.of(x, rng.choice([0.5, 1.0], n), rng.integers(0, workers, n), n_workers=workers)
    try:
        fitted = clone(member).fit(votes)
    except BadData:
        assert getattr(member, "n_coteries", 1) > votes.present.sum()
        return
    assert np.isfinite(fitted.decision_function(votes)).all()
    if isinstance(fitted, MixtureReward):
        posterior = fitted.infer(votes)[0]
        np.testing.assert_allclose(posterior.sum(axis=1), 1)
        assert (posterior >= 0).all()
