"""Who wins is who people prefer, by judges that saw nothing a policy learned from, and length alone wins nothing."""

import json
from collections import Counter
from itertools import count

import numpy as np
import pytest
from scipy.special import expit

from benchmarks import policies as benchmark
from coterie.config import IngestSettings, JudgeSettings
from coterie.contracts import ASSIGNMENT, COMPARISON, Estimate
from coterie.discovery.votes import Votes
from coterie.encoding import STYLE_NAMES
from coterie.errors import BadConfiguration, BadData
from coterie.ingest import ingest
from coterie.policies import judges, judging
from coterie.policies.best_of_n import best_of_n
from coterie.policies.judges import Answers, HeldoutJudge, fit_judges, true_judges
from coterie.policies.judging import Comparison, judge, win_rates
from coterie.policies.policy import Answer, Policy, PolicyCard, load_backbone, write_policy
from coterie.scoring import Scorer
from coterie.simulation import SimulationSettings, write_simulation
from coterie.simulation.truth import SimulatedTruth, about_style
from tests.staged import DIMENSION, WORDS, TextEncoder, everything
from tests.tiny_models import write_backbone


# --------------------------------------------------------------------------------------------------------------- the truth
@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Tastes planted on made-up texts: the folder of the simulation and that of ingest."""
    root = tmp_path_factory.mktemp("planted")
    write_simulation(SimulationSettings(workers=60, comparisons_per_worker=30, prompts=40), root / "texts")
    texts = root / "texts" / "preferences.jsonl"
    write_simulation(SimulationSettings(setting="planted", texts=texts, groups=3), root / "simulated")
    (root / "ingested").mkdir()
    ingest(IngestSettings(source=[str(root / "simulated" / "preferences.jsonl")], pseudonyms="none"), root / "ingested")
    return root


def test_the_truth_gives_the_votes_the_chances_they_were_drawn_with(planted):
    told = json.loads((planted / "simulated" / "truth.json").read_text())
    truth = SimulatedTruth.load(planted / "simulated" / "truth.json", planted / "ingested" / "comparisons.parquet")
    rows = [json.loads(line) for line in (planted / "simulated" / "preferences.jsonl").read_text().splitlines()]
    prompts, chosen, rejected = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    who = [truth.workers.index(row["worker"]) for row in rows]
    chances = truth.prefers(prompts, chosen, rejected)[np.arange(len(rows)), who]
    assert np.maximum(chances, 1 - chances).mean() == pytest.approx(told["expected_accuracy"], abs=1e-6)
    assert (chances > 0.5).mean() == pytest.approx(told["oracle_accuracy"], abs=1e-9)
    utilities = truth.utilities(prompts, chosen) - truth.utilities(prompts, rejected)
    assert utilities.shape == (len(rows), 3)
    np.testing.assert_allclose(expit(utilities[np.arange(len(rows)), truth.people.group[who]]), chances, atol=1e-6)


def test_tastes_about_made_up_texts_cannot_be_measured_on_others(planted):
    made_up = planted / "texts" / "truth.json"
    assert not about_style(made_up)
    assert about_style(planted / "simulated" / "truth.json")
    assert not about_style(planted / "nothing.json")
    with pytest.raises(BadConfiguration, match="setting planted"):
        SimulatedTruth.load(made_up, planted / "ingested" / "comparisons.parquet")
    (planted / "broken.json").write_text('{"groups": []}')
    with pytest.raises(BadData, match="not the truth of a simulation"):
        about_style(planted / "broken.json")


# --------------------------------------------------------------------------------------------------------------- best of n
def test_the_best_of_n_is_finished_where_one_is():
    samples = [[Answer("a", True), Answer("b", False), Answer("", True)], [Answer("c", False), Answer("d", False)] * 2]
    scores = np.array([[0.0, 9.0, 8.0]])
    assert best_of_n(samples[:1], scores) == [Answer("a", True)]
    assert best_of_n(samples[1:], np.array([[1.0, 3.0, 2.0, 0.0]])) == [Answer("d", False)]


# ----------------------------------------------------------------------------------------------------------- the win rates
NUMBER = count()


def answers(words, features=None):
    """Answers that differ from all others."""
    n, number = len(words), next(NUMBER)
    return Answers(["p"] * n, [f"answer {number}"] * n, np.ones(n, bool), np.asarray(words, float), features)


class Given:
    """People who vote with these chances, [people, n]."""

    def __init__(self, votes):
        self._votes, self.people = votes, len(votes)

    def votes(self, first, second):
        return self._votes


def rates_of(judged, policy, *against, settings=JudgeSettings(replicates=200)):  # noqa: B008 - frozen
    return win_rates([Comparison(judged, policy, against)], settings)


def value(rate):
    return Estimate(**rate)


def test_at_equal_length_is_what_the_curve_says_where_lengths_do_not_differ():
    rng = np.random.default_rng(0)
    longer = 0.4 + 0.3 * rng.standard_normal(400)
    chances = expit(0.3 + 1.5 * longer + 0.2 * rng.standard_normal((30, 1)) + 0.3 * rng.standard_normal(400))
    rates = rates_of(Given(chances), answers(longer), answers(np.zeros(400)))
    raw, equal, near = (value(rates[name]) for name in ("raw", "equal_length", "within_tolerance"))
    assert raw.value > 0.68
    assert equal.value == pytest.approx(expit(0.3), abs=0.02)
    assert equal.low < expit(0.3) < equal.high
    assert near.value == pytest.approx(expit(0.3), abs=0.05)
    assert rates["within"] == np.count_nonzero(1 - np.exp(-np.abs(longer)) <= 0.1)
    assert (near.high - near.low) > (equal.high - equal.low)  # few prompts
    assert (rates["pairs"], rates["people"]) == (400, 30)


def test_two_policies_share_the_votes_and_equal_answers_halve_them():
    rng = np.random.default_rng(1)
    features, influence = rng.standard_normal((3, 50, 4)), rng.standard_normal((20, 4))
    one, two, three = (answers(2 + 0.3 * rng.standard_normal(50), h) for h in features)
    judged = HeldoutJudge(np.array([1.0, 0.5, 0, 0]), influence - influence.mean(axis=0))
    there, back, same = rates_of(judged, one, two), rates_of(judged, two, one), rates_of(judged, one, one)
    for name in ("raw", "equal_length", "within_tolerance"):
        assert there[name]["value"] + back[name]["value"] == pytest.approx(1, abs=1e-4)
        assert there[name]["low"] + back[name]["high"] == pytest.approx(1, abs=1e-3)
    assert same["raw"]["value"] == same["equal_length"]["value"] == pytest.approx(0.5)
    several = rates_of(judged, one, two, three)
    others = [rates_of(judged, one, other) for other in (two, three)]
    assert several["raw"]["value"] == pytest.approx(np.mean([rate["raw"]["value"] for rate in others]))
    assert several["equal_length"]["value"] == pytest.approx(
        np.mean([rate["equal_length"]["value"] for rate in others])
    )


def test_where_both_say_the_same_is_a_tie_and_no_point_of_the_curve():
    rng, n = np.random.default_rng(4), 300
    same = rng.random(n) < 0.5
    longer = np.where(same, 0, 0.4 + 0.3 * rng.standard_normal(n))
    chances = np.where(same, 0.5, expit(0.6 + longer + 0.2 * rng.standard_normal((30, 1))))
    one, other = answers(longer), answers(np.zeros(n))
    one.texts[:] = [text if again else mine for again, text, mine in zip(same, other.texts, one.texts, strict=True)]
    rates = rates_of(Given(chances), one, other)
    true = 0.5 * same.mean() + expit(0.6) * (1 - same.mean())
    assert rates["equal_length"]["value"] == pytest.approx(true, abs=0.01)
    assert rates["equal_length"]["low"] < true < rates["equal_length"]["high"]
    assert rates["within_tolerance"]["value"] > 0.6
    assert (rates["same"], rates["pairs"]) == (same.sum(), n)
    one.texts[:] = other.texts
    silent = rates_of(Given(np.full((30, n), 0.5)), answers(np.zeros(n)), answers(np.zeros(n)))
    alike = rates_of(Given(np.full((30, n), 0.5)), one, other)
    assert silent["equal_length"]["value"] == pytest.approx(0.5)
    assert [alike["equal_length"][name] for name in ("value", "low", "high")] == pytest.approx([0.5] * 3)
    assert alike["within_tolerance"]["value"] is None


def test_people_of_several_judges_count_alike():
    few, many = Given(np.full((10, 40), 0.9)), Given(np.full((30, 40), 0.5))
    parts = [Comparison(one, answers(np.zeros(40)), [answers(np.zeros(40))]) for one in (few, many)]
    together = win_rates(parts, JudgeSettings(replicates=200))
    assert together["raw"]["value"] == pytest.approx(0.6)
    assert together["equal_length"]["value"] == pytest.approx(0.6, abs=1e-3)
    assert together["raw"]["low"] < 0.55  # people differ, though none of a coterie does
    assert (together["people"], together["pairs"]) == (40, 80)


def test_intervals_at_equal_length_hold_the_truth_as_often_as_they_say():
    rng, held, n, settings = np.random.default_rng(2), [], 60, JudgeSettings(replicates=200, level=0.9)
    reader, prompts = rng.standard_normal(2_000_000), rng.standard_normal(2_000_000)
    # Of the population: everybody at every prompt, lengths equal; the curve is one of means over people and prompts.
    true = float(expit(0.3 + 0.5 * reader + 0.7 * prompts).mean())
    for _ in range(150):
        longer = 0.5 * rng.standard_normal(n)
        chances = expit(0.3 + longer + 0.5 * rng.standard_normal((25, 1)) + 0.7 * rng.standard_normal(n))
        rate = rates_of(Given(chances), answers(longer), answers(np.zeros(n)), settings=settings)["equal_length"]
        held.append(rate["low"] < true < rate["high"])
    assert 0.83 < np.mean(held) < 0.96


# -------------------------------------------------------------------------------------------------------------- the judges
def voters(n, seed, tastes):
    """n votes of each worker, whose taste is a row of `tastes`."""
    rng = np.random.default_rng(seed)
    worker = np.repeat(np.arange(len(tastes)), n)
    x = rng.standard_normal((len(worker), tastes.shape[1]))
    first = rng.random(len(worker)) < expit((x * tastes[worker]).sum(axis=1))
    return Votes.of(np.where(first[:, None], x, -x), np.ones(len(x)), worker, n_workers=len(tastes))


@pytest.fixture(scope="module")
def people():
    """80 workers of two coteries, each with a taste of their own around the coterie's; and their posteriors."""
    rng, coterie = np.random.default_rng(5), np.arange(80) % 2
    tastes = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0]])[coterie] + 0.7 * rng.standard_normal((80, 4))
    return tastes, np.eye(2)[coterie] * 0.96 + 0.02


def test_judges_hear_their_own_people_and_held_out_votes_only(people):
    tastes, posterior = people
    train, held = voters(30, 1, tastes), voters(40, 2, tastes)
    common, one, two = (judge.weight for judge in fit_judges(train, held, posterior, np.ones(80)))
    assert common[1] == pytest.approx(common[2], abs=0.15)
    assert one[1] - one[2] > 0.5
    assert two[2] - two[1] > 0.5
    # Training votes to the contrary choose the strongest pull to the common one and a low scale; what is liked stays.
    contrary = fit_judges(voters(30, 1, -tastes), held, posterior, np.ones(80))[1].weight
    assert contrary @ one > 0.9 * np.linalg.norm(contrary) * np.linalg.norm(one)
    nobody = np.stack([np.ones(80), np.zeros(80)], axis=1)
    assert fit_judges(train, held, nobody, np.ones(80))[2] is None


def test_the_spread_of_a_judge_is_that_of_judges_whom_other_people_made(people):
    tastes, posterior = people
    train, held = voters(30, 1, tastes), voters(40, 2, tastes)
    x = np.random.default_rng(0).standard_normal((20, 4)) + 0.5 * np.eye(4)[0]
    sides = answers(np.zeros(20), x), answers(np.zeros(20), np.zeros_like(x))
    for number in (0, 1):  # of everybody, and of the first coterie
        judged = fit_judges(train, held, posterior, np.ones(80))[number]
        votes = judged.votes(*sides)
        told = votes.mean(axis=1).std(ddof=1) / np.sqrt(judged.people)
        np.testing.assert_allclose(votes.mean(axis=0), expit(judged.score(sides[0])), atol=1e-9)
        rng, others = np.random.default_rng(3), []
        for _ in range(40):
            drawn = 2 * rng.integers(0, 40, 80) + np.arange(80) % 2  # of the same coteries
            rows = np.concatenate([np.flatnonzero(held.worker == worker) for worker in drawn])
            again = Votes.of(held.x[rows], held.y[rows], np.repeat(np.arange(80), 40), held.prompt[rows], 80)
            others.append(fit_judges(train, again, posterior[drawn], np.ones(80))[number].votes(*sides).mean())
        assert told == pytest.approx(np.std(others, ddof=1), rel=0.3)


def test_very_many_people_stand_together_and_say_the_same(monkeypatch):
    tastes = np.tile([1.0, 0.5], (1300, 1)) + 0.5 * np.random.default_rng(0).standard_normal((1300, 2))
    train, held = voters(5, 1, tastes), voters(10, 2, tastes)
    x = np.random.default_rng(0).standard_normal((20, 2)) + np.eye(2)[1]
    sides, errors = (answers(np.zeros(20), x), answers(np.zeros(20), np.zeros_like(x))), []
    for most in (500, 1300):
        monkeypatch.setattr(judges, "_MOST_PEOPLE", most)
        judged = fit_judges(train, held, np.ones((1300, 1)), np.ones(1300))[0]
        assert judged.people == most
        errors.append(judged.votes(*sides).mean(axis=1).std(ddof=1) / np.sqrt(most))
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


# --------------------------------------------------------------------------------------------------------------- the stage
@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """All stages up to the bundle: the people of coterie 0 like long texts, those of coterie 1 short ones."""
    return everything(tmp_path_factory.mktemp("staged"), workers=60, comparisons=60)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Folders of four policies of a tiny backbone."""
    root = tmp_path_factory.mktemp("policies")
    backbone = str(write_backbone(root / "backbone"))
    _, tokenizer, revision = load_backbone(backbone, "main", "cpu", "float32")
    for role in ("start", "global", "coterie-0", "coterie-1"):
        card = PolicyCard(
            backbone=backbone, revision=revision, start=None if role == "start" else "start", role=role, method="none",
            temperature=0.7, prompt_tokens=40, response_tokens=9, seed=0,
        )  # fmt: skip
        write_policy(root / role, card, tokenizer)
    (root / "start" / "adapter_config.json").write_text("{}")  # never read: generation is the test's
    return {role: root / role for role in ("start", "global", "coterie-0", "coterie-1")}


@pytest.fixture
def stage(staged, policies, monkeypatch):
    """Runs the stage with policies that write what `say` (role, prompt, rng) says."""

    def run(say, names=("start", "global", "coterie-0", "coterie-1"), **settings):
        asked = []

        def generate(self, prompts, n=1, max_tokens=48, temperature=0.9, seed=0, batch_size=32):
            asked.append((self.card.role, tuple(prompts), n, max_tokens, temperature, seed))
            rng = np.random.default_rng([seed, *self.card.role.encode()])
            return [[Answer(say(self.card.role, prompt, rng), True) for _ in range(n)] for prompt in prompts]

        monkeypatch.setattr(judging, "load_scorer", lambda bundle: Scorer(bundle, TextEncoder()))
        monkeypatch.setattr(Policy, "load", classmethod(lambda cls, folder, **_: loaded(folder)))
        monkeypatch.setattr(Policy, "generate", generate)
        told = judge(
            {name: policies[name] for name in names}, staged.bundle, staged.ingest / "comparisons.parquet",
            staged.embed, staged.cluster, JudgeSettings(**{"prompts": 12, "best_of": 4, "replicates": 200} | settings),
        )  # fmt: skip
        json.dumps(told, allow_nan=False)
        return told, asked

    def loaded(folder):
        card = PolicyCard.read(folder)
        return Policy(None, load_backbone(card.backbone, card.revision, "cpu", "float32")[1], card)

    return run


def rate_of(told, coterie, policy, against, name="equal_length"):
    wanted = ("heldout", coterie, policy, against)
    found = [w for w in told["wins"] if (w["judge"], w["coterie"], w["policy"], w["against"]) == wanted]
    assert len(found) == 1
    return Estimate(**found[0][name])


def words(n, rng):
    return " ".join(rng.choice(WORDS, n)).capitalize() + "."


def test_length_alone_wins_votes_and_no_gate(stage):
    typical = {"start": 10, "global": 10, "coterie-0": 18, "coterie-1": 5}
    told, asked = stage(lambda role, prompt, rng: words(typical[role] + rng.integers(-4, 5), rng))
    for k in (0, 1):
        assert rate_of(told, k, f"coterie-{k}", "start", "raw").low > 0.5
        assert rate_of(told, k, f"coterie-{k}", "wrong", "raw").low > 0.5
        assert rate_of(told, 1 - k, f"coterie-{k}", "start", "raw").high < 0.5
        equal = rate_of(told, k, f"coterie-{k}", "global")
        assert equal.low < 0.5
    assert [gate["serves"] for gate in told["gates"]] == ["start"] * 3
    assert all("not surely preferred" in gate["reason"] for gate in told["gates"])
    assert told["lengths"]["coterie-0"]["value"] == pytest.approx(18, abs=2)
    assert told["lengths"]["coterie-0"]["low"] < told["lengths"]["coterie-0"]["value"]
    assert told["finished"]["start"] == {"value": 1.0, "low": 1.0, "high": 1.0, "level": 0.95}
    assert told["worst"]["policy"] == "start"
    together = rate_of(told, None, "own", "start", "raw")
    assert together.low > 0.5
    each = [rate_of(told, k, f"coterie-{k}", "start", "raw").value for k in (0, 1)]
    assert min(each) < together.value < max(each)
    # Everybody answers the same prompts once, as their cards say, and the start once more n times by another seed.
    roles = [role for role, *_ in asked]
    assert roles == ["start", "global", "coterie-0", "coterie-1", "start"]
    assert len({prompts for _, prompts, *_ in asked}) == 1
    assert [n for _, _, n, *_ in asked] == [1, 1, 1, 1, 4]
    assert {(tokens, temperature) for *_, tokens, temperature, _ in asked} == {(9, 0.7)}
    assert [seed for *_, seed in asked] == [0, 0, 0, 0, 1]
    assert set(told["samples"][0]["answers"]) == set(told["lengths"]) >= {"start", "coterie-1 best-of-4"}


def test_a_policy_that_its_people_prefer_at_equal_length_serves_them(stage, monkeypatch):
    marks = {"start": ".", "global": "?", "coterie-0": "!", "coterie-1": "?"}

    def likes(embedded, clustered, seed):
        """Everybody likes questions; coterie 0 rather exclamations, coterie 1 is no different from everybody."""
        places = {name: DIMENSION + STYLE_NAMES.index(name) for name in ("questions", "exclamations")}
        found = []
        for questions, exclamations in ((2.0, 0.0), (1.0, 3.0), (2.0, 0.0)):
            weight = np.zeros(DIMENSION + len(STYLE_NAMES))
            weight[[places["questions"], places["exclamations"]]] = questions, exclamations
            moved = 0.3 * np.random.default_rng(0).standard_normal((30, len(weight)))
            found.append(HeldoutJudge(weight, moved - moved.mean(axis=0)))
        return found

    monkeypatch.setattr(judging, "heldout_judges", likes)
    told, _ = stage(lambda role, prompt, rng: words(rng.integers(8, 12), rng)[:-1] + marks[role])
    assert [(gate["coterie"], gate["serves"]) for gate in told["gates"]] == [(None, "own"), (0, "own"), (1, "global")]
    assert told["gates"][1]["reason"].endswith("of the votes against the global policy at equal length")
    assert told["worst"]["coterie"] == 1
    assert told["worst"]["policy"] == "global"
    assert told["worst"]["low"] > 0.5
    alone, _ = stage(
        lambda role, prompt, rng: words(9, rng)[:-1] + marks[role], names=("start", "global", "coterie-1"), best_of=1
    )
    assert alone["gates"][1] == {"coterie": 0, "serves": "global", "reason": "no policy of its own was tuned"}
    assert not [win for win in alone["wins"] if win["against"] == "wrong" or "best-of" in win["policy"]]


def test_judging_repeats_itself_and_takes_test_prompts_that_fit(stage, staged):
    say = lambda role, prompt, rng: words(rng.integers(3, 20), rng)  # noqa: E731
    (one, asked), (again, _) = stage(say), stage(say)
    assert one == again
    table = COMPARISON.read(staged.ingest / "comparisons.parquet", ["prompt", "split"]).to_pylist()
    tests = {row["prompt"] for row in table if row["split"] == "test"}
    assert set(asked[0][1]) == tests
    assert (one["prompts"], one["prompts_left_out"]) == (12, 0)
    fewer, asked = stage(say, prompts=8)
    assert fewer["prompts"] == len(set(asked[0][1])) == 8


def test_what_cannot_be_judged_is_said(stage, staged, policies, monkeypatch, tmp_path):
    with pytest.raises(BadConfiguration, match="global"):
        stage(lambda *_: "x", names=("start", "coterie-0"))
    short = PolicyCard.read(policies["start"]).model_copy(update={"prompt_tokens": 3})
    monkeypatch.setattr(PolicyCard, "read", classmethod(lambda cls, folder: short))
    with pytest.raises(BadData, match="none has at most the 3 tokens"):
        stage(lambda *_: "x")


def test_the_truth_of_simulated_annotators_judges_beside(planted, tmp_path):
    """By the very people whose votes were drawn: what they like wins."""
    comparisons = planted / "ingested" / "comparisons.parquet"
    truth = SimulatedTruth.load(planted / "simulated" / "truth.json", comparisons)
    group = truth.people.group
    ASSIGNMENT.write(
        tmp_path / "assignments.parquet",
        {
            "worker_id": sorted(truth.workers),
            "embedding": np.zeros((60, 1)),
            "reliability": np.ones(60),
            "comparisons": np.ones(60),
            "coterie": [group[truth.workers.index(worker)] for worker in sorted(truth.workers)],
            "posterior": np.zeros((60, 3)),
            "mixture_version": ["m"] * 60,
        },
        embedding=1,
        posterior=3,
    )
    everybody, *of_coteries = true_judges(truth, tmp_path)
    assert [judge.people for judge in (everybody, *of_coteries)] == [60, *np.bincount(group).tolist()]
    prompts = [f"What is {word}?" for word in WORDS]
    lists = [Answer(f"Do this:\n- {word}\n- 3 stones", True) for word in WORDS]
    plain = [Answer(f"Perhaps {word} and stones", True) for word in WORDS]
    sides = [Answers.of(prompts, side, lambda p, r: np.zeros((len(p), 1))) for side in (lists, plain)]
    names = truth.people.names
    shares = dict(zip(names, [judge.votes(*sides).mean() for judge in of_coteries], strict=True))
    assert max(shares, key=shares.get) == "lists and figures"
    ASSIGNMENT.write(
        tmp_path / "assignments.parquet",
        {
            "worker_id": ["stranger"], "embedding": np.zeros((1, 1)), "reliability": [1.0], "comparisons": [1],
            "coterie": [0], "posterior": np.ones((1, 1)), "mixture_version": ["m"],
        },
        embedding=1, posterior=1,
    )  # fmt: skip
    with pytest.raises(BadData, match="not in the truth"):
        true_judges(truth, tmp_path)


# ----------------------------------------------------------------------------------------------------------- the benchmark
def test_the_benchmarks_annotators_are_the_standard_groups(tmp_path):
    pairs = [
        benchmark.Pair(
            f"{split}-{i}", f"What of {split} {i}?", f"Do {word} {i}.", f"Perhaps {word}, and then {i}!", split
        )
        for split, amount in benchmark.AMOUNTS.items()
        for i, word in zip(range(amount + 20), WORDS * 20, strict=False)
    ]
    benchmark.plant(pairs, tmp_path, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert all(row["prompt_id"].startswith(row["split"]) for row in rows)
    each = Counter((row["worker"], row["split"]) for row in rows)
    assert {(split, n) for (_, split), n in each.items()} == set(benchmark.AMOUNTS.items())
    told = json.loads((tmp_path / "truth.json").read_text())
    assert [group["workers"] for group in told["groups"]] == [160, 120, 80, 40]
    assert len({(row["worker"], row["prompt_id"]) for row in rows}) == len(rows)


def test_the_benchmark_draws_no_answer_twice(policies, monkeypatch, tmp_path):
    asked = []

    def generate(self, prompts, n, *_, **__):
        asked.extend(prompts)
        return [[Answer(f"{prompt} {i}", True) for i in range(n)] for prompt in prompts]

    monkeypatch.setattr(Policy, "load", classmethod(lambda cls, folder, **_: cls(None, None, PolicyCard.read(folder))))
    monkeypatch.setattr(Policy, "generate", generate)
    log, prompts = tmp_path / "samples.jsonl", [f"prompt {i}" for i in range(20)]
    first = benchmark.draw(policies["start"], prompts[:12], 2, log)
    with log.open("a") as file:
        file.write('["prompt 12", [["cut')  # a killed run
    again = benchmark.draw(policies["start"], prompts, 2, log)
    assert again[:12] == first
    assert [len(drawn) for drawn in again] == [3] * 20
    assert benchmark.draw(policies["start"], prompts, 1, log)[5] == again[5][:2]
    assert sorted(asked) == sorted(prompts)


def test_the_benchmark_demands_what_is_asked():
    def win(against, value, low):
        rate = {"value": value, "low": low, "high": 0.9, "level": 0.95}
        return {"judge": "truth", "audience": "everybody", "people": 400, "against": against, "equal_length": rate}

    ratio = {"recovered": {"value": 0.95}, "own_minus_wrong_of_oracle": {"value": 0.89}}
    wins = [win("start", 0.66, 0.6), win("global", 0.56, 0.49), win("wrong", 0.59, 0.55)]
    met = benchmark.targets({"texts": {"tldr": ratio}, "best_of": {"wins": wins}})
    assert list(met.values()) == [True, False, True, False, False]
    assert list(benchmark.targets({"texts": {"tldr": ratio}}).values()) == [True, False]
