"""Coteries over time: their ids across refits, and whether what people want has changed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from coterie.discovery.lineage import Drift, Lineage, drift, match_coteries
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.votes import Votes
from coterie.errors import BadData

# ---------------------------------------------------------------------------------------------------------------- ids


def match(old, new, ids=None, next_id=None) -> Lineage:
    """Of coteries of workers 0 .. n - 1."""
    old, new = np.asarray(old), np.asarray(new)
    ids = np.arange(int(old.max()) + 1) if ids is None else ids
    return match_coteries(np.arange(len(old)), old, np.arange(len(new)), new, ids, next_id or max(ids) + 1)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), coteries=st.integers(1, 5), strays=st.floats(0, 0.2))
def test_renumbered_coteries_keep_their_ids(seed: int, coteries: int, strays: float) -> None:
    rng = np.random.default_rng(seed)
    old = rng.permutation(np.arange(200) % coteries)
    number = rng.permutation(coteries)
    new = np.where(rng.random(200) < strays, rng.integers(0, coteries, 200), number[old])
    ids = rng.choice(50, coteries, replace=False)
    found = match(old, new, ids, 60)
    np.testing.assert_array_equal(found.ids[number], ids)
    np.testing.assert_array_equal(found.matched_from[number], np.arange(coteries))
    assert found.next_id == 60
    assert (found.overlap > 0.6).all()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    workers=st.integers(0, 40),
    newcomers=st.integers(0, 10),
    old_coteries=st.integers(1, 5),
    coteries=st.integers(1, 5),
    alike=st.floats(0, 1),
)
def test_ids_are_never_used_twice(seed, workers, newcomers, old_coteries, coteries, alike) -> None:
    rng = np.random.default_rng(seed)
    old = rng.dirichlet(np.full(old_coteries, 0.3), workers)
    new = rng.dirichlet(np.full(coteries, 0.3), workers + newcomers)
    shared = min(old_coteries, coteries)
    new[:workers, :shared] = np.where(rng.random((workers, 1)) < alike, old[:, :shared], new[:workers, :shared])
    ids = rng.choice(20, old_coteries, replace=False)
    made = match_coteries(np.arange(workers), old, np.arange(workers + newcomers), new, ids, 20)
    assert len(set(made.ids)) == coteries
    kept = made.matched_from >= 0
    np.testing.assert_array_equal(made.ids[kept], ids[made.matched_from[kept]])
    np.testing.assert_array_equal(made.ids[~kept], np.arange(20, made.next_id))
    assert made.shared_workers == workers
    assert ((made.overlap > 0) == kept).all()
    assert (made.overlap <= 1 + 1e-9).all()


def test_unrelated_coteries_get_new_ids() -> None:
    kept = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        old, new = rng.choice(3, (2, 60), p=[0.6, 0.3, 0.1])
        kept += (match(old, new, [0, 1, 2]).matched_from >= 0).any()
    assert kept / 400 < 0.08  # any of three at level .05: standard error .011, and the normal is no binomial


def test_large_coteries_that_overlap_by_chance_are_not_the_same() -> None:
    old, new = np.zeros((2, 100), int)
    old[:20], new[20:40] = 1, 1  # 60 of 80 people in both, where independence has 64
    assert (match(old, new).matched_from < 0).all()


def test_of_a_coterie_that_splits_the_larger_part_keeps_the_id() -> None:
    old = np.repeat([0, 1], [60, 40])
    new = np.repeat([1, 2, 0], [25, 35, 40])
    found = match(old, new)
    np.testing.assert_array_equal(found.ids, [1, 2, 0])
    np.testing.assert_array_equal(found.matched_from, [1, -1, 0])
    np.testing.assert_allclose(found.overlap, [1, 0, 1])
    assert found.next_id == 3


def test_of_coteries_that_merge_the_larger_gives_the_id() -> None:
    found = match(np.repeat([0, 1, 2], [20, 30, 50]), np.repeat([1, 1, 0], [20, 30, 50]), [4, 7, 9])
    np.testing.assert_array_equal(found.ids, [9, 7])
    np.testing.assert_allclose(found.overlap, [1, 0.6])
    assert found.next_id == 10


def test_everybody_stays_everybody_and_is_no_coterie_among_several() -> None:
    one, two = np.zeros(20, int), np.repeat([0, 1], 10)
    np.testing.assert_array_equal(match(one, one, [3]).ids, [3])
    np.testing.assert_array_equal(match(one, two, [3]).ids, [4, 5])
    np.testing.assert_array_equal(match(two, one, [3, 5]).ids, [6])
    strangers = match_coteries(["a"], one[:1], ["b"], one[:1], [3], 4)
    assert (strangers.ids[0], strangers.shared_workers) == (4, 0)


def test_only_shared_workers_count_by_their_name() -> None:
    old_workers, new_workers = [f"w{i:02d}" for i in range(40)], [f"w{i:02d}" for i in range(60, 10, -1)]
    old = np.repeat([0, 1], 20)
    new = np.array([1 if int(w[1:]) < 20 else 0 for w in new_workers])
    found = match_coteries(old_workers, old, new_workers, new, [5, 6], 7)
    np.testing.assert_array_equal(found.ids, [6, 5])
    assert found.shared_workers == 29
    as_posteriors = match_coteries(old_workers, np.eye(2)[old], new_workers, np.eye(2)[new], [5, 6], 7)
    np.testing.assert_array_equal(as_posteriors.ids, found.ids)


def test_workers_of_whom_nothing_is_known_make_no_match() -> None:
    kept = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        old, new = np.tile([0.7, 0.3], (2, 500, 1))  # who has no votes has the weights as posterior
        old[:20], new[:20] = np.eye(2)[rng.choice(2, (2, 20), p=[0.7, 0.3])]
        kept += (match_coteries(np.arange(500), old, np.arange(500), new, [0, 1], 2).matched_from >= 0).any()
    assert kept / 200 < 0.08


@pytest.mark.parametrize(
    ("workers", "old", "ids", "next_id", "message"),
    [
        ([1, 1], [0, 1], [0, 1], 2, "1 of them distinct"),
        ([1, 2, 3], [0, 1], [0, 1], 2, "3 old workers"),
        ([1, 2], [0, 1], [0, 0], 2, "one id"),
        ([1, 2], [0, 1], [0, 5], 5, "larger than any"),
        ([1, 2], [[0.5, 0.5], [0.5, 0.5]], [0], 2, "2 old coteries"),
        ([1, 2], [0, 2], [0, 1], 2, "coteries 0..2"),
    ],
)
def test_what_does_not_fit_together_is_told(workers, old, ids, next_id, message: str) -> None:
    with pytest.raises(BadData, match=message):
        match_coteries(workers, np.array(old), [1, 2], np.array([0, 1]), ids, next_id)


# -------------------------------------------------------------------------------------------------------------- drift
WORKERS = 60
TASTES = np.array([[2.5, 0.0, 0.5], [0.0, 2.5, 0.5]])
group = np.arange(WORKERS) % 2


def votes_of(rng: np.random.Generator, each: int, tastes: np.ndarray, hard: float = 1.0, at: int = 0) -> Votes:
    """`each` votes of every worker with a taste [workers, d], on pairs that differ `hard` times as much as usual."""
    worker = np.repeat(np.arange(len(tastes)), each)
    x = rng.standard_normal((len(worker), 3)) * hard
    x[rng.random(len(worker)) > expit((x * tastes[worker]).sum(axis=1))] *= -1
    return Votes.of(x, np.ones(len(worker)), worker, at + np.arange(len(worker)))


@lru_cache(maxsize=2)
def fitted(seed: int, coteries: int) -> tuple[Votes, MixtureReward]:
    known = votes_of(np.random.default_rng(seed), 30, TASTES[group])
    return known, MixtureReward(coteries, 10.0, 0.01, tol=1e-3).fit(known)


def world(seed: int, after: np.ndarray | None = None, coteries: int = 2, hard: float = 1.0) -> Drift:
    """An incumbent of two groups, the same for five seeds, and their votes later, when their tastes may be others."""
    known, incumbent = fitted(seed // 5, coteries)
    rng = np.random.default_rng(10_000 + seed)
    held_out = votes_of(rng, 8, TASTES[group], at=10**6)
    new = votes_of(rng, 16, TASTES[group] if after is None else after, hard, at=2 * 10**6)
    return drift(incumbent, known, held_out, new)


def movers(share: float, seed: int) -> np.ndarray:
    moved = np.random.default_rng(seed).permutation(WORKERS) < share * WORKERS
    return TASTES[np.where(moved, 1 - group, group)]


@pytest.mark.parametrize("coteries", [1, 2])
def test_unchanged_people_are_rarely_called_changed(coteries: int) -> None:
    found = [world(seed, coteries=coteries) for seed in range(200)]
    assert np.mean([f.drifted for f in found]) <= 0.07
    assert np.mean([f.surprise.low < 0 < f.surprise.high for f in found]) >= 0.9
    assert np.mean([f.log_loss.low < 0 < f.log_loss.high for f in found]) >= 0.9


def test_the_interval_is_no_wider_than_it_need_be() -> None:
    found = [world(seed, coteries=1) for seed in range(200)]
    width = np.mean([f.surprise.high - f.surprise.low for f in found])
    assert 0.85 < width / (2 * 2.0 * np.std([f.surprise.value for f in found])) < 1.2


def test_harder_pairs_are_no_change_of_tastes() -> None:
    found = [world(seed, hard=0.4) for seed in range(60)]
    assert np.mean([f.log_loss.low > 0 for f in found]) == 1
    assert np.mean([f.drifted for f in found]) <= 0.2  # the incumbent is a little more at a loss where pairs are easy


def test_some_who_change_sides_are_found_and_counted() -> None:
    found = [world(seed, movers(0.2, seed)) for seed in range(20)]
    assert np.mean([f.drifted for f in found]) >= 0.9
    assert np.mean([f.moved for f in found]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([f.moved_then for f in found]) < 0.03
    told = next(f for f in found if f.drifted)
    assert told.reason.startswith("what people want has changed")
    assert f"place {told.moved:.1%} of them in another coterie" in told.reason


def test_a_taste_that_nobody_had_is_found_with_one_coterie_and_with_two() -> None:
    after = TASTES[group] * [1, 1, -4]  # everybody came to dislike what they liked a little
    for coteries in (1, 2):
        found = [world(seed, after, coteries) for seed in range(20)]
        assert np.mean([f.drifted for f in found]) >= 0.9
        assert np.mean([f.surprise.low > 0 for f in found]) >= 0.9
        assert all((f.moved is None) is (coteries == 1) for f in found)


def test_prompts_that_everybody_answers_are_counted_once() -> None:
    """Each new prompt has a twist of its own that no model knows; twelve of them are twelve pieces of news, not 960."""
    called = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        parts = []
        for each, prompts, at in ((30, 1800, 0), (16, 12, 10**6), (16, 12, 2 * 10**6)):
            worker, prompt = np.repeat(np.arange(WORKERS), each), rng.integers(0, prompts, WORKERS * each)
            x = rng.standard_normal((len(worker), 3))
            twist = rng.standard_normal((prompts, 3))[prompt]
            x[rng.random(len(worker)) > expit((x * (TASTES[0] + twist)).sum(axis=1))] *= -1
            parts.append(Votes.of(x, np.ones(len(x)), worker, at + prompt))
        incumbent = MixtureReward(1).fit(parts[0])
        by_prompt = drift(incumbent, *parts)
        apart = [Votes.of(v.x, v.y, v.worker, np.arange(len(v)) + 10**7 * i) for i, v in enumerate(parts)]
        called.append((by_prompt.drifted, drift(incumbent, *apart).drifted))
    with_prompts, without = np.mean(called, axis=0)
    assert with_prompts <= 0.1 < without


def test_strangers_and_ties_are_left_out() -> None:
    rng = np.random.default_rng(0)
    known, held_out, new = (votes_of(rng, n, TASTES[group]) for n in (30, 8, 16))
    incumbent = MixtureReward(2, 10.0).fit(known)
    before = drift(incumbent, known, held_out, new)
    assert (before.workers, before.comparisons) == (60, 960)

    def with_stranger(votes: Votes, extra: bool) -> Votes:
        x, ties = -100 * np.abs(rng.standard_normal((20 * extra, 3))), rng.standard_normal((30 * extra, 3))
        y = np.concatenate([votes.y, np.ones(len(x)), np.full(len(ties), 0.5)])
        worker = np.concatenate([votes.worker, np.full(len(x), WORKERS), np.arange(len(ties))])
        return Votes.of(np.concatenate([votes.x, x, ties]), y, worker, np.arange(len(y)), WORKERS + 1)

    after = drift(incumbent, with_stranger(known, False), with_stranger(held_out, True), with_stranger(new, True))
    assert (after.workers, after.comparisons) == (60, 960)
    assert after.surprise.value == pytest.approx(before.surprise.value, abs=1e-6)
    assert after.moved == pytest.approx(before.moved, abs=1e-6)


def test_too_few_workers_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    known, held_out, new = (votes_of(rng, n, TASTES[group]) for n in (30, 8, 16))
    incumbent = MixtureReward(2, 10.0).fit(known)
    nine = drift(incumbent, known, held_out, new.subset(new.worker < 9))
    assert nine.surprise.value is not None
    assert (nine.surprise.low, nine.moved, nine.drifted) == (None, None, False)
    assert "it takes 10 known workers" in nine.reason
    one_prompt = Votes.of(new.x, new.y, new.worker, np.full(len(new), 10**6))
    assert drift(incumbent, known, held_out, one_prompt).surprise.low is None
    nobody = drift(incumbent, known, held_out, new.subset(new.worker < 0))
    assert (nobody.surprise.value, nobody.workers, nobody.drifted) == (None, 0, False)
    assert drift(incumbent, known, held_out, new.subset(new.worker < 10)).surprise.low is not None
    with pytest.raises(BadData, match="number the workers alike"):
        drift(incumbent, known, held_out, new.of_workers(np.arange(20)))
