"""The holdout and what it says: drawn as told, and the interval holds the truth."""

import numpy as np
import pytest
import sqlalchemy as sa

from coterie.errors import BadData
from coterie.feedback.tables import FEEDBACK, create_schema
from coterie.uplift import holdout, uplift


def test_the_holdout_is_a_share_and_always_the_same():
    drawn = [holdout(f"w{n % 50}", f"r{n}", 0.05) for n in range(20_000)]
    share = np.mean([held for held, _ in drawn])
    assert abs(share - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 20_000)
    assert drawn == [holdout(f"w{n % 50}", f"r{n}", 0.05) for n in range(20_000)]
    assert {probability for _, probability in drawn} == {0.05, 0.95}
    assert holdout("w", "r", 0.0) == (False, 1.0)
    within = [np.mean([holdout(f"w{w}", f"r{n}", 0.5)[0] for n in range(2000)]) for w in range(5)]
    assert np.ptp(within) < 0.1  # everybody is in both arms


def database(path, gain, workers=60, votes=60, share=0.2, seed=0, arms=("own", "holdout")):
    """Feedback on answers that people agree with by 60 %, and `gain` more with their own; some people agree more easily."""
    rng, rows = np.random.default_rng(seed), []
    for w in range(workers):
        ease = rng.normal(0, 0.1)
        for n in range(votes):
            held_out, propensity = holdout(f"w{w}", f"r{n}", share)
            arm = arms[held_out]
            right = rng.random() < 0.6 + ease + gain * (not held_out)
            rows.append(
                dict.fromkeys(("prompt", "chosen", "rejected", "chosen_id", "rejected_id", "pair_id", "source"), "x")
                | {
                    "comparison_id": f"{w}-{n}",
                    "worker_id": f"w{w}",
                    "prompt_id": f"p{rng.integers(200)}",
                    "label": 1.0,
                }
                | {"key_fingerprint": "", "arm": arm, "propensity": arm and propensity, "agreed": float(right)}
            )
    url = f"sqlite:///{path}"
    engine = sa.create_engine(url)
    create_schema(engine)
    with engine.begin() as connection:
        connection.execute(FEEDBACK.insert(), rows)
    engine.dispose()
    return url


def test_the_gain_is_told_with_an_interval_that_holds_the_truth(tmp_path):
    inside = 0
    for seed in range(20):
        told = uplift(database(tmp_path / f"{seed}.db", 0.1, seed=seed))
        inside += told["gain"]["low"] <= 0.1 <= told["gain"]["high"]
        assert abs(told["gain"]["value"] - (told["own"]["agreement"] - told["holdout"]["agreement"])) < 0.02
        assert told["gain"]["low"] > 0.02
    assert inside >= 17  # 16 or fewer of 20 come by chance in 0.3 % of all cases at 95 %
    assert told["own"]["comparisons"] + told["holdout"]["comparisons"] == 3600
    assert told["holdout"]["workers"] == 60


def test_no_gain_is_told_as_none_and_one_arm_as_too_little(tmp_path):
    none = [uplift(database(tmp_path / f"{seed}.db", 0.0, seed=100 + seed))["gain"] for seed in range(10)]
    assert sum(gain["low"] <= 0 <= gain["high"] for gain in none) >= 8
    with pytest.raises(BadData, match=r"both arms\. Serve with a holdout"):
        uplift(database(tmp_path / "one.db", 0.1, arms=("own", None)))
