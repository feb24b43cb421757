"""Tables: golden schemas, round trips, and what a reader refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie import contracts
from coterie.errors import BadData

GOLDEN = Path(__file__).parent / "golden" / "contracts.json"
TABLES = [value for value in vars(contracts).values() if isinstance(value, contracts.Table)]


def described():
    tables = {
        t.name: {"version": t.version} | {f.name: f"{f.type}{'?' if f.nullable else ''}" for f in t.fields}
        for t in TABLES
    }
    models = {
        m.__name__: m.model_json_schema()
        for m in (contracts.Manifest, contracts.Metrics, contracts.PredictRequest, contracts.Prediction)
    }
    tensors = {name: list(value) for name, value in vars(contracts).items() if name.endswith("_TENSORS")}
    return {"tables": tables, "models": models, "tensors": tensors}


def test_contracts_are_what_other_programs_rely_on():
    """A change here needs a new schema version, and then: python -m tests.test_contracts writes the file anew."""
    assert described() == json.loads(GOLDEN.read_text())


def embedding_file(path, **changes):
    columns = {
        "worker_id": ["a", "b"],
        "embedding": np.arange(6, dtype=np.float32).reshape(2, 3),
        "reliability": [1.0, 0.5],
        "comparisons": [10, 20],
    }
    contracts.EMBEDDING.write(path, columns | changes, {"model": "m"}, embedding=3)
    return path


def test_a_table_comes_back_as_it_went_in(tmp_path):
    path = embedding_file(tmp_path / "embeddings.parquet")
    table = contracts.EMBEDDING.read(path)
    assert table["worker_id"].to_pylist() == ["a", "b"]
    np.testing.assert_array_equal(contracts.matrix(table["embedding"]), np.arange(6).reshape(2, 3))
    assert contracts.EMBEDDING.metadata(path) == {"model": "m"}


def test_matrix_reads_a_column_of_several_chunks_and_an_empty_one():
    kind = contracts.vector_type(2)
    parts = [pa.array([[1, 2]], kind), pa.array([[3, 4], [5, 6]], kind)]
    np.testing.assert_array_equal(contracts.matrix(pa.chunked_array(parts)), [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(contracts.matrix(parts[1].slice(1)), [[5, 6]])
    assert contracts.matrix(pa.chunked_array([], type=kind)).shape == (0, 2)


@pytest.mark.parametrize(("version", "words"), [("2", "Upgrade coterie"), ("0", "Run the stage that writes it again")])
def test_an_unknown_schema_version_is_refused(tmp_path, version, words):
    path = embedding_file(tmp_path / "embeddings.parquet")
    table = pq.read_table(path)
    meta = table.schema.metadata | {b"coterie.schema_version": version.encode()}
    pq.write_table(table.replace_schema_metadata(meta), path)
    with pytest.raises(BadData, match=words):
        contracts.EMBEDDING.read(path)


def test_another_table_a_foreign_file_and_a_missing_one_are_refused(tmp_path):
    path = embedding_file(tmp_path / "embeddings.parquet")
    with pytest.raises(BadData, match="embedding"):
        contracts.COMPARISON.read(path)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(BadData, match="no table of coterie"):
        contracts.EMBEDDING.read(foreign)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(BadData, match="not a readable Parquet file"):
        contracts.EMBEDDING.read(tmp_path / "text.parquet")
    with pytest.raises(BadData, match="no such file"):
        contracts.EMBEDDING.read(tmp_path / "absent.parquet")


def test_a_column_that_does_not_fit_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "embeddings.parquet"
    with pytest.raises(BadData, match="comparisons"):
        embedding_file(path, comparisons=["many", "few"])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = embedding_file(tmp_path / "embeddings.parquet")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), contracts.EMBEDDING.writer(path, embedding=3):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_content_ids_depend_on_the_borders_of_their_parts():
    assert contracts.content_id("ab", "c") != contracts.content_id("a", "bc")
    assert contracts.content_id("", "x") != contracts.content_id("x", "")
    assert contracts.content_id("prompt", "réponse 🙂") == contracts.content_id("prompt", "réponse 🙂")


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(described(), indent=1, sort_keys=True) + "\n")
