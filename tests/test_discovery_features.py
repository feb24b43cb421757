"""Features, differences and votes: what the estimators see."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.config import EmbedSettings
from coterie.contracts import COMPARISON, DIFFERENCE, VECTOR, matrix
from coterie.discovery.differences import differences
from coterie.discovery.features import FeatureMap, fit_features
from coterie.discovery.votes import Votes, load_votes
from coterie.errors import BadData
from tests.discovery_data import comparison_files


def fitted(n: int = 300, e: int = 6, s: int = 3, components: int = 4, use_style: bool = True, seed: int = 0):
    rng = np.random.default_rng(seed)
    topic = np.repeat(rng.standard_normal((n // 2, e)) * 50, 2, axis=0)
    vectors = (topic + rng.standard_normal((n, e)) * np.arange(1, e + 1)).astype(np.float32)
    style = (rng.standard_normal((n, s)) * 7 + 100).astype(np.float32)
    pairs = np.arange(n).reshape(-1, 2)
    names = [f"style-{i}" for i in range(s)]
    return FeatureMap.fit(vectors, style, pairs, components, use_style, names), vectors, style, pairs


def test_differences_have_unit_mean_square_and_topics_take_no_component() -> None:
    features, vectors, style, pairs = fitted()
    h = features.transform(vectors, style)
    x = h[pairs[:, 0]] - h[pairs[:, 1]]
    assert h.dtype == np.float32
    assert (x[:, :4] ** 2).mean() == pytest.approx(1, rel=1e-3)
    assert (x[:, 4:] ** 2).mean(axis=0) == pytest.approx(np.ones(3), rel=1e-3)
    covariance = x[:, :4].T @ x[:, :4] / len(x)
    assert covariance == pytest.approx(np.diag(np.diag(covariance)), abs=1e-3)
    assert features.names == ("pc1", "pc2", "pc3", "pc4", "style-0", "style-1", "style-2")


def test_style_can_be_left_out_and_a_constant_column_is_harmless() -> None:
    features, vectors, style, pairs = fitted(use_style=False)
    assert features.transform(vectors, style).shape == (300, 4)
    vectors[:, 0], style[:, 1] = 3.0, -1.0
    again = FeatureMap.fit(vectors, style, pairs, 10, True)
    h = again.transform(vectors, style)
    assert h.shape == (300, 5 + 3)  # the constant column spans no component
    assert np.isfinite(h).all()
    assert np.ptp(h[:, 6]) == 0


def test_a_feature_map_survives_its_file(tmp_path: Path) -> None:
    features, vectors, style, _ = fitted()
    features.save(tmp_path / "features.safetensors")
    again = FeatureMap.load(tmp_path / "features.safetensors")
    assert again.names == features.names
    np.testing.assert_array_equal(again.transform(vectors, style), features.transform(vectors, style))
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BadData, match="coterie embed"):
        FeatureMap.load(tmp_path / "broken.safetensors")


def test_vectors_that_cannot_be_used_are_refused_in_words() -> None:
    features, vectors, style, pairs = fitted()
    with pytest.raises(BadData, match="encode with the encoder"):
        features.transform(vectors[:, :3], style)
    with pytest.raises(BadData, match="same features"):
        FeatureMap.fit(np.ones((4, 3), np.float32), np.ones((4, 2), np.float32), pairs[:2], 2, True)
    vectors[5, 2] = np.nan
    with pytest.raises(BadData, match="not finite"):
        FeatureMap.fit(vectors, style, pairs, 2, True)
    with pytest.raises(BadData, match="no training pair"):
        FeatureMap.fit(vectors, style, pairs[:0], 2, True)


def test_differences_are_chosen_minus_rejected_with_sorted_workers(tmp_path: Path) -> None:
    comparisons, vectors, _ = comparison_files(tmp_path, workers=5, comparisons=12)
    features = fit_features(comparisons, vectors, EmbedSettings(components=3))
    workers = differences(comparisons, vectors, features, tmp_path / "differences.parquet")
    source, table = COMPARISON.read(comparisons), DIFFERENCE.read(tmp_path / "differences.parquet")
    assert workers == sorted(set(source["worker_id"].to_pylist()))
    order = source.sort_by([("comparison_id", "ascending")]), table.sort_by([("comparison_id", "ascending")])
    source, table = (part.combine_chunks() for part in order)
    assert source["comparison_id"] == table["comparison_id"]
    assert [workers[i] for i in table["worker"].to_pylist()] == source["worker_id"].to_pylist()
    assert source["split"].cast("string") == table["split"].cast("string")
    encoded = VECTOR.read(vectors)
    h = features.transform(matrix(encoded["vector"]), matrix(encoded["style"]))
    row = {name: i for i, name in enumerate(encoded["response_id"].to_pylist())}
    chosen, rejected = (h[[row[i] for i in source[side].to_pylist()]] for side in ("chosen_id", "rejected_id"))
    np.testing.assert_allclose(matrix(table["x"]), chosen - rejected, atol=1e-6)


def test_only_training_pairs_decide_the_features(tmp_path: Path) -> None:
    comparisons, vectors, _ = comparison_files(tmp_path, workers=5, comparisons=12)
    before = fit_features(comparisons, vectors, EmbedSettings(components=3))
    source, encoded = COMPARISON.read(comparisons), VECTOR.read(vectors)
    held_out = {
        response
        for split, *pair in zip(*(source[c].to_pylist() for c in ("split", "chosen_id", "rejected_id")), strict=True)
        for response in pair
        if split != "train"
    }
    wild = matrix(encoded["vector"]).copy()
    wild[[i in held_out for i in encoded["response_id"].to_pylist()]] *= 1000
    columns = {"response_id": encoded["response_id"], "vector": wild, "style": matrix(encoded["style"])}
    VECTOR.write(vectors, columns, VECTOR.metadata(vectors), vector=wild.shape[1], style=2)
    after = fit_features(comparisons, vectors, EmbedSettings(components=3))
    np.testing.assert_array_equal(before.components, after.components)


def test_a_response_without_a_vector_is_named(tmp_path: Path) -> None:
    comparisons, vectors, _ = comparison_files(tmp_path, workers=5, comparisons=60)
    features = fit_features(comparisons, vectors, EmbedSettings(components=3))
    table = VECTOR.read(vectors).slice(0, 4 * 39)  # without the last training prompt's
    columns = {"response_id": table["response_id"], "vector": matrix(table["vector"]), "style": matrix(table["style"])}
    VECTOR.write(vectors, columns, {"style_names": json.dumps(["a", "b"])}, vector=5, style=2)
    with pytest.raises(BadData, match="no vector for response"):
        differences(comparisons, vectors, features, tmp_path / "differences.parquet")
    assert not (tmp_path / "differences.parquet").exists()
    with pytest.raises(BadData, match="no vector for response"):
        fit_features(comparisons, vectors, EmbedSettings(components=3))


def test_votes_of_a_split_are_read_in_worker_order(tmp_path: Path) -> None:
    comparisons, vectors, _ = comparison_files(tmp_path, workers=5, comparisons=12)
    features = fit_features(comparisons, vectors, EmbedSettings(components=3))
    differences(comparisons, vectors, features, tmp_path / "d.parquet")
    table = DIFFERENCE.read(tmp_path / "d.parquet")
    is_test = np.array([split == "test" for split in table["split"].to_pylist()])
    order = np.argsort(table["worker"].to_numpy()[is_test], kind="stable")
    votes = load_votes(tmp_path / "d.parquet", "test")
    np.testing.assert_array_equal(votes.x, matrix(table["x"])[is_test][order])
    np.testing.assert_array_equal(votes.prompt, table["prompt"].to_numpy()[is_test][order])
    assert votes.n_workers == 5
    assert sum(len(load_votes(tmp_path / "d.parquet", split)) for split in ("train", "validation", "test")) == len(
        table
    )
    with pytest.raises(BadData, match="no comparison in split nowhere"):
        load_votes(tmp_path / "d.parquet", "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.full((3, 2), np.nan)}, "not finite"),
        ({"x": np.ones((2, 2))}, "do not fit together"),
        ({"y": [1, 2, 1]}, "labels"),
        ({"worker": [0, -1, 1]}, "worker numbers"),
        ({"n_workers": 1}, "worker numbers"),
        ({"x": np.ones((0, 2)), "y": [], "worker": []}, "no comparisons"),
    ],
)
def test_votes_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    arguments = {"x": np.ones((3, 2)), "y": [1, 0.5, 1], "worker": [0, 1, 1]} | change
    with pytest.raises(BadData, match=message):
        Votes.of(**arguments)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 3))
def test_sums_by_worker_agree_with_a_loop(worker: list[int], extra: int) -> None:
    rng = np.random.default_rng(len(worker))
    votes = Votes.of(rng.standard_normal((len(worker), 3)), np.ones(len(worker)), worker, None, max(worker) + 1 + extra)
    values = rng.standard_normal((2, len(worker))).astype(np.float32)
    for i in range(votes.n_workers):
        mine = votes.worker == i
        np.testing.assert_allclose(votes.sum_by_worker(values)[:, i], values[:, mine].sum(axis=1), atol=1e-5)
        expected = (values[0, mine, None] * votes.x[mine]).sum(axis=0)
        np.testing.assert_allclose(votes.gradients_by_worker(values[0])[i], expected, atol=1e-5)
