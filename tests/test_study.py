"""The study's bookkeeping, its intervals, and its page: what is said is what was measured."""

import json
import re
from math import sqrt

import numpy as np
import pytest
from readme_figures import ROOT, Unbacked, unbacked

from benchmarks import rows
from benchmarks.rows import Log, Work, key
from benchmarks.settings import SETTINGS, draw
from benchmarks.study import amounts, best_of, coteries, curves, failures, intervals, measuring, naive, policies, render
from coterie.bootstrap import TwoWayBootstrap
from coterie.discovery import PooledReward, ReliabilityReward
from coterie.discovery.logistic import log_loss
from coterie.simulation.annotators import Annotators


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


# ----------------------------------------------------------------------------------------------------------- what is measured
@pytest.fixture(scope="module")
def two_groups():
    return draw(SETTINGS["groups-2"].model_copy(update={"workers": 60, "comparisons_per_worker": 80, "seed": 1}))


@pytest.fixture(scope="module")
def curve(two_groups) -> dict:
    base = ReliabilityReward(reliability_variance=0.003).fit(two_groups.train)
    return curves.judge(two_groups.train, two_groups.test, base, None, two_groups.people.group)


def test_every_method_is_judged_with_every_number_of_coteries(two_groups, curve) -> None:
    assert list(curve["methods"]) == list(curves.METHODS)
    assert all(list(cells) == [str(size) for size in curves.SIZES] for cells in curve["methods"].values())
    mixture = curve["methods"]["mixture"]["2"]
    assert mixture["ari"] > 0.9
    assert mixture["log_loss"]["value"] < -0.01  # far below the reference, where there are two groups
    joint, two_stage = (
        curve["methods"][f"{stages}, k-means"]["2"]["log_loss"]["value"] for stages in ("joint", "two-stage")
    )
    gain = curve["joint_less_two_stage"]["k-means"]["2"]["log_loss"]["value"]
    assert gain == pytest.approx(joint - two_stage, abs=1e-9)


def test_a_difference_on_real_data_has_the_interval_of_its_workers_and_prompts(two_groups) -> None:
    test = two_groups.test
    base, other = PooledReward(1.0).fit(two_groups.train), PooledReward(1e4).fit(two_groups.train)
    bootstrap = TwoWayBootstrap(test, 200, 0.95, 0)
    told = curves._difference(test, other, base, bootstrap)
    losses = [log_loss(one.decision_function(test), test.y) for one in (other, base)]
    assert told["log_loss"]["value"] == pytest.approx((losses[0] - losses[1]).mean(), rel=1e-5)  # all have equally many
    assert 0 < told["log_loss"]["low"] < told["log_loss"]["value"] < told["log_loss"]["high"]


def test_the_naive_pipeline_gives_each_cluster_the_reward_of_its_own_votes(two_groups) -> None:
    train, base = two_groups.train, ReliabilityReward().fit(two_groups.train)
    fitted = naive.NaiveReward(3, base).fit(train)
    assert sorted(set(fitted.groups_)) == [0, 1, 2]
    for k, reward in enumerate(fitted.rewards_):
        mine = (fitted.groups_ == k)[train.worker]
        np.testing.assert_allclose(
            fitted.decision_function(train)[mine], train.x[mine] @ reward.theta_, rtol=1e-4, atol=1e-5
        )


def test_gates_open_for_true_groups_and_stay_closed_for_random_ones(two_groups) -> None:
    pooled = PooledReward().fit(two_groups.train)
    fitted = naive.NaiveReward(2, ReliabilityReward().fit(two_groups.train))
    fitted.n_features_in_, rng = two_groups.train.n_features, np.random.default_rng(0)
    opened = {}
    for name, groups in {"true": two_groups.people.group, "random": rng.permutation(two_groups.people.group)}.items():
        fitted.groups_ = groups
        fitted.rewards_ = [
            PooledReward().fit(two_groups.train.subset((groups == k)[two_groups.train.worker])) for k in (0, 1)
        ]
        opened[name] = naive.gates(fitted, pooled, two_groups.test)
    assert opened == {"true": [True, True], "random": [False, False]}


def test_win_rates_of_the_best_responses() -> None:
    h = np.array([[[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])  # one prompt, three responses
    answers = best_of.best(h, np.eye(2))
    np.testing.assert_array_equal(answers, [[[2, 0]], [[0, 3]]])
    people = Annotators(["a", "b"], np.eye(2), np.array([0, 1]), np.eye(2), np.array([1.0, 0.1]))
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 0.3])))
    assert best_of.rate(people, answers, answers[::-1]) == pytest.approx(sigmoid.mean())
    assert best_of.rate(people, answers, answers) == 0.5


# --------------------------------------------------------------------------------------------------------------- what is said
def amount(workers: int, comparisons: int, seed: int, verdict: str, gain: float) -> dict:
    accuracy = {"shipped": 0.7 + gain, "reliability": 0.7, "oracle": 0.74}
    of = {"coteries": 4 if verdict == "coteries" else 1, "ari": 0.9, "confidence": 0.8, "seconds": 1.0}
    return {"task": [workers, comparisons, seed], "verdict": verdict, "accuracy": accuracy, **of}


def amounts_of(gain: float) -> dict:
    rows = [amount(100, 5, seed, "one-taste", 0.0) for seed in (1, 2, 3)]
    rows += [amount(100, 100, seed, "coteries", gain + 1e-4 * seed) for seed in (1, 2, 3)]
    return amounts.summary(rows)


def test_the_fewest_comparisons_are_those_at_which_groups_are_found_and_serve() -> None:
    assert amounts_of(0.039)["fewest"] == {"100": {"served": 100, "found": 100}}
    assert amounts_of(0.02)["fewest"] == {"100": {"served": 100, "found": None}}  # half of what they could bring
    assert amounts_of(0.01)["fewest"] == {"100": {"served": None, "found": None}}
    assert list(amounts_of(-0.02)["targets"].values()) == [False]
    page = amounts.markdown(amounts_of(0.039))
    assert "+3.9 [+3.9, +3.9] of +4.0; 3/3; ARI 0.90" in page
    assert "(100 × 5, workers × comparisons of each)" in page


def failure(name: str, seed: int, **diagnostics) -> dict:
    good, bad = ({"log_loss": sign * 0.01 + 1e-4 * seed, "accuracy": -sign * 0.02} for sign in (-1, 1))
    told = {
        "p_value": 0.4,
        "half_split_ari": 0.05,
        "half_split_ari_ours": None,
        "gates_closed": 3,
        "gates": 4,
    } | diagnostics
    ours = {"verdict": "one-taste", "coteries": 1, "ships": "one-reward", "confidence": 0.9, "ari": None}
    look = {"on_training_votes": good, "silhouette": 0.1, "ari": None}
    row = {"task": [name, seed], "pooled_accuracy": 0.7, "naive": bad | look, "ours": good | ours, "oracle": good}
    return row | {"diagnostics": told}


def test_a_failure_is_caught_by_what_gives_warning() -> None:
    row = failure("nothing to find", 1)
    assert failures.caught(row) == dict.fromkeys(failures.CATCHES, True)
    calm = {"p_value": 0.01, "half_split_ari": 0.5, "gates_closed": 1}
    row = failure("nothing to find", 1, **calm)
    row["ours"]["coteries"] = naive.FAILURES["nothing to find"].groups
    assert failures.caught(row) == dict.fromkeys(failures.CATCHES, False)
    told = failures.summary([failure("nothing to find", seed) for seed in (1, 2, 3)] + [row | {"task": row["task"]}])
    figures = told["failures"]["nothing to find"]
    assert (figures["caught_by_any"], figures["data_sets"], figures["gates"]) == (3, 4, [10, 16])
    assert list(told["targets"].values()) == [False, True]
    assert "| 3 of 4 | 3 of 4 | 3 of 4 | 3 of 4 | 3 of 4 |" in failures.markdown(told)


def curves_of(curve: dict) -> dict:
    picked = {"verdict": "coteries", "coteries": 2, "ships": "coteries"} | curve["methods"]["mixture"]["2"]
    simulated = [curve | {"task": ["groups-2", seed], "automatic": picked} for seed in (1, 2, 3)]
    cell = {name: {"value": 0.001, "low": 0.0, "high": 0.002} for name in ("log_loss", "accuracy")}
    cell |= {"smallest": 9, "ari": None}
    real = curve | {"task": ["tldr", 0], "automatic": None, "pooled": cell}
    real["methods"] = {method: dict.fromkeys(cells, cell) for method, cells in curve["methods"].items()}
    real["joint_less_two_stage"] = {c: dict.fromkeys(of, cell) for c, of in curve["joint_less_two_stage"].items()}
    return coteries.summary([*simulated, real])


def test_what_was_chosen_is_compared_with_the_best_in_hindsight(curve) -> None:
    told = curves_of(curve)
    figures = told["settings"]["groups-2"]
    best = figures["best"]["log_loss"]["value"]
    assert best == min(cell["log_loss"]["value"] for cells in figures["methods"].values() for cell in cells.values())
    picked = figures["automatic"]
    assert picked["behind"]["value"] == pytest.approx(picked["log_loss"]["value"] - best)
    assert picked["verdict"] == {"coteries": 3}
    real = told["settings"]["tldr"]
    assert real["methods"]["mixture"]["2"]["log_loss"]["high"] == pytest.approx(0.002)
    assert real["best"]["size"] == "1"  # where every number of coteries is worse than one
    assert set(coteries.plots(told)) == {"coteries-groups-2", "coteries-tldr"}


def wins(own: float) -> dict:
    at = {"own against global": own, "own against start": 0.8, "global against start": 0.78, "own against wrong": 0.7}
    return {str(size): at for size in best_of.SIZES}


def won(own: float) -> dict:
    return policies.summary([{"task": ["groups", s], "wins": wins(own + s / 1e3)} for s in (1, 2, 3)])


def test_a_policy_must_be_preferred_where_there_are_groups() -> None:
    assert all(won(0.6)["targets"].values())
    assert not all(won(0.498)["targets"].values())
    assert won(0.6)["settings"]["groups"]["sizes"]["4"]["arm"] == intervals.comparisons_an_arm(0.8, 0.78)
    assert "60.2 [60.0, 60.4]" in policies.markdown(won(0.6))


def test_results_say_what_they_are_made_of_and_the_page_what_they_say(tmp_path, curve) -> None:
    log = Log(tmp_path / "amounts.jsonl", "code")
    tasks = [[100, 5, 1], [100, 100, 1]]
    log.add(tasks[0], amount(*tasks[0], "one-taste", 0.0))
    measuring.write_results("amounts", tasks, log, False, tmp_path)
    told = json.loads((tmp_path / "amounts.json").read_text())
    assert (told["rows_planned"], told["rows_measured"], told["code"]) == (2, 1, "code")
    assert [row["task"] for row in told["rows"]] == tasks[:1]
    for name, summary in {
        "coteries": curves_of(curve),
        "failures": failures.summary([failure("carelessness", seed) for seed in (1, 2, 3)]),
        "policies": won(0.6),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(told | {"table": name, "summary": summary}))
    at = tmp_path / "results.md"
    render.write(tmp_path, at)
    page = at.read_text()
    assert page == render.page(tmp_path)
    assert "1 of 2 rows" in page
    for line in page.splitlines():
        if line.startswith("|") and not line.startswith("| ---"):
            assert "nan" not in line
    pictures = set(re.findall(r"study/([\w-]+)\.svg", page))
    assert pictures == {path.stem for path in tmp_path.glob("*.svg")}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    render.write(tmp_path, at)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.svg")}


# ------------------------------------------------------------------------------------------------------ what the documents say
def test_the_page_of_results_is_what_render_writes() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.page(), "run `python -m benchmarks.study render`"


def test_the_page_of_results_links_files_that_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", render.PAGE.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not link.startswith("http") and not (render.PAGE.parent / link).exists()]


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    missing = unbacked((ROOT / "README.md").read_text(encoding="utf-8"))
    assert not missing, "\n".join(f"benchmarks/results/{one.file} has no {one.figure}" for one in missing)


def test_a_figure_that_no_file_has_is_named_with_its_file(tmp_path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({"a": 0.7584, "of": [{"b": 1234, "c": True}]}))
    recovered = {"value": 0.9931, "low": 0.984, "high": 1.0025}
    told = {"texts": {"tldr": {"recovered": recovered, "own_minus_wrong_of_oracle": recovered}}}
    (tmp_path / "policies.json").write_text(json.dumps(told))
    good = (
        "# Figures\n\nUnlinked 17.\n\nSeen [so](benchmarks/results/new.json): 75.8 % of 1,234 (`--rows 9`).\n\n"
        "| n | % |\n|---|---|\n| 1,234 | 75.84 |\n\nRecovered ([r](benchmarks/results/policies.json)) 99.3 % [98.4,\n100.2].\n\n"
        "## Else\n\n18"
    )
    assert unbacked(good, tmp_path) == []
    for right, wrong, one in (
        ("75.8 %", "75.9 %", Unbacked("new.json", "75.9 %")),
        ("75.84", "75.85", Unbacked("new.json", "75.85")),
        ("| 1,234", "| 1,235", Unbacked("new.json", "1,235")),
        ("100.2]", "100.3]", Unbacked("policies.json", "99.3 % [98.4, 100.3]")),
    ):
        assert unbacked(good.replace(right, wrong), tmp_path) == [one]
