"""What a coterie likes is told from votes that did not group it, with intervals that hold what they say."""

from dataclasses import replace

import numpy as np
import pytest

from coterie.contracts import Estimate
from coterie.discovery.features import FeatureMap
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.votes import Votes
from coterie.encoding.style import STYLE_WORDS
from coterie.portraits import NOTABLE, calibration_curve, likes, style_weights
from coterie.rewards import RewardHead

STYLES = ("words", "lists", "hedging", "numbers")
NAMES = ("pc1", "pc2", *STYLES)
COMMON = np.array([0.5, -0.3, 0.4, 0.0, 0.2, 0.0])
PRECISIONS = {"global": 10.0, "coterie-0": 30.0, "coterie-1": 30.0}
HEADS = {name: RewardHead(np.zeros(len(NAMES))) for name in PRECISIONS}


def features(names=NAMES):
    plain, d = np.zeros(0, np.float32), len(names)
    return FeatureMap(plain, plain, np.zeros((d, 0), np.float32), plain, plain, names)


def draw(rng, workers=60, comparisons=40, more_words=0.0, spread=0.0, careless=1.0):
    """Votes of workers of whom every second one likes words by `more_words` more; and who these are, [workers, 2]."""
    group = np.arange(workers) % 2
    theta = COMMON + spread * rng.standard_normal((workers, len(COMMON)))
    theta[:, 2] += more_words * (group == 0)
    x = rng.standard_normal((workers, comparisons, len(COMMON)))
    chosen = rng.random((workers, comparisons)) < 1 / (1 + np.exp(-careless * np.einsum("wnd,wd->wn", x, theta)))
    x = np.where(chosen[..., None], x, -x).reshape(-1, len(COMMON))
    votes = Votes.of(x, np.ones(len(x)), np.repeat(np.arange(workers), comparisons))
    return votes, np.stack([group == 0, group == 1], axis=1).astype(float)


def weights(votes, posterior, heads=HEADS, precisions=PRECISIONS, named=None, reliability=None):
    reliability = np.ones(votes.n_workers) if reliability is None else reliability
    told = style_weights(votes, posterior, reliability, heads, precisions, named or features(), 0.95)
    return [{feature["name"]: feature["weight"] for feature in coterie} for coterie in told]


def sure(weight):
    return weight.low is not None and weight.low * weight.high > 0


# ------------------------------------------------------------------------------------------------------------- weights
def test_what_a_coterie_likes_more_is_found_with_its_words_and_first():
    votes, posterior = draw(np.random.default_rng(0), comparisons=80, more_words=1.2)
    told = style_weights(votes, posterior, np.ones(60), HEADS, PRECISIONS, features(), 0.95)
    assert [coterie[0]["words"] for coterie in told] == list(STYLE_WORDS["words"])  # longer and shorter answers
    assert [likes(coterie) for coterie in told] == [["longer answers"], ["shorter answers"]]
    for coterie in told:
        assert {feature["name"] for feature in coterie} == set(STYLES)
        sizes = [abs(feature["weight"].value) for feature in coterie]
        assert sizes == sorted(sizes, reverse=True)


def test_intervals_are_as_wide_as_the_weights_vary():
    """Over data sets drawn anew, among workers who each have a taste of their own."""
    values, halves = [], []
    for seed in range(60):
        votes, posterior = draw(np.random.default_rng(seed), comparisons=25, more_words=0.8, spread=0.4)
        found = weights(votes, posterior)[0]
        values.append([found[name].value for name in STYLES])
        halves.append([(found[name].high - found[name].low) / 2 for name in STYLES])
    spread, told = np.std(values, axis=0), np.mean(halves, axis=0) / 2.045  # Student's t with 29 degrees of freedom
    assert told / spread == pytest.approx(np.ones(len(STYLES)), rel=0.2)


def test_intervals_are_those_of_the_jackknife_over_workers():
    """Refitting both heads without each worker in turn is the long way to the same standard error."""
    votes, posterior = draw(np.random.default_rng(3), workers=40, spread=0.5, more_words=0.5)
    found = weights(votes, posterior)[1]
    without = []
    for worker in range(40):
        kept = weights(votes.subset(votes.worker != worker), posterior)[1]
        without.append([kept[name].value for name in STYLES])
    error = np.sqrt(39 / 40 * np.square(without - np.mean(without, axis=0)).sum(axis=0))
    told = np.array([(found[name].high - found[name].low) / 2 for name in STYLES]) / 2.093  # 19 degrees of freedom
    assert told == pytest.approx(error, rel=0.12)


def test_votes_that_grouped_the_workers_would_show_differences_that_are_not_there():
    """Everybody wants the same, and the mixture is made to find two groups."""
    false = {"grouped by": [], "held out": []}
    for seed in range(12):
        votes, _ = draw(np.random.default_rng(seed), comparisons=60)
        held_out = np.random.default_rng(seed).random(len(votes)) < 0.35
        train = votes.subset(~held_out)
        base = ReliabilityReward(10.0, 0.1).fit(train)
        posterior = MixtureReward(2, 30.0, 0.1, base, seed=0).fit(train).responsibilities_
        for name, judged in (("grouped by", train), ("held out", votes.subset(held_out))):
            false[name] += [sure(weight) for coterie in weights(judged, posterior) for weight in coterie.values()]
    assert np.mean(false["held out"]) < 0.12
    assert np.mean(false["grouped by"]) > 0.4


def test_weights_are_scaled_as_they_are_served():
    votes, posterior = draw(np.random.default_rng(1), more_words=0.8)
    one = np.ones((60, 1))
    doubled = {name: replace(head, scale=2.0) for name, head in HEADS.items()}
    for who in (posterior, one):
        for plain, served in zip(weights(votes, who), weights(votes, who, doubled), strict=True):
            for name in STYLES:
                assert served[name].value == pytest.approx(2 * plain[name].value)
                assert served[name].high == pytest.approx(2 * plain[name].high)


def test_one_coterie_is_told_what_everybody_weighs():
    votes, _ = draw(np.random.default_rng(2), comparisons=200)
    (found,) = weights(votes, np.ones((60, 1)), precisions={"global": 1.0})
    assert found["words"].low < COMMON[2] < found["words"].high
    assert found["hedging"].low < COMMON[4] < found["hedging"].high
    assert sure(found["words"])


def test_careless_workers_do_not_pass_for_workers_of_another_taste():
    rng = np.random.default_rng(4)
    careful, _ = draw(rng, workers=30, comparisons=150)
    careless, _ = draw(rng, workers=30, comparisons=150, careless=0.3)
    columns = [(getattr(careful, name), getattr(careless, name)) for name in ("x", "y")]
    x, y = (np.concatenate(pair) for pair in columns)
    votes = Votes.of(x, y, np.concatenate([careful.worker, careless.worker + 30]))
    posterior = np.stack([votes_of < 30 for votes_of in (np.arange(60), 59 - np.arange(60))], axis=1).astype(float)
    known = np.where(np.arange(60) < 30, 1.0, 0.3)
    assert sure(weights(votes, posterior)[1]["words"])
    assert not sure(weights(votes, posterior, reliability=known)[1]["words"])


def test_few_workers_get_weights_without_intervals_and_nothing_is_said_to_be_liked():
    votes, _ = draw(np.random.default_rng(5), more_words=3.0)
    posterior = np.tile([0.02, 0.98], (60, 1))
    posterior[:9] = [1.0, 0.0]
    told = style_weights(votes, posterior, np.ones(60), HEADS, PRECISIONS, features(), 0.95)
    assert all(feature["weight"].low is None for feature in told[0])
    assert likes(told[0]) == []
    assert all(feature["weight"].low is not None for feature in told[1])


def test_a_coterie_without_held_out_votes_is_not_told_of():
    votes, posterior = draw(np.random.default_rng(6))
    kept = votes.subset(posterior[votes.worker, 1] == 1)
    first, second = weights(kept, posterior)
    assert first == {}
    assert second


def test_features_that_nobody_can_read_are_not_told_of():
    votes, posterior = draw(np.random.default_rng(7))
    assert weights(votes, posterior, named=features(tuple(f"pc{i}" for i in range(6)))) == [{}, {}]


def test_a_ranking_s_pairs_count_what_their_weights_say():
    votes, posterior = draw(np.random.default_rng(8), more_words=0.6)
    twice = Votes.of(*(np.repeat(column, 2, axis=0) for column in (votes.x, votes.y, votes.worker)))
    halved = replace(twice, weight=np.full(len(twice), 0.5, np.float32))
    for plain, weighed in zip(weights(votes, posterior), weights(halved, posterior), strict=True):
        for name in STYLES:
            assert weighed[name].value == pytest.approx(plain[name].value, abs=1e-3)
            assert weighed[name].low == pytest.approx(plain[name].low, abs=1e-3)


def feature(words, value, low, high):
    return {"name": words, "words": words, "weight": Estimate(value=value, low=low, high=high)}


def test_only_what_is_sure_and_large_enough_to_notice_is_liked_and_three_at_most():
    style = [
        feature("a", 0.9, 0.5, 1.3),
        feature("b", -0.8, -1.2, 0.1),
        feature("c", 0.7, None, None),
        feature("d", -0.6, -0.9, -0.2),
        feature("e", 0.5, 0.1, 0.9),
        feature("f", 0.4, 0.3, 0.5),
        feature("g", 0.9 * NOTABLE, 0.5 * NOTABLE, 1.1 * NOTABLE),
    ]
    assert likes(style) == ["a", "d", "e"]
    assert likes(style[6:]) == []


# --------------------------------------------------------------------------------------------------------- calibration
def test_a_calibrated_reward_is_as_sure_as_it_is_right():
    rng = np.random.default_rng(0)
    margin = 2 * rng.standard_normal(40_000)
    p = 1 / (1 + np.exp(-margin))
    # A comparison's chosen response stands first, so that a prediction against it has a negative margin.
    margin = np.where(rng.random(len(p)) < p, margin, -margin)
    curve = calibration_curve(margin, np.ones(len(margin)))
    assert [point["comparisons"] for point in curve] == [4000] * 10
    assert [point["confidence"] for point in curve] == sorted(point["confidence"] for point in curve)
    assert [p["accuracy"] for p in curve] == pytest.approx([p["confidence"] for p in curve], abs=0.03)
    too_sure = calibration_curve(3 * margin, np.ones(len(margin)))
    assert too_sure[5]["confidence"] > too_sure[5]["accuracy"] + 0.05


def test_bins_hold_all_that_was_decided():
    rng = np.random.default_rng(1)
    margin, y = rng.standard_normal(103), np.where(rng.random(103) < 0.2, 0.5, 1.0)
    curve = calibration_curve(margin, y)
    sizes = np.array([point["comparisons"] for point in curve])
    assert sizes.sum() == (y == 1).sum()
    assert np.ptp(sizes) <= 1
    accuracy = np.array([point["accuracy"] for point in curve])
    assert sizes @ accuracy == pytest.approx((margin[y == 1] > 0).sum())


def test_few_comparisons_make_few_bins_and_ties_none():
    assert [p["comparisons"] for p in calibration_curve(np.array([0.1, 2.0, 1.0]), np.ones(3))] == [1, 1, 1]
    assert calibration_curve(np.array([0.1, 2.0]), np.full(2, 0.5)) == []
    assert calibration_curve(np.zeros(4), np.ones(4), bins=1) == [
        {"confidence": 0.5, "accuracy": 0.5, "comparisons": 4}
    ]
