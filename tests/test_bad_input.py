"""Degenerate input through the stages ingest to report: a verdict, or an error that names the remedy; never a NaN."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning

from coterie import stages
from coterie.assess import assess, assessment_markdown
from coterie.config import (
    ClusterSettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    RewardSettings,
)
from coterie.contracts import matrix
from coterie.discovery import LowRankReward, selection
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.votes import Votes
from coterie.errors import CoterieError
from tests.staged import DIMENSION, WORDS, TextEncoder

QUICK = {
    "embed": {"max_rank": 2},
    "cluster": {"max_coteries": 3, "replicates": 29, "splits": 2},
    "evaluate": {"replicates": 200},
}


class ConstantEncoder(TextEncoder):
    """The same vector of every text."""

    name = "constant"

    def encode(self, texts):
        return np.ones((len(texts), DIMENSION), np.float32)


@pytest.fixture(autouse=True)
def cheap(monkeypatch, tmp_path):
    monkeypatch.setenv("COTERIE_PSEUDONYM_KEY", "a key of the tests, long enough")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COTERIE_STAGE_CACHE", raising=False)
    monkeypatch.setattr("coterie.encoding.load_encoder", lambda settings: TextEncoder())


# ----------------------------------------------------------------------------------------------------------------- input
def texts(number, seed=0):
    rng, found = np.random.default_rng(seed), set()
    while len(found) < number:
        found.add(" ".join(rng.choice(WORDS, rng.integers(2, 25))).capitalize() + ".")
    return [str(text) for text in rng.permutation(sorted(found))]


def votes(workers=20, each=16, prompts=20, responses=4, prefers=None, place=None, **columns):
    """Rows of votes on random pairs.

    Args:
        each: votes of a worker, or of each of them.
        prefers: whether a worker prefers the first of two texts; None: at random.
        place: from a worker and a random number to the prompt.
        columns: further columns, from a worker, the number of their vote, and the prompt.
    """
    rng, pool, rows = np.random.default_rng(1), texts(prompts * responses), []
    for worker in range(workers):
        for vote in range(each if isinstance(each, int) else each[worker]):
            prompt = int(rng.integers(prompts))
            prompt = prompt if place is None else place(worker, prompt)
            one, other = (pool[prompt * responses + i] for i in rng.choice(responses, 2, replace=False))
            if prefers is not None and not prefers(worker, one, other):
                one, other = other, one
            row = {"worker": f"w{worker}", "prompt": f"Question {prompt}?", "chosen": one, "rejected": other}
            rows.append(row | {name: column(worker, vote, prompt) for name, column in columns.items()})
    return rows


def longer(_, one, other):
    return len(one) >= len(other)


def of_two_minds(worker, one, other):
    return longer(worker, one, other) == (worker % 2 == 0)


def tie(*_):
    return 0.5


def third(_, __, prompt):
    return ("train", "validation", "test")[prompt % 3]


def both_ways(rows):
    return rows + [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def write(rows, folder):
    path = folder / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------------ the stages
def run(source, out, **settings):
    """All stages up to the report, and the assessment, quickly; a numerical warning is an error."""
    said = {name: QUICK.get(name, {}) | settings.get(name, {}) for name in ("ingest", "embed", "cluster", "evaluate")}
    with warnings.catch_warnings():
        for kind in (RuntimeWarning, ConvergenceWarning):
            warnings.simplefilter("error", kind)
        folders = {name: out / name for name in ("ingest", "encode", "embed", "cluster", "evaluate")}
        ingested = stages.ingest(folders["ingest"], IngestSettings(source=[str(source)], **said["ingest"]))
        stages.encode(folders["ingest"], folders["encode"], EncodeSettings())
        stages.embed(folders["ingest"], folders["encode"], folders["embed"], EmbedSettings(**said["embed"]))
        discovered = folders["embed"], folders["cluster"]
        clustered = stages.cluster(*discovered, ClusterSettings(**said["cluster"]))
        assessment = assess(ingested, clustered, folders["embed"] / stages.DIFFERENCES, 0.005)
        rewards = [out / "rewards" / "global"]
        stages.reward(*discovered, rewards[0], RewardSettings())
        for audience in stages.audiences(clustered):
            rewards.append(out / "rewards" / stages.reward_name(audience))
            stages.reward(*discovered, rewards[-1], RewardSettings(), audience, rewards[0])
        stages.evaluate(*discovered, rewards, folders["evaluate"], EvaluateSettings(**said["evaluate"]))
        made = folders["ingest"], folders["encode"], *discovered, rewards, folders["evaluate"]
        metrics = stages.report(*made, out / "report")
    return SimpleNamespace(metrics=metrics, clustered=clustered, assessment=assessment)


def assert_finite(out):
    """No number in any table, tensor or page is NaN or infinite; in metrics.json none can be."""
    for path in out.rglob("*.parquet"):
        table = pq.read_table(path)
        for name in table.column_names:
            kind = table[name].type
            if pa.types.is_floating(kind):
                assert np.isfinite(table[name].drop_null().to_numpy()).all(), (path, name)
            elif pa.types.is_fixed_size_list(kind):
                assert np.isfinite(matrix(table[name])).all(), (path, name)
    for path in out.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert np.isfinite(tensor).all(), (path, name)
    page = (out / "report" / "report.html").read_text()
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("rows", "settings", "verdicts"),
    [
        pytest.param(votes(place=lambda worker, prompt: worker), {}, ("one-taste",), id="prompts of their own"),
        pytest.param(
            votes(prefers=of_two_minds, place=lambda worker, prompt: prompt // 2 + 10 * (worker % 2)),
            {},
            ("one-taste", "continuous", "coteries"),
            id="two islands",
        ),
        pytest.param(votes(label=tie), {}, ("one-taste",), id="all tied"),
        pytest.param(
            votes(label=lambda worker, vote, _: 0.5 if worker or vote else 1), {}, ("one-taste",), id="one not tied"
        ),
        pytest.param(both_ways(votes(each=8)), {}, ("one-taste",), id="all contradict themselves"),
        pytest.param(votes(prompts=3, responses=20), {}, ("one-taste",), id="three prompts"),
        pytest.param(votes(prefers=longer), {}, ("one-taste",), id="separable, one taste"),
        pytest.param(votes(24, 40, prefers=of_two_minds), {}, ("coteries", "continuous"), id="separable, two tastes"),
        pytest.param(
            votes(24, 40, prefers=of_two_minds),
            {"cluster": {"min_workers": 13}},
            ("one-taste", "continuous"),
            id="no coterie of the minimum size",
        ),
        pytest.param(votes(1, 40), {}, ("one-taste",), id="one worker"),
        pytest.param(votes(2, 40, prefers=of_two_minds), {}, ("one-taste", "continuous"), id="two workers"),
        pytest.param(votes(30, [200] + [1] * 29), {}, ("one-taste",), id="one worker with nearly all votes"),
        pytest.param(
            votes(30, place=lambda worker, prompt: prompt // 3 * 3 % 18 + worker % 3, split=third),
            {"ingest": {"columns": {"split": "split"}}},
            ("one-taste",),
            id="nobody in two splits",
        ),
    ],
)
def test_a_verdict_without_nan(rows, settings, verdicts, tmp_path):
    out = tmp_path / "run"
    done = run(write(rows, tmp_path), out, **settings)
    assert done.metrics["selection"]["verdict"] in verdicts
    assert "nan" not in assessment_markdown(done.assessment)
    assert_finite(out)


def test_the_same_vector_for_every_text_leaves_the_style(tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.encoding.load_encoder", lambda settings: ConstantEncoder())
    out = tmp_path / "run"
    done = run(write(votes(prefers=longer), tmp_path), out)
    assert done.metrics["selection"]["verdict"] == "one-taste"
    assert done.metrics["heldout"]["seen"]["accuracy"] > 0.9
    assert_finite(out)


def test_ties_alone_are_no_evidence(tmp_path):
    done = run(write(votes(label=tie), tmp_path), tmp_path / "run")
    assert done.assessment.finding == "too-little"
    assert "preferred one response to another" in done.assessment.recommendation


@pytest.mark.parametrize("method", ["mixture", "kmeans", "ward", "average"])
def test_coteries_that_hardly_anybody_is_in(method, tmp_path):
    out, insisted = tmp_path / "run", {"coteries": 3, "min_workers": 0, "method": method}
    try:
        done = run(write(votes(label=tie), tmp_path), out, cluster=insisted)
    except CoterieError as error:
        assert "fewer coteries" in str(error)  # noqa: PT017
    else:
        assert done.metrics["selection"]["coteries"] == 3
        assert_finite(out)


@pytest.mark.parametrize(
    ("rows", "settings", "remedy"),
    [
        pytest.param(votes(prompts=1, responses=40), {}, "ingest three prompts or more", id="one prompt"),
        pytest.param(votes(1, 1, 1), {}, "ingest three prompts or more", id="one comparison"),
        pytest.param(
            votes(split=lambda *_: "train"),
            {"ingest": {"columns": {"split": "split"}}},
            "without splits of the source's own",
            id="nothing held out by the source",
        ),
        pytest.param(
            votes(), {"cluster": {"coteries": 500}}, "ask for 1 to 20, or auto", id="more coteries than workers"
        ),
        pytest.param(
            votes(24, 40, prefers=of_two_minds),
            {"cluster": {"coteries": 2, "min_workers": 13}},
            "ask for fewer coteries, or lower cluster.min_workers",
            id="a coterie below the minimum size",
        ),
        pytest.param(votes(), {"embed": {"rank": 500}}, "ask for 1 to 20", id="more directions than features"),
    ],
)
def test_an_error_that_names_the_remedy(rows, settings, remedy, tmp_path):
    with pytest.raises(CoterieError, match=remedy):
        run(write(rows, tmp_path), tmp_path / "run", **settings)


def test_constant_features_are_an_error_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.encoding.load_encoder", lambda settings: ConstantEncoder())
    with pytest.raises(CoterieError, match="same features; use another encoder"):
        run(write(votes(), tmp_path), tmp_path / "run", embed={"style": False})


# ------------------------------------------------------------------------------------------------- votes without any noise
def pairs(tastes, each, seed, strength):
    """Votes of workers of these tastes [workers, features]; the stronger, the less noise is in them."""
    rng = np.random.default_rng(seed)
    worker = np.repeat(np.arange(len(tastes)), each)
    h = rng.standard_normal((40, 4, tastes.shape[1]))
    prompt, one, step = (rng.integers(low, high, len(worker)) for low, high in ((0, 40), (0, 4), (1, 4)))
    x = h[prompt, one] - h[prompt, (one + step) % 4]
    x[rng.random(len(x)) > expit(strength * (x * tastes[worker]).sum(axis=1))] *= -1
    return Votes.of(x, np.ones(len(x)), worker, prompt)


@pytest.mark.parametrize("seed", range(3))
def test_a_freer_member_is_no_better_where_one_reward_separates_the_votes(seed):
    heldout = selection.HeldOut(pairs(np.tile([1.0, 0, 0, 0], (24, 1)), 60, seed, strength=1e6), 3, 0)
    slopes = heldout.fit(lambda train, base: SlopesReward(0.03, base=base).fit(train))
    gain, error = selection.paired(heldout.losses(heldout.bases), heldout.losses(slopes))
    assert not selection.beats(gain, error)


@pytest.mark.parametrize("strength", [1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_people_who_want_the_opposite_do_not_pass_for_careless(strength, seed):
    opposite = np.where(np.arange(60) % 2 == 0, 1.0, -1.0)
    heldout = selection.HeldOut(pairs(np.outer(opposite, [1, 0, 0, 0, 0, 0]), 40, seed, strength), 2, 0)
    lowrank = heldout.fit(lambda train, base: LowRankReward(1, base.precision, 30.0, base=base).fit(train))
    gain, error = selection.paired(heldout.losses(heldout.bases), heldout.losses(lowrank))
    assert gain > max(0.03, 3 * error)


# --------------------------------------------------------------------------------------------------- one vote of very many
def test_very_many_workers_with_one_vote_each(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "_MOST_SAMPLED", 1000)
    workers, prompts, responses, rng = 20_000, 50, 4, np.random.default_rng(0)
    pool, prompt = np.array(texts(prompts * responses)), rng.integers(prompts, size=workers)
    one = rng.integers(responses, size=workers)
    other = (one + rng.integers(1, responses, workers)) % responses
    columns = {
        "worker": [f"w{worker}" for worker in range(workers)],
        "prompt": [f"Question {number}?" for number in prompt],
        "chosen": pool[prompt * responses + one],
        "rejected": pool[prompt * responses + other],
    }
    pq.write_table(pa.table(columns), tmp_path / "votes.parquet")
    out = tmp_path / "run"
    done = run(tmp_path / "votes.parquet", out, cluster={"max_coteries": 2})
    assert done.metrics["selection"]["verdict"] == "one-taste"
    assert done.metrics["data"]["workers"] == workers
    assert_finite(out)


def test_choices_are_made_on_a_sample_of_the_workers_however_few_votes_each_has(monkeypatch):
    monkeypatch.setattr(selection, "_MOST_SAMPLED", 400)
    few, many = (
        Votes.of(np.ones((len(worker), 2)), np.ones(len(worker)), worker)
        for worker in (np.arange(5000), np.repeat(np.arange(400), 20))
    )
    assert selection.sample_of(few, 0).n_workers == 400
    assert selection.sample_of(many, 0) is many
