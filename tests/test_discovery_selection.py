"""Choosing among the members, and the two stages from file to file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import adjusted_rand_score

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import (
    ASSIGNMENT,
    COMPARISON,
    DIFFERENCE,
    EMBEDDING,
    LOWRANK_TENSORS,
    MIXTURE_TENSORS,
    Selection,
    matrix,
    table_of,
)
from coterie.discovery import MixtureReward, Votes, cluster, embed, load_votes
from coterie.discovery.run import drift_since
from coterie.discovery.selection import (
    HeldOut,
    select_coteries,
    select_embedding,
    smallest_within_one_error,
    split_groups,
)
from coterie.discovery.stability import half_split_ari
from coterie.errors import BadData
from tests.discovery_data import comparison_files, simulate

FEW = ClusterSettings(max_coteries=4, splits=2)


def test_groups_are_counted_and_stable() -> None:
    people = simulate("groups", workers=200, comparisons=60, features=8, groups=2, seed=5)
    choice = select_coteries(HeldOut(people.train, 2, 0), FEW)
    assert (choice.member, choice.size) == ("mixture", 2)
    by_size = {c.size: c for c in choice.candidates if c.member == "mixture"}
    assert by_size[2].gain > 3 * by_size[2].standard_error > 0
    stable = half_split_ari(people.train, 2, "mixture", choice.heldout, choice.prior, 2, 2, 0)
    assert stable is not None
    assert stable > 0.4


@pytest.mark.parametrize("careless", [0.0, 0.3])
def test_one_taste_needs_neither_coteries_nor_directions(careless: float) -> None:
    people = simulate("null", workers=120, comparisons=50, features=6, careless=careless, seed=0)
    noise = HeldOut(people.train, 2, 0)
    assert select_coteries(noise, FEW).size == 1
    chosen = select_embedding(noise, EmbedSettings(max_rank=2))
    assert (chosen.member, chosen.size) == ("reliability", 0)
    if not careless:
        assert half_split_ari(people.train, 3, "mixture", noise, 100.0, 2, 2, 0) < 0.2


def test_rank_of_continuous_tastes() -> None:
    people = simulate("continuous", workers=250, comparisons=80, features=12, seed=7)
    choice = select_embedding(HeldOut(people.train, 2, 0), EmbedSettings())
    assert (choice.member, choice.size) == ("lowrank", 3)
    assert {c.member for c in choice.candidates} == {"pooled", "reliability", "lowrank", "slopes"}


def test_whole_prompts_are_held_out() -> None:
    people = simulate("groups", workers=30, comparisons=40, features=4, groups=2, prompts=50, seed=8)
    held = HeldOut(people.train, 3, 0)
    assert held.unit == "prompt"
    assert len(held.splits) == 3
    for fit, judge in held.splits:
        assert not set(fit.prompt) & set(judge.prompt)
        assert len(fit) + len(judge) == len(people.train)


def test_pairs_are_held_out_where_there_are_hardly_any_prompts() -> None:
    x = np.repeat(np.arange(1, 9, dtype=float)[:, None] * [1, -2], 3, axis=0)
    x[1::3] *= -1  # the same pair, voted for the other way
    votes = Votes.of(x, np.ones(24), np.arange(24) % 4, np.zeros(24))
    groups, unit = split_groups(votes)
    assert unit == "pair"
    assert len(np.unique(groups)) == 8
    assert HeldOut(votes, 2, 0).unit == "pair"
    one_pair = Votes.of(np.ones((6, 2)), np.ones(6), np.arange(6) % 3, np.zeros(6))
    assert HeldOut(one_pair, 2, 0).unit == "none"
    assert select_coteries(HeldOut(one_pair, 2, 0), ClusterSettings()).size == 1


def test_the_rule_of_one_standard_error() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0.6, 0.1, 200)
    noise = {k: rng.normal(0, 0.05, 200) for k in (2, 3, 4)}
    for value in noise.values():
        value -= value.mean()
    better = {2: reference - 0.03 + noise[2], 3: reference - 0.031 + noise[3], 4: reference - 0.05 + noise[4]}
    assert smallest_within_one_error(reference, {2: better[2], 3: better[3]}, 1) == 2  # 3 is not better by an error
    assert smallest_within_one_error(reference, better, 1) == 4
    hardly = {2: reference - 0.001 + noise[2]}  # a gain below its error of .0035
    assert smallest_within_one_error(reference, hardly, 1) == 1
    assert smallest_within_one_error(reference, {2: reference}, 1) == 1


def _embedded(folder: Path, **arguments) -> dict[str, int]:
    comparisons, vectors, people = comparison_files(folder, **arguments)
    (folder / "embedded").mkdir()
    figures = embed(comparisons, vectors, folder / "embedded", EmbedSettings(components=3, splits=2, max_rank=2))
    assert figures["features"] == 5
    assert figures["rank"] == max(figures["chosen"]["size"], 1)
    return people


def test_from_comparisons_to_coteries(tmp_path: Path) -> None:
    people = _embedded(tmp_path)
    embeddings = EMBEDDING.read(tmp_path / "embedded" / "embeddings.parquet")
    tensors = load_file(tmp_path / "embedded" / "lowrank.safetensors")
    assert set(tensors) == set(LOWRANK_TENSORS)
    assert tensors["basis"].shape == (5, matrix(embeddings["embedding"]).shape[1])

    figures = cluster(tmp_path / "embedded", tmp_path / "clustered", FEW)
    selection = Selection(**figures["selection"])
    assert (selection.verdict, selection.member, selection.coteries) == ("coteries", "mixture", 2)
    assert (selection.ships, selection.insisted) == ("coteries", False)
    assert selection.confidence > 0.9
    assert selection.gain.low > 0
    assert figures["heterogeneity"]["p_value"] < 0.05
    assert sum(c.chosen for c in selection.candidates) == 1
    assert {"pooled", "reliability", "mixture", "lowrank", "slopes"} == {c.member for c in selection.candidates}
    assert figures["stability"]["half_split_ari"] > 0.3

    table = ASSIGNMENT.read(tmp_path / "clustered" / "assignments.parquet")
    names = table["worker_id"].to_pylist()
    posterior, coterie = matrix(table["posterior"]), table["coterie"].to_numpy()
    assert names == sorted(people)
    assert adjusted_rand_score([people[name] for name in names], coterie) > 0.8
    np.testing.assert_array_equal(coterie, posterior.argmax(axis=1))
    assert set(table["mixture_version"].to_pylist()) == {figures["mixture_version"]}
    mixture = MixtureReward.load(tmp_path / "clustered" / "mixture.safetensors")
    assert set(mixture.tensors()) == set(MIXTURE_TENSORS)
    untrained = table["comparisons"].to_numpy() == 0
    assert untrained.sum() == 1
    np.testing.assert_allclose(posterior[untrained][0], mixture.weights_, atol=1e-6)
    votes = load_votes(tmp_path / "embedded" / "differences.parquet", "train")
    np.testing.assert_allclose(posterior, mixture.infer(votes)[0], atol=1e-5)
    np.testing.assert_array_equal(table["comparisons"].to_numpy(), votes.counts)

    again = cluster(tmp_path / "embedded", tmp_path / "again", FEW)
    assert again == figures


def test_posteriors_come_from_training_votes_alone(tmp_path: Path) -> None:
    _embedded(tmp_path, workers=30, comparisons=40)
    path = tmp_path / "embedded" / "differences.parquet"
    settings = ClusterSettings(coteries=2, splits=2)
    before = cluster(tmp_path / "embedded", tmp_path / "before", settings)
    table = DIFFERENCE.read(path)
    x = matrix(table["x"]).copy()
    x[[split != "train" for split in table["split"].to_pylist()]] *= -5
    columns = {name: table[name] for name in table.column_names if name != "x"} | {"x": x}
    changed, metadata = table_of(columns, DIFFERENCE.schema(x=x.shape[1])), DIFFERENCE.metadata(path)
    with DIFFERENCE.writer(path, metadata, x=x.shape[1]) as writer:  # a row group a split, as it was
        for split in ("train", "validation", "test"):
            writer.write_table(changed.filter(pc.equal(changed["split"].cast("string"), split)))
    after = cluster(tmp_path / "embedded", tmp_path / "after", settings)
    assert after["mixture_version"] == before["mixture_version"]


@pytest.mark.parametrize("method", ["kmeans", "ward", "average"])
def test_a_number_of_coteries_can_be_insisted_on(tmp_path: Path, method) -> None:
    _embedded(tmp_path, workers=30, comparisons=40)
    figures = cluster(
        tmp_path / "embedded", tmp_path / "out", ClusterSettings(coteries=3, method=method, splits=2, min_workers=0)
    )
    selection = Selection(**figures["selection"])
    assert (selection.coteries, selection.insisted) == (3, True)
    assert matrix(ASSIGNMENT.read(tmp_path / "out" / "assignments.parquet")["posterior"]).shape == (30, 3)
    assert selection.ships == "coteries"
    with pytest.raises(BadData, match="at least 20 are asked for"):
        cluster(tmp_path / "embedded", tmp_path / "none", ClusterSettings(coteries=3, min_workers=20, replicates=0))
    with pytest.raises(BadData, match="99, but 29 workers"):
        cluster(tmp_path / "embedded", tmp_path / "none", ClusterSettings(coteries=99))


@pytest.mark.parametrize("arguments", [{"workers": 2, "comparisons": 30}, {"workers": 12, "comparisons": 1}])
def test_very_little_data_gives_one_coterie(tmp_path: Path, arguments) -> None:
    _embedded(tmp_path, **arguments)
    figures = cluster(tmp_path / "embedded", tmp_path / "out", ClusterSettings())
    assert figures["selection"]["coteries"] == 1
    assert figures["stability"] == {}
    table = ASSIGNMENT.read(tmp_path / "out" / "assignments.parquet")
    assert np.isfinite(matrix(table["embedding"])).all()
    assert (matrix(table["posterior"]) == 1).all()


def test_coteries_of_the_same_people_keep_their_ids(tmp_path: Path) -> None:
    _embedded(tmp_path)
    quick = FEW.model_copy(update={"replicates": 0})
    first = cluster(tmp_path / "embedded", tmp_path / "first", quick)
    assert first["lineage"]["ids"] == [0, 1]
    (tmp_path / "first" / "metrics.json").write_text(json.dumps(first | {"lineage": {"ids": [7, 3], "next_id": 9}}))
    settings = quick.model_copy(update={"coteries": 3, "min_workers": 0})
    second = cluster(tmp_path / "embedded", tmp_path / "second", settings, tmp_path / "first")
    assert {7, 3} <= set(second["lineage"]["ids"]) <= {7, 3, 9}
    assert second["lineage"]["next_id"] == 10
    for new, old in enumerate(second["lineage"]["matched_from"]):
        assert second["lineage"]["ids"][new] == ([7, 3][old] if old >= 0 else 9)


def test_drift_is_told_by_the_features_and_the_mixture_of_then(tmp_path: Path) -> None:
    _embedded(tmp_path)
    cluster(tmp_path / "embedded", tmp_path / "clustered", FEW.model_copy(update={"replicates": 0}))
    table, changed = COMPARISON.read(tmp_path / "comparisons.parquet"), {}
    test = pc.equal(table["split"].cast("string"), "test")
    for name, (left, right) in {"same": ("chosen", "rejected"), "turned": ("rejected", "chosen")}.items():
        columns = {c: table.filter(test)[c] for c in table.column_names}
        swapped = {
            f"{one}{end}": columns[f"{other}{end}"]
            for end in ("", "_id")
            for one, other in (("chosen", left), ("rejected", right))
        }
        COMPARISON.write(tmp_path / f"{name}.parquet", columns | swapped)
        places = (
            tmp_path / "embedded",
            tmp_path / "clustered",
            tmp_path / f"{name}.parquet",
            tmp_path / "vectors.parquet",
        )
        changed[name] = drift_since(*places, tmp_path)
    assert not changed["same"]["drifted"]
    assert changed["same"]["surprise"]["value"] == pytest.approx(0, abs=1e-6)  # the very votes that it was judged on
    assert changed["turned"]["drifted"]
    assert changed["turned"]["surprise"]["low"] > 0
    assert "has changed" in changed["turned"]["reason"]
