"""What data could show: the parts of the variance and what more data makes of them, the words, and the command."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from coterie import stages
from coterie.assess import POWER, Assessment, Contrast, assess, assessment_markdown, conclude, heldout_gains, power_of
from coterie.cli import main
from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import Candidate, Estimate
from coterie.discovery import Votes, cluster, embed
from coterie.discovery.selection import HeldOut
from tests.discovery_data import comparison_files
from tests.staged import TextEncoder

BEST = Candidate(member="lowrank", size=1, log_loss=0.0, gain=0.0, standard_error=0.0)


def differences(workers, prompts, seed, between=0.02, prompt=0.1, comparison=0.2, gain=0.01):
    """Votes of workers who judge two pairs of each of `prompts` prompts (a number each), and gains on them."""
    rng = np.random.default_rng(seed)
    worker = np.repeat(np.arange(workers), 2 * np.asarray(prompts))
    cell = np.repeat(np.arange(len(worker) // 2), 2)
    values = gain + between * rng.standard_normal(workers)[worker] + prompt * rng.standard_normal(len(cell))[cell]
    values += comparison * rng.standard_normal(len(worker))
    numbers = np.concatenate([rng.permutation(200)[:n] for n in np.broadcast_to(prompts, workers)])
    return Votes.of(np.ones((len(worker), 1)), np.ones(len(worker)), worker, np.repeat(numbers, 2)), values


def contrast_of(votes, values):
    return Contrast.of(votes, values, np.ones(len(votes)))


def test_the_variance_is_parted_into_what_is_between_workers_and_what_is_noise():
    prompts = np.random.default_rng(0).integers(5, 40, 2000)
    contrast = contrast_of(*differences(2000, prompts, seed=1, between=0.05))
    noise = (0.1**2 + 0.2**2 / 2) * (1 / prompts).mean()
    assert contrast.between == pytest.approx(0.05**2, rel=0.1)
    assert contrast.within == pytest.approx(noise, rel=0.05)
    assert contrast.comparisons == pytest.approx(2 * prompts.mean())


def test_what_a_comparison_counts_is_as_good_as_that_many_of_them():
    votes, values = differences(60, 12, seed=2)
    thrice = np.arange(len(votes)) % 4 == 0
    repeated = np.repeat(np.arange(len(votes)), np.where(thrice, 3, 1))
    one = Contrast.of(votes, values, np.where(thrice, 3.0, 1.0))
    other = contrast_of(
        Votes.of(votes.x[repeated], votes.y[repeated], votes.worker[repeated], votes.prompt[repeated]), values[repeated]
    )
    assert (one.gain, one.between, one.within) == pytest.approx((other.gain, other.between, other.within))


def test_twice_the_workers_and_twice_the_comparisons_do_what_is_predicted():
    once = [contrast_of(*differences(50, 8, seed)) for seed in range(60)]
    for workers, prompts in [(100, 8), (50, 16)]:
        means = [contrast_of(*differences(workers, prompts, seed)).gain for seed in range(100, 400)]
        between, within = np.mean([c.parts(c.gain) for c in once], axis=0)
        predicted = np.sqrt((between + within * 8 / prompts) / workers)
        assert predicted == pytest.approx(np.std(means), rel=0.12)


def test_what_is_recommended_shows_the_wanted_gain():
    contrast = contrast_of(*differences(40, 30, seed=3, between=0.005))
    gain = 0.6 * contrast.smallest_gain()
    assert contrast.probability(contrast.smallest_gain()) == pytest.approx(POWER)
    assert contrast.probability(gain) < POWER
    between, within = contrast.parts(gain)
    for workers, comparisons in [(contrast.times_workers(gain), 1), (1, contrast.times_comparisons(gain))]:
        assert np.isfinite([workers, comparisons]).all()
        error = np.sqrt((between + within / comparisons) / (contrast.workers * workers))
        assert gain / error == pytest.approx(1.6449 + 0.8416, abs=1e-3)


def test_the_interval_is_students():
    votes, values = differences(12, 10, seed=4)
    made, means = contrast_of(votes, values).estimate(), votes.sum_by_worker(values) / votes.counts
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.9)
    assert (made.low, made.high) == pytest.approx((expected.low, expected.high))


def test_no_number_of_comparisons_helps_where_workers_differ_too_much():
    contrast = Contrast(gain=0.004, between=0.02**2, within=0.001, comparisons=50, workers=40)
    power = power_of(contrast, BEST, 100.0, True, 0.005)
    assert power.more_comparisons is None
    assert power.more_workers == pytest.approx(2.4865**2 * 0.0014 / 0.004**2 - 40, abs=1)


def taste_votes(strength, seed, workers=40, comparisons=60, features=8):
    """Two equal groups whose tastes lie `strength` times the common taste to either side of it."""
    rng = np.random.default_rng(seed)
    common, own = np.linalg.qr(rng.standard_normal((features, 2)))[0].T
    tastes = 2 * (common + strength * rng.choice([-1, 1], workers)[:, None] * own)
    worker = np.repeat(np.arange(workers), comparisons)
    x = rng.standard_normal((len(worker), features))
    x[rng.random(len(x)) > 1 / (1 + np.exp(-(x * tastes[worker]).sum(axis=1)))] *= -1
    return Votes.of(x, np.ones(len(x)), worker, rng.integers(0, 1200, len(x)))


def fitted(strength, seed, **size):
    votes, nats, _, weights = heldout_gains(HeldOut(taste_votes(strength, seed, **size), 3, seed), BEST)
    return Contrast.of(votes, nats, weights)


def test_votes_without_tastes_say_what_tastes_they_would_have_shown():
    """Their own standard error says nothing: the fitted tastes are shrunk until the difference hardly varies."""
    nothing = [fitted(0, seed) for seed in range(6)]
    predicted = np.median([contrast.smallest_gain() for contrast in nothing])
    assert np.median([contrast.standard_error for contrast in nothing]) * 2.49 < predicted / 4
    shown, gain = {}, {}
    for strength in (0.18, 0.3):
        planted = [fitted(strength, seed) for seed in range(12)]
        shown[strength] = np.mean([c.gain > 1.645 * c.standard_error for c in planted])
        gain[strength] = np.mean([c.gain for c in planted])
    assert shown[0.18] < POWER < shown[0.3]
    assert gain[0.18] < predicted < 1.5 * gain[0.3]


def test_fitted_tastes_of_more_votes_have_the_predicted_error():
    few = [fitted(0.35, seed) for seed in range(4)]
    for size in ({"workers": 80}, {"comparisons": 120}):
        many = [fitted(0.35, seed, **size) for seed in range(4)]
        gain = np.mean([c.gain for c in many])  # fitted to more votes, it is larger
        between, within = np.mean([c.parts(gain) for c in few], axis=0)
        predicted = np.sqrt((between + within * 60 / size.get("comparisons", 60)) / size.get("workers", 40))
        found = np.mean([c.standard_error for c in many])
        assert found / 1.5 < predicted < 1.75 * found


# ---------------------------------------------------------------------------------------------------------------- words
def concluded(verdict, contrast, ari=None, ships="one-reward", worthwhile=0.005):
    selection = {"verdict": verdict, "member": "mixture", "size": 2, "coteries": 2, "ships": ships}
    clustered = {
        "selection": selection | {"confidence": 0.9},
        "heterogeneity": {"statistic": 0.01, "p_value": 0.0167, "replicates": 59, "null": "none"},
        "stability": {} if ari is None else {"half_split_ari": ari},
        "sizes": [30, 10],
    }
    power = None if contrast is None else power_of(contrast, BEST, 100.0, verdict != "one-taste", worthwhile)
    accuracy = Estimate(value=0.01, low=0.001, high=0.02, level=0.9)
    return conclude({"workers": 40, "comparisons": 4000, "refused": 0}, clustered, power, accuracy, worthwhile)


SURE = Contrast(gain=0.01, between=1e-4, within=1e-4, comparisons=50, workers=40)
UNSURE = Contrast(gain=0.01, between=1e-4, within=0.002, comparisons=50, workers=40)
QUIET = Contrast(gain=0.0001, between=0.0, within=1e-5, comparisons=500, workers=400)
BLIND = Contrast(gain=0.0001, between=0.0, within=1e-5, comparisons=50, workers=40)


@pytest.mark.parametrize(
    ("case", "finding", "words", "unsaid"),
    [
        (concluded("coteries", SURE, ari=0.62, ships="coteries"), "coteries", ["for each coterie", "0.62", "suffices"], ["But"]),
        (concluded("coteries", UNSURE, ari=0.62, ships="coteries"), "coteries", ["in only", "more workers"], ["suffices"]),
        (concluded("coteries", SURE, ari=0.6, ships="coteries", worthwhile=0.05), "coteries", ["But the gain, +10.0 [+", "below the 50.0"], []),
        (concluded("continuous", SURE, ships="embedding"), "degrees", ["own embedding", "no groups"], ["each coterie"]),
        (concluded("continuous", SURE, ships="coteries"), "degrees", ["mixture of the coteries"], ["own embedding"]),
        (concluded("one-taste", QUIET), "one-taste", ["Train one reward for everybody", "was not"], ["more workers"]),
        (concluded("one-taste", BLIND), "undecided", ["for now", "only", "more workers", "more comparisons"], ["everybody"]),
        (concluded("one-taste", None), "too-little", ["Collect more", "at least 10 workers", "40 workers"], ["Train"]),
    ],
)  # fmt: skip
def test_each_finding_has_its_recommendation(case, finding, words, unsaid):
    assert case.finding == finding
    assert all(word in case.recommendation for word in words), case.recommendation
    assert not any(word in case.recommendation for word in unsaid), case.recommendation
    text = assessment_markdown(case)
    assert case.recommendation in text
    assert ("| +1.0 [+0.1, +2.0], 90 % interval |" in text) is (case.power is not None)
    assert Assessment.model_validate_json(case.model_dump_json()) == case


def test_the_numbers_of_the_words_are_those_of_the_power():
    case = concluded("one-taste", BLIND)
    assert case.power.smallest_gain > case.worthwhile == case.power.wanted
    for told in (f"{1000 * case.power.smallest_gain:.1f}", f"{100 * case.power.probability:.0f} %", "set to 5.0"):
        assert told in case.recommendation
    assert f"{float(f'{case.power.more_comparisons:.2g}'):,.0f} more comparisons" in case.recommendation


# -------------------------------------------------------------------------------------------------------- from the files
def test_the_gain_is_the_one_that_was_compared(tmp_path):
    comparisons, vectors, _ = comparison_files(tmp_path, workers=30, comparisons=40)
    for name in ("embedded", "clustered"):
        (tmp_path / name).mkdir()
    embed(comparisons, vectors, tmp_path / "embedded", EmbedSettings(components=3, max_rank=1))
    clustered = cluster(tmp_path / "embedded", tmp_path / "clustered", ClusterSettings(max_coteries=2, replicates=0))
    ingested = {"workers": 30, "comparisons": 1200, "refused": 0}
    found = assess(ingested, clustered, tmp_path / "embedded" / stages.DIFFERENCES, 0.005)
    assert found.finding in ("coteries", "degrees")
    best = max(clustered["selection"]["candidates"], key=lambda candidate: candidate["gain"])
    assert (found.power.member, found.power.size) == (best["member"], best["size"])
    assert found.power.gain.value == pytest.approx(best["gain"], rel=1e-4)
    assert found.power.standard_error == pytest.approx(best["standard_error"], rel=1e-4)
    assert found.power.workers == 29  # one has no training votes
    assert found.accuracy.low > 0


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_PSEUDONYM_KEY", "a key of the tests, long enough")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COTERIE_STAGE_CACHE", raising=False)
    monkeypatch.setattr("coterie.encoding.load_encoder", lambda settings: TextEncoder())

    def run(*arguments):
        return CliRunner().invoke(main, ["assess", *arguments, "--out", str(tmp_path / "out")])

    return run


def test_the_command_from_preferences_to_words(command, tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    votes = tmp_path / "votes"
    null = "--setting null --workers 14 --comparisons-per-worker 30 --prompts 30 --responses 4"
    made = CliRunner().invoke(main, ["simulate", "--out", str(votes), *null.split()])
    assert made.exit_code == 0, made.output
    done = command(str(votes / "preferences.jsonl"), "--worthwhile", "0.004")
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "ingest",
        "encode",
        "embed",
        "cluster",
        "assessment.json",
        "assessment.md",
    }
    assert (out / "assessment.md").read_text() in done.stdout
    found = Assessment.model_validate_json((out / "assessment.json").read_text())
    assert (found.finding, found.worthwhile, found.power.wanted) == ("undecided", 0.004, 0.004)
    assert found.data == {"workers": 14, "comparisons": 420, "refused": 0}
    assert found.selection.model_dump() == json.loads((out / "cluster" / "metrics.json").read_text())["selection"]

    caplog.clear()
    again = command(str(votes / "preferences.jsonl"), "--worthwhile", "1")
    assert "cluster: up to date" in caplog.text
    assert "Train one reward for everybody" in again.output


def test_few_workers_say_nothing(command):
    done = command("simulated://null?workers=6&comparisons_per_worker=30&prompts=20&responses=4")
    assert done.exit_code == 0, done.output
    assert "Collect more before deciding anything" in done.output
    assert "Expected gain" not in done.output
    assert command("absent.jsonl").exit_code == 2
