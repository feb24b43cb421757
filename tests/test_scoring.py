"""Scores from a bundle: the average over the posterior, the gate, the golden scores, one call of the encoder."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from staged import WORDS, TextEncoder, everything

from coterie.answers import Asked, answer
from coterie.bundle import Bundle
from coterie.contracts import MIXTURE_FILE, Example, Route, RoutedInstance
from coterie.discovery import MixtureReward
from coterie.errors import BadBundle, BadData
from coterie.person import read_examples
from coterie.scoring import Question, Scorer, average, check_golden, leading_coteries

PROMPT = "Question 1?"
RESPONSES = ["River.", "Bread lamp walk early warm stone garden winter tea map bell river bread lamp.", "Warm stone."]


def test_the_leading_coteries_reach_the_mass_and_are_renormalised():
    posterior = np.array([[0.6, 0.3, 0.08, 0.02], [0.96, 0.02, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    expected = np.array([[0.6 / 0.98, 0.3 / 0.98, 0.08 / 0.98, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(leading_coteries(posterior), expected)
    scores = np.array([[1.0, 2.0, 3.0, 100.0]] * 3)
    np.testing.assert_allclose(average(scores, posterior), [(0.6 + 0.6 + 0.24) / 0.98, 1.0, 26.5])


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("run"))


@pytest.fixture
def scorer(staged):
    return Scorer(Bundle.load(staged.bundle), TextEncoder())


def test_scores_are_the_posteriors_average_of_the_coteries_own(scorer):
    made = scorer.score(PROMPT, RESPONSES, [0.7, 0.3])
    h = scorer.features([PROMPT] * 3, RESPONSES)
    own = [scorer.bundle.heads[f"coterie-{k}"].score(h) for k in range(2)]
    np.testing.assert_allclose(made.by_coterie, np.stack(own, axis=1))
    np.testing.assert_allclose(made.scores, 0.7 * own[0] + 0.3 * own[1])
    np.testing.assert_allclose(made.by_global, scorer.bundle.heads["global"].score(h))
    assert np.argmax(scorer.score(PROMPT, RESPONSES, [1.0, 0.0]).scores) == 1  # coterie 0 was made to like long answers
    assert np.argmax(scorer.score(PROMPT, RESPONSES, [0.0, 1.0]).scores) != 1


def test_a_stranger_gets_the_global_reward(scorer):
    made = scorer.score(PROMPT, RESPONSES)
    np.testing.assert_array_equal(made.scores, made.by_global)


def test_a_new_person_is_placed_by_their_comparisons(scorer):
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(WORDS, n)).capitalize() + "." for n in (3, 20)] for _ in range(20)]
    long = [Example(prompt=PROMPT, chosen=many, rejected=few) for few, many in texts]
    short = [Example(prompt=PROMPT, chosen=few, rejected=many) for few, many in texts]
    ties = [example.model_copy(update={"tie": True}) for example in long]
    # Coterie 0 was made to like long answers, coterie 1 short ones.
    assert scorer.place(long).posterior[0] > 0.9
    assert scorer.place(short).posterior[1] > 0.9
    assert scorer.place(long[:1]).posterior[0] < scorer.place(long).posterior[0]
    assert max(scorer.place(ties).posterior) < 0.9
    taken = scorer.place(short)
    assert (taken.source, taken.coterie, len(taken.embedding)) == ("comparisons", 1, scorer.bundle.manifest.rank)
    [made] = answer(scorer, [Asked(RoutedInstance(prompt=PROMPT, responses=RESPONSES, routes=[taken]))])
    assert (made.source, made.coterie) == ("comparisons", 1)
    np.testing.assert_allclose(made.scores, scorer.score(PROMPT, RESPONSES, taken.posterior).scores)


def test_the_bundles_temperature_cools_what_comparisons_tell(scorer):
    example = [Example(prompt=PROMPT, chosen=RESPONSES[1], rejected=RESPONSES[0])]
    as_it_is = scorer.place(example).posterior[0]
    cooler = replace(scorer.bundle, manifest=scorer.bundle.manifest.model_copy(update={"temperature": 50.0}))
    weight = MixtureReward.load(scorer.bundle.path / MIXTURE_FILE).weights_[0]
    assert abs(Scorer(cooler, TextEncoder()).place(example).posterior[0] - weight) < abs(as_it_is - weight) / 5


def test_nobody_is_placed_by_nothing(scorer):
    assert scorer.place([]).reason == "no-comparisons"


def test_examples_that_are_no_comparisons_are_named(tmp_path):
    file = tmp_path / "examples.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n\n{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(BadData, match=r"line 3: rejected: field required"):
        read_examples(file)
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "tie": true}\n')
    assert read_examples(file) == [Example(prompt="p", chosen="a", rejected="b", tie=True)]
    with pytest.raises(BadData, match="not readable"):
        read_examples(tmp_path / "absent.jsonl")


def test_a_coterie_whose_gate_is_shut_serves_the_global_reward(scorer):
    manifest = scorer.bundle.manifest
    gates = [gate.model_copy(update={"serves": "global"}) if gate.coterie == 1 else gate for gate in manifest.gates]
    shut = replace(scorer.bundle, manifest=manifest.model_copy(update={"gates": gates[::-1]}))
    made = Scorer(shut, TextEncoder()).score(PROMPT, RESPONSES, [0.5, 0.5])
    np.testing.assert_array_equal(made.by_coterie[:, 1], made.by_global)
    np.testing.assert_allclose(made.scores, (made.by_coterie[:, 0] + made.by_global) / 2)


def test_many_instances_are_one_call_of_the_encoder_and_the_same_scores(scorer):
    instances = [
        Question(PROMPT, RESPONSES, [0.9, 0.1]),
        Question("Question 2?", RESPONSES[:1]),
        Question(PROMPT, RESPONSES[1:], [0.0, 1.0]),
    ]
    before = scorer._encoder.calls
    many = scorer.score_many(instances)
    assert scorer._encoder.calls == before + 1
    for instance, made in zip(instances, many, strict=True):
        np.testing.assert_allclose(made.scores, scorer.score(*instance[:4]).scores, atol=1e-6)
        assert len(made.scores) == len(instance[1])


def test_a_posterior_of_another_mixture_is_refused(scorer):
    with pytest.raises(BadBundle, match="posterior over 3 coteries for a bundle of 2"):
        scorer.score(PROMPT, RESPONSES, [0.2, 0.3, 0.5])


def test_another_encoder_is_refused(staged):
    encoder = TextEncoder()
    encoder.revision = "2"
    with pytest.raises(BadBundle, match="made with encoder drawn at 1, not drawn at 2"):
        Scorer(Bundle.load(staged.bundle), encoder)


def test_golden_scores_come_out_again_and_an_encoder_that_is_off_is_found(staged, scorer):
    check_golden(scorer)
    with pytest.raises(BadBundle, match=r"golden score .* is off by"):
        check_golden(Scorer(scorer.bundle, TextEncoder(off=0.01)))
    check_golden(Scorer(scorer.bundle, TextEncoder(off=1e-5)))


def test_golden_scores_are_checked_for_every_coterie(staged, tmp_path):
    folder = shutil.copytree(staged.bundle, tmp_path / "bundle")
    golden = json.loads((folder / "golden.json").read_text())
    golden[-1]["coteries"][0][1] += 0.01
    (folder / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(BadBundle, match="golden score \\(coteries\\)"):
        check_golden(Scorer(Bundle.load(folder, verify=False), TextEncoder()))


@pytest.fixture(scope="module")
def personal(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("personal"), ships="embedding")


def test_where_that_ships_a_person_is_scored_by_their_embedding(personal):
    scorer = Scorer(Bundle.load(personal.bundle), TextEncoder())
    assert scorer.bundle.manifest.ships == "embedding"
    long, short = (scorer.score(PROMPT, RESPONSES, [0.5, 0.5], [place, 0.0]).scores for place in (-1.5, 1.5))
    assert np.argmax(long) == 1
    assert np.argmax(short) != 1
    np.testing.assert_array_equal(scorer.score(PROMPT, RESPONSES).scores, scorer.score(PROMPT, RESPONSES).by_global)
    with pytest.raises(BadBundle, match="an embedding of 3 numbers for a bundle of rank 2"):
        scorer.score(PROMPT, RESPONSES, [0.5, 0.5], [0.0, 0.0, 0.0])


def test_a_route_without_a_usable_embedding_falls_back(personal):
    scorer = Scorer(Bundle.load(personal.bundle), TextEncoder())
    version = scorer.bundle.manifest.mixture_version
    for embedding, source in (
        ([0.1, 0.2], "profile"),
        ([0.1], "global"),
        ([0.1, float("nan")], "global"),
        (None, "global"),
    ):
        route = Route(source="profile", coterie=0, posterior=[0.5, 0.5], embedding=embedding, mixture_version=version)
        [made] = answer(scorer, [Asked(RoutedInstance(prompt=PROMPT, responses=RESPONSES, routes=[route]))])
        assert made.source == source


def test_golden_scores_are_checked_for_persons_too(personal, tmp_path):
    check_golden(Scorer(Bundle.load(personal.bundle), TextEncoder()))
    folder = shutil.copytree(personal.bundle, tmp_path / "bundle")
    golden = json.loads((folder / "golden.json").read_text())
    golden[0]["personal"][1] += 0.01
    (folder / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(BadBundle, match="golden score \\(personal\\)"):
        check_golden(Scorer(Bundle.load(folder, verify=False), TextEncoder()))
