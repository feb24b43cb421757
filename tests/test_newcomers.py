"""New workers: their learning curve, the temperature of their posterior, the pair to ask them next."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.special import entr, expit
from scipy.stats import norm

from coterie.discovery.logistic import log_loss
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.newcomers import (
    LearningCurve,
    learning_curve,
    next_pair,
    next_pair_by_embedding,
    predict,
    tempered,
    tempered_embedding,
)
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Votes
from tests.discovery_data import Simulated, simulate

BASE = ReliabilityReward(10.0, 0.03)


def mixture(votes: Votes, base: ReliabilityReward, coteries: int = 2) -> MixtureReward:
    return MixtureReward(coteries, 100.0, base.reliability_variance, base).fit(votes)


def low_rank(votes: Votes, base: ReliabilityReward) -> LowRankReward:
    return LowRankReward(1, base.precision, 100.0, base=base).fit(votes)


def slopes(votes: Votes, base: ReliabilityReward) -> SlopesReward:
    return SlopesReward(0.1, base=base).fit(votes)


def splits(people: Simulated) -> tuple[Votes, Votes, Votes]:
    validation = np.arange(len(people.test)) % 2 == 0
    return people.train, people.test.subset(validation), people.test.subset(~validation)


def macro(curve: LearningCurve, logits: np.ndarray) -> float:
    votes = curve.votes
    return float((votes.sum_by_worker(log_loss(logits, votes.y)) / votes.counts).mean())


@pytest.fixture(scope="module")
def groups() -> Simulated:
    return simulate("groups", workers=150, comparisons=60, features=8, groups=2, seed=3)


@pytest.fixture(scope="module")
def curves(groups: Simulated) -> dict[str, LearningCurve | None]:
    return {make.__name__: learning_curve(*splits(groups), make, BASE) for make in (mixture, low_rank, slopes)}


@pytest.mark.parametrize("member", ["mixture", "low_rank", "slopes"])
def test_comparisons_teach_and_none_is_the_pooled_reward(curves, member: str) -> None:
    curve = curves[member]
    assert list(curve.logits) == [0, 5, 10, 20, 50]
    assert curve.logits[0] is curve.pooled
    gains = [macro(curve, curve.pooled) - macro(curve, logits) for logits in curve.logits.values()]
    assert gains[0] == 0
    assert gains == sorted(gains)
    assert gains[1] > 0.002
    assert gains[4] > (0.01 if member == "slopes" else 0.025)


def test_the_judged_votes_are_the_newcomers_test_votes(groups: Simulated, curves) -> None:
    curve, test = curves["mixture"], splits(groups)[2]
    np.testing.assert_array_equal(curve.newcomers, np.arange(150))  # fewer than 400: everybody is new once
    np.testing.assert_array_equal(curve.votes.x, test.x)
    np.testing.assert_array_equal(curve.votes.worker, test.worker)


def test_no_newcomer_is_fitted_and_every_fit_has_the_others() -> None:
    train, validation, test = splits(simulate("groups", workers=40, comparisons=20, features=4, groups=2, seed=1))
    marked = Votes.of(train.x, train.y, train.worker, train.worker)  # a prompt that tells the worker
    fitted: list[set[int]] = []

    def make(votes: Votes, base: ReliabilityReward) -> MixtureReward:
        assert len(base.log_reliability_) == votes.n_workers
        fitted.append(set(votes.prompt))
        return mixture(votes, base)

    curve = learning_curve(marked, validation, test, make, BASE)
    assert list(curve.logits) == [0, 5, 10, 20]
    left_out = [set(range(40)) - people for people in fitted]
    assert len(fitted) == 5
    assert max(map(len, left_out)) == 8
    assert set().union(*left_out) == set(curve.newcomers)


def test_the_model_is_the_others_alone() -> None:
    """What newcomers answer on test prompts, or after their first comparisons, changes no prediction."""
    train, validation, test = splits(simulate("groups", workers=40, comparisons=20, features=4, groups=2, seed=1))
    curve = learning_curve(train, validation, test, mixture, BASE, shots=(0, 5))
    flipped = Votes.of(-test.x, test.y, test.worker, test.prompt)
    again = learning_curve(train, validation, flipped, mixture, BASE, shots=(0, 5))
    assert again.temperature == curve.temperature
    np.testing.assert_allclose(again.logits[5], -curve.logits[5], atol=1e-5)


def test_a_curve_has_the_points_that_ten_newcomers_can_give() -> None:
    train, validation, test = splits(simulate("groups", workers=40, comparisons=20, features=4, groups=2, seed=2))
    turn = np.arange(len(train)) % 20
    few = train.subset((turn < 6) | (train.worker < 12))  # twelve give 20, the others 6
    curve = learning_curve(few, validation, test, mixture, BASE)
    assert list(curve.logits) == [0, 5, 10, 20]
    np.testing.assert_array_equal(curve.newcomers, np.arange(12))
    fewer = train.subset((turn < 6) | (train.worker < 9))
    curve = learning_curve(fewer, validation, test, mixture, BASE)
    assert list(curve.logits) == [0, 5]
    assert len(curve.newcomers) == 40
    assert learning_curve(train, validation, test.subset(test.worker < 9), mixture, BASE) is None


def test_newcomers_without_validation_votes_leave_the_evidence_as_it_is() -> None:
    train, validation, test = splits(simulate("groups", workers=20, comparisons=10, features=4, groups=2, seed=2))
    curve = learning_curve(train, validation.subset(np.zeros(len(validation), bool)), test, mixture, BASE)
    assert curve.temperature == pytest.approx(1, abs=1e-3)


def test_one_taste_is_learned_by_asking_nobody() -> None:
    people = splits(simulate("null", workers=100, comparisons=50, features=6, seed=0))
    curve = learning_curve(*people, partial(mixture, coteries=3), ReliabilityReward(10.0, 0.003))
    for logits in curve.logits.values():
        assert macro(curve, logits) < macro(curve, curve.pooled) + 0.003


def test_the_temperature_is_the_one_that_predicts_best() -> None:
    """Coteries whose rewards are twice what they should be are too sure of everything; votes are worth less."""
    people = splits(simulate("groups", workers=60, comparisons=50, features=6, groups=2, seed=5))

    def boastful(votes: Votes, base: ReliabilityReward) -> MixtureReward:
        model = mixture(votes, base)
        model.theta_ = model.theta_.mean(axis=0) + 2 * (model.theta_ - model.theta_.mean(axis=0))
        return model

    honest = learning_curve(*people, mixture, BASE)
    curve = learning_curve(*people, boastful, BASE)
    assert curve.temperature > 1.2 * honest.temperature


@given(
    posterior=arrays(float, 4, elements=st.floats(0, 1)).filter(lambda p: p.sum() > 0.1),
    prior=arrays(float, 4, elements=st.floats(0.01, 1)),
    temperature=st.floats(0.1, 100),
)
def test_tempering_is_dividing_the_evidence(posterior, prior, temperature) -> None:
    posterior, prior = posterior / posterior.sum(), prior / prior.sum()
    np.testing.assert_allclose(tempered(posterior, prior, 1.0), posterior, atol=1e-12)
    np.testing.assert_allclose(tempered(prior, prior, temperature), prior, atol=1e-12)
    np.testing.assert_allclose(tempered(posterior, prior, 1e9), prior, atol=1e-4)
    made = tempered(np.stack([posterior, prior]), prior, temperature)
    np.testing.assert_allclose(made.sum(axis=1), 1)
    twice = tempered(tempered(posterior, prior, temperature), prior, 3.0)
    if posterior.min() > 1e-20:  # evidence that float64 can hold at a low temperature
        assert made[0].min() < 1e-250 or np.allclose(twice, tempered(posterior, prior, 3 * temperature), atol=1e-9)


def test_tempering_an_embedding_is_dividing_its_evidence() -> None:
    """In a Gaussian model, exactly: n observations at temperature 2 are n / 2."""
    rng = np.random.default_rng(0)
    loadings, noise = rng.standard_normal((3, 40, 2)), rng.standard_normal((3, 40, 1))

    def posterior(weight: float) -> tuple[np.ndarray, np.ndarray]:
        covariance = np.linalg.inv(np.eye(2) + weight * loadings.mT @ loadings)
        return (covariance @ (weight * loadings.mT @ noise))[..., 0], covariance

    for made, expected in zip(tempered_embedding(*posterior(1.0), 2.0), posterior(0.5), strict=True):
        np.testing.assert_allclose(made, expected)


@pytest.mark.parametrize("make", [mixture, low_rank, slopes])
def test_predictions_of_fitted_workers_are_the_members_own(groups: Simulated, make) -> None:
    member = make(groups.train, BASE.fit(groups.train))
    inferred = member.infer(groups.train)
    own = member.decision_function(groups.test)
    assert np.abs(predict(member, inferred, groups.test) - own).mean() < 0.05 * np.abs(own).mean()


# ------------------------------------------------------------------------------------------------------------ next pair
@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), coteries=st.integers(1, 5), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_information_is_what_the_answer_takes_from_the_entropy_of_the_coterie(seed, coteries, scale) -> None:
    rng = np.random.default_rng(seed)
    posterior, theta = rng.dirichlet(np.ones(coteries)), scale * rng.standard_normal((coteries, 3))
    x = rng.standard_normal((7, 3))
    order, information = next_pair(posterior, theta, x)
    p = expit(x @ theta.T)
    joint = np.stack([posterior * p, posterior * (1 - p)])  # [answer, m, K]
    answer = joint.sum(axis=2)
    remaining = (answer * entr(joint / np.maximum(answer, 1e-300)[..., None]).sum(axis=2)).sum(axis=0)
    np.testing.assert_allclose(information, entr(posterior).sum() - remaining, atol=1e-9)
    assert (information >= 0).all()
    assert (information <= np.log(2) + 1e-9).all()
    assert (np.diff(information[order]) <= 0).all()
    np.testing.assert_allclose(next_pair(posterior, theta, -x)[1], information, atol=1e-9)


def test_who_is_known_and_pairs_that_divide_nobody_tell_nothing() -> None:
    theta = np.array([[2.0, 0.0], [-2.0, 0.0]])
    x = np.array([[0.0, 5.0], [1.0, 0.0], [0.0, 0.0]])
    order, information = next_pair(np.array([0.5, 0.5]), theta, x)
    assert order[0] == 1
    np.testing.assert_allclose(information[[0, 2]], 0, atol=1e-12)
    np.testing.assert_allclose(next_pair(np.array([1.0, 0.0]), theta, x)[1], 0, atol=1e-12)
    assert next_pair(np.array([0.5, 0.5]), theta, x, reliability=0.1)[1][1] < 0.02 * information[1]


def test_several_workers_at_once() -> None:
    rng = np.random.default_rng(0)
    posterior, theta, x = rng.dirichlet(np.ones(3), 5), rng.standard_normal((3, 4)), rng.standard_normal((6, 4))
    beta = rng.uniform(0.5, 2, 5)
    order, information = next_pair(posterior, theta, x, beta)
    mean, covariance = rng.standard_normal((5, 2)), np.stack([np.eye(2) * s for s in (0.1, 0.5, 1, 2, 0)])
    of_embedding = next_pair_by_embedding(mean, covariance, theta[0], theta[1:].T, x, beta)[1]
    for i in range(5):
        one_order, one = next_pair(posterior[i], theta, x, beta[i])
        np.testing.assert_array_equal(order[i], one_order)
        np.testing.assert_allclose(information[i], one)
        alone = next_pair_by_embedding(mean[i], covariance[i], theta[0], theta[1:].T, x, beta[i])[1]
        np.testing.assert_allclose(of_embedding[i], alone)
    np.testing.assert_allclose(of_embedding[4], 0, atol=1e-12)  # an embedding without variance


def test_information_about_an_embedding_is_the_integral() -> None:
    rng = np.random.default_rng(1)
    theta, basis, x = rng.standard_normal(3), rng.standard_normal((3, 2)), rng.standard_normal((4, 3))
    mean, root = rng.standard_normal(2), rng.standard_normal((2, 2))
    covariance = root @ root.T
    _, information = next_pair_by_embedding(mean, covariance, theta, basis, x, 0.7)
    for pair, found in zip(x, information, strict=True):
        center, sd = 0.7 * pair @ (theta + basis @ mean), 0.7 * np.sqrt(pair @ basis @ covariance @ basis.T @ pair)

        def expected(of, center=center, sd=sd) -> float:
            return quad(lambda z: of(expit(z)) * norm.pdf(z, center, sd), center - 10 * sd, center + 10 * sd)[0]

        mixed = expected(lambda p: p)
        conditional = expected(lambda p: entr(p) + entr(1 - p))
        assert found == pytest.approx(entr(mixed) + entr(1 - mixed) - conditional, abs=1e-5)


def test_asking_by_information_finds_the_coterie_sooner_than_asking_at_random() -> None:
    people = simulate("groups", workers=300, comparisons=80, features=16, groups=4, seed=7)
    model = MixtureReward(4, reliability_variance=0.003).fit(people.train)
    # The coterie whose reward is most like the truth of a group: by the posterior of all their votes.
    known = model.infer(people.train)[0]
    of_group = np.array([known[people.group == g].mean(axis=0).argmax() for g in range(4)])
    assert len(set(of_group)) == 4
    truth = of_group[people.group]

    def mass_after(questions: int, informed: bool) -> float:
        rng = np.random.default_rng(0)
        pool = rng.standard_normal((400, 16)).astype(np.float32)
        # Newcomers answer as their coterie's reward has it, to any pair, once each.
        yes = rng.random((300, 400)) < expit(model.theta_ @ pool.T)[truth]
        asked = np.zeros((300, 0), int)
        posterior = np.tile(model.weights_, (300, 1))
        everybody = np.arange(300)
        for _ in range(questions):
            order = (
                next_pair(posterior, model.theta_, pool)[0]
                if informed
                else rng.permuted(np.tile(np.arange(400), (300, 1)), axis=1)
            )
            new = ~(order[:, :, None] == asked[:, None, :]).any(axis=2)
            asked = np.column_stack([asked, order[everybody, new.argmax(axis=1)]])
            sign = np.where(yes[everybody[:, None], asked], 1, -1)
            x = pool[asked] * sign[:, :, None]
            votes = Votes.of(x.reshape(-1, 16), np.ones(asked.size), np.repeat(everybody, asked.shape[1]))
            posterior = model.infer(votes)[0]
        return float(posterior[everybody, truth].mean())

    informed, random = mass_after(5, True), mass_after(5, False)
    assert informed > random + 0.1
    assert informed > mass_after(10, False)  # five good questions are worth more than ten
