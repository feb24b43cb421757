"""Simulated annotators: every setting has the properties that docs/method, section 8, gives it."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from coterie.encoding.style import STYLE_NAMES, style_features
from coterie.errors import BadConfiguration, BadData
from coterie.simulation import SimulationSettings, simulate, write_simulation
from coterie.simulation.annotators import CARELESS_RELIABILITY, group_shares
from coterie.simulation.texts import ATTRIBUTES, MOST_PROMPTS, write_texts

DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = {"workers": 60, "comparisons_per_worker": 40, "prompts": 100}


def run(setting="groups", **values):
    return simulate(SimulationSettings.of(setting=setting, **(SMALL | values)))


def tastes(truth):
    return np.array([worker["taste"] for worker in truth["workers"].values()])


def group_tastes(truth):
    return np.array([[g["taste"].get(name, 0.0) for name in truth["attributes"]] for g in truth["groups"]])


def cosines(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


# ---------------------------------------------------------------------------------------------------------------- texts
def test_there_are_a_few_hundred_distinct_prompts_and_every_response_to_one_differs():
    texts = write_texts(MOST_PROMPTS, 6, np.random.default_rng(0))
    assert len(set(texts.prompts)) == MOST_PROMPTS >= 200
    assert all(len(set(responses)) == 6 for responses in texts.responses)
    assert texts.attributes.shape == (MOST_PROMPTS, 6, len(ATTRIBUTES))


def test_attributes_are_independent_and_balanced():
    attributes = write_texts(MOST_PROMPTS, 6, np.random.default_rng(1)).attributes.reshape(-1, len(ATTRIBUTES))
    np.testing.assert_allclose(attributes.mean(axis=0), 0.5, atol=0.05)
    correlations = np.corrcoef(attributes.T) - np.eye(len(ATTRIBUTES))
    assert np.abs(correlations).max() < 0.1


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_reader_sees_each_attribute(attribute):
    """The style feature of the attribute's name is larger where the attribute is on, all else being random."""
    texts = write_texts(150, 6, np.random.default_rng(2))
    prompts = [prompt for prompt in texts.prompts for _ in range(6)]
    style = style_features(prompts, [text for texts_ in texts.responses for text in texts_])
    feature = style[:, STYLE_NAMES.index(attribute)]
    on = texts.attributes.reshape(-1, len(ATTRIBUTES))[:, ATTRIBUTES.index(attribute)].astype(bool)
    assert feature[on].mean() - feature[~on].mean() > 1.2 * feature.std()


def test_texts_are_clean_sentences():
    texts = write_texts(MOST_PROMPTS, 8, np.random.default_rng(3))
    for text in [*texts.prompts, *(text for responses in texts.responses for text in responses)]:
        assert not re.search(r"[{}]|  | \n|\n | [.,!?]|[.!?][A-Za-z]|\.\.", text), text
        assert re.match(r"[A-Z]", text), text
        assert re.search(r"[.!?]$", text), text
        assert all(re.match(r"(- )?[A-Z]", line) for line in text.split("\n")), text


# ------------------------------------------------------------------------------------------------------------- settings
def test_groups_have_the_sizes_the_names_and_the_cosine():
    rows, truth = run(workers=100)
    assert len(rows) == 100 * 40
    assert [group["workers"] for group in truth["groups"]] == [40, 30, 20, 10]
    counted = Counter(worker["group"] for worker in truth["workers"].values())
    assert counted == {0: 40, 1: 30, 2: 20, 3: 10}
    np.testing.assert_allclose(cosines(group_tastes(truth)), 0.7, atol=1e-4)
    brief = truth["groups"][0]
    assert brief["name"] == "brief and direct"
    assert brief["taste"]["words"] < 0
    assert brief["taste"]["hedging"] < 0
    for worker in truth["workers"].values():
        np.testing.assert_allclose(worker["taste"], group_tastes(truth)[worker["group"]], atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "shares"),
    [(1, [1]), (2, [0.6, 0.4]), (3, [0.5, 0.3, 0.2]), (4, [0.4, 0.3, 0.2, 0.1]), (8, np.arange(8, 0, -1) / 36)],
)
def test_any_number_of_groups_to_eight(groups, shares):
    np.testing.assert_allclose(group_shares(groups), shares)
    _, truth = run(groups=groups, workers=180)
    assert len({group["name"] for group in truth["groups"]}) == groups
    assert sum(group["workers"] for group in truth["groups"]) == 180
    np.testing.assert_allclose(cosines(group_tastes(truth)), 0.7, atol=1e-4)


@pytest.mark.parametrize("setting", ["groups", "continuous", "unequal", "null"])
@pytest.mark.parametrize("accuracy", [0.6, 0.76, 0.9])
def test_the_true_taste_is_as_right_as_was_asked(setting, accuracy):
    rows, truth = run(setting, accuracy=accuracy)
    assert truth["expected_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert truth["oracle_accuracy"] == pytest.approx(accuracy, abs=4 * 0.5 / np.sqrt(len(rows)))


def test_votes_follow_the_tastes_that_the_truth_tells():
    """Recomputed from the texts alone: the style features of the brief group's choices are shorter, and so on."""
    rows, truth = run(groups=2, comparisons_per_worker=100, accuracy=0.9)
    for k, feature, sign in ((0, "words", -1), (0, "hedging", -1), (1, "lists", 1), (1, "numbers", 1)):
        own = [row for row in rows if truth["workers"][row["worker"]]["group"] == k]
        column = STYLE_NAMES.index(feature)
        of = [style_features([r["prompt"] for r in own], [r[side] for r in own]) for side in ("chosen", "rejected")]
        difference = (of[0] - of[1])[:, column]
        assert sign * difference.mean() > 5 * difference.std() / np.sqrt(len(own))


def test_continuous_tastes_spread_along_three_directions():
    _, truth = run("continuous", workers=300)
    assert truth["groups"] == []
    assert {worker["group"] for worker in truth["workers"].values()} == {-1}
    spread = np.linalg.svd(tastes(truth) - tastes(truth).mean(axis=0), compute_uv=False)
    assert spread[2] > 0.5 * spread[0]
    assert spread[3] < 1e-4 * spread[0]
    assert cosines(tastes(truth)).mean() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(("setting", "groups"), [("careless", 4), ("null-careless", 1)])
def test_three_in_ten_are_careless(setting, groups):
    rows, truth = run(setting)
    reliability = Counter(worker["reliability"] for worker in truth["workers"].values())
    assert reliability == {1.0: 42, CARELESS_RELIABILITY: 18}
    assert len(truth["groups"]) == groups
    assert truth["oracle_accuracy"] < 0.73  # the careful ones are right in 76 %, the others hardly
    assert len(rows) == 60 * 40


@pytest.mark.parametrize("setting", ["null", "null-careless", "null-unequal"])
def test_under_the_null_all_have_one_taste(setting):
    _, truth = run(setting)
    assert len(np.unique(tastes(truth), axis=0)) == 1
    assert [group["name"] for group in truth["groups"]] == ["everybody"]


@pytest.mark.parametrize("setting", ["unequal", "null-unequal"])
def test_unequal_amounts(setting):
    rows, _ = run(setting, workers=300)
    amounts = sorted(Counter(row["worker"] for row in rows).values())
    assert np.mean(amounts) == pytest.approx(40, rel=0.1)
    assert amounts[0] < 10
    assert amounts[-1] > 200


# ----------------------------------------------------------------------------------------------------------------- rows
def test_rows_are_distinct_pairs_a_worker_shared_between_workers_and_shown_in_either_order():
    rows, truth = run(workers=200, comparisons_per_worker=50, prompts=60)
    pairs = [(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in rows]
    judged = Counter(zip((row["worker"] for row in rows), pairs, strict=True))
    assert set(judged.values()) == {1}
    assert len(set(pairs)) < len(pairs) / 5
    assert set(truth["workers"]) == {row["worker"] for row in rows}
    shown = np.mean([row["shown_first"] == "chosen" for row in rows])
    assert shown == pytest.approx(0.5, abs=0.03)
    assert [row["created_at"] for row in rows] == sorted({row["created_at"] for row in rows})


def test_one_seed_one_result(tmp_path):
    settings = SimulationSettings(seed=5, **SMALL)
    for name in ("a", "b"):
        assert write_simulation(settings, tmp_path / name) == {"comparisons": 2400, "workers": 60}
    for file in ("preferences.jsonl", "truth.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"preferences.jsonl", "truth.json"}
    rows = [json.loads(line) for line in (tmp_path / "a" / "preferences.jsonl").read_text().splitlines()]
    assert rows == simulate(settings)[0]
    assert rows != simulate(settings.model_copy(update={"seed": 6}))[0]


@pytest.mark.parametrize(
    "values",
    [
        {"setting": "grups"},
        {"groups": 9},
        {"accuracy": 0.5},
        {"workers": 0},
        {"prompts": MOST_PROMPTS + 1},
        {"prompts": 2, "responses": 2, "comparisons_per_worker": 3},
        {"setting": "planted"},
        {"texts": "comparisons.parquet"},
    ],
)
def test_settings_that_cannot_be(values):
    with pytest.raises(BadConfiguration):
        SimulationSettings.of(**values)


# -------------------------------------------------------------------------------------------------------------- planted
def write_lines(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.jsonl.gz"])
def test_planted_tastes_keep_the_texts_and_who_judged_them(tmp_path, name):
    rows, _ = run()
    write_lines(tmp_path / name, rows)
    planted, truth = run("planted", texts=tmp_path / name, groups=2, accuracy=0.8)

    def incidence(votes):
        return Counter((v["worker"], v["prompt"], frozenset((v["chosen"], v["rejected"]))) for v in votes)

    assert incidence(planted) == incidence(rows)
    assert truth["attributes"] == list(STYLE_NAMES)
    assert [group["workers"] for group in truth["groups"]] == [36, 24]
    assert truth["oracle_accuracy"] == pytest.approx(0.8, abs=0.04)
    # Nothing of the file's own votes is left: shown the other way round, the same people vote the same way.
    write_lines(tmp_path / name, [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    again, turned = run("planted", texts=tmp_path / name, groups=2, accuracy=0.8)
    np.testing.assert_allclose(tastes(turned), tastes(truth), atol=1e-5)
    assert incidence(again) == incidence(rows)


@pytest.mark.parametrize(
    "content",
    ["", "no json\n", "[]\n", '{"worker": "w", "prompt": "p", "chosen": "c"}\n', None],
    ids=["empty", "text", "list", "no rejected", "no file"],
)
def test_texts_that_cannot_be_read_are_told_with_their_place(tmp_path, content):
    path = tmp_path / "votes.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadData, match=re.escape(str(path))):
        run("planted", texts=path)


def test_identical_texts_cannot_be_told_apart(tmp_path):
    row = {"worker": "w", "prompt": "p", "chosen": "same", "rejected": "mesa"}
    write_lines(tmp_path / "votes.jsonl", [row])
    with pytest.raises(BadConfiguration, match="cannot be reached"):
        run("planted", texts=tmp_path / "votes.jsonl")


@pytest.mark.data
def test_planted_on_real_annotators():
    path = DATA / "ukpconvarg1.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    rows, truth = run("planted", texts=path)
    assert len(rows) == 65_340
    assert len(truth["workers"]) == 3_801
    assert truth["oracle_accuracy"] == pytest.approx(0.76, abs=0.01)
