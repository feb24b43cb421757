"""The study's bookkeeping, its intervals, and its page: what is said is what was measured."""

import json
from math import sqrt

import numpy as np
import pytest

from benchmarks import rows
from benchmarks.rows import Log, Work, key
from benchmarks.study import intervals


def half(task) -> dict:
    """A row; module-level, for a process of its own must find it."""
    if task == "broken":
        raise ValueError(task)
    return {"half": task / 2}


def test_an_interrupted_run_keeps_what_this_code_has_finished(tmp_path) -> None:
    log, other = Log(tmp_path / "rows.jsonl", "mine"), Log(tmp_path / "rows.jsonl", "of another version")
    assert log.rows() == {}
    log.add([1, "a"], {"half": 0})
    other.add([2, "b"], {"half": 1})
    with log.path.open("a") as file:
        file.write(json.dumps({"task": [3, "c"]})[:9])
    assert log.rows() == {key([1, "a"]): {"half": 0}}
    log.hold(log.rows())
    assert len(log.path.read_text().splitlines()) == 1
    log.hold({})
    assert not log.path.exists()


def test_a_run_measures_what_is_missing_and_keeps_what_ended_before_an_error(tmp_path) -> None:
    log = Log(tmp_path / "rows.jsonl", "mine")
    log.add(1, {"half": "as it was"})
    with log.path.open("a") as file:
        file.write('{"task": 2')  # a killed run's, on which the next row must not continue
    with pytest.raises(ValueError, match="broken"):
        rows.run([Work(half, task, log) for task in (1, 2, "broken")], "test", "rows", processes=1)
    assert log.rows() == {"1": {"half": "as it was"}, "2": {"half": 1.0}}
    rows.run([Work(half, task, log) for task in (1, 2, 3)], "test", "rows", seconds=0)
    assert "3" not in log.rows()


def test_the_sample_that_a_difference_needs() -> None:
    # docs/method, section 2: the gains of arXiv 2601.20760
    assert intervals.comparisons_an_arm(0.53221, 0.52133) == pytest.approx(33_000, rel=0.005)
    assert intervals.comparisons_an_arm(0.52702, 0.52133) == pytest.approx(121_000, rel=0.005)
    assert intervals.comparisons_an_arm(0.7, 0.7) is None
    assert intervals.comparisons_for_rate(0.5) is None
    n, rng = intervals.comparisons_for_rate(0.55), np.random.default_rng(0)
    won = rng.binomial(n, 0.55, 20_000) / n
    assert np.mean(np.abs(won - 0.5) > 1.96 * sqrt(0.25 / n)) == pytest.approx(0.8, abs=0.02)


def test_intervals_over_data_sets_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    told = [intervals.over_data_sets(rng.normal(3, 2, 5)) for _ in range(2000)]
    assert np.mean([one["low"] <= 3 <= one["high"] for one in told]) == pytest.approx(0.95, abs=0.02)
    assert intervals.over_data_sets([1.0, 2.0])["low"] is None


def test_an_interval_over_splits_is_as_wide_as_theirs() -> None:
    told = intervals.over_splits([{"value": 1.0, "low": 0.0, "high": 2.0}, {"value": 3.0, "low": 0.0, "high": 6.0}])
    assert (told["value"], told["low"], told["high"]) == (2.0, 0.0, 4.0)
    assert intervals.over_splits([{"value": 1.0, "low": None, "high": None}])["low"] is None
