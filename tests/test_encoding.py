"""The encode stage and its cache, which survives a kill: one vector for every unique response, computed once."""

import json
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from coterie.backbones import cache_folder
from coterie.config import EncodeSettings
from coterie.contracts import COMPARISON, VECTOR, content_id, matrix
from coterie.encoding import STYLE_NAMES, encode, style_features
from coterie.encoding.cache import Cached, VectorCache
from coterie.errors import BackendUnavailable, BadData, RunFailed

DIMENSION = 5


class Letters:
    """An encoder of our own: how often the first letters occur. It remembers what it was asked to encode."""

    name, revision, dimension, max_tokens, precision = "letters", "1", DIMENSION, 20, "float32"

    def __init__(self):
        self.seen = []

    def text(self, prompt, response):
        return response

    def encode(self, texts):
        self.seen += texts
        return np.array([[text.count(letter) for letter in "abcde"] for text in texts], dtype=np.float32)

    def cut(self, texts):
        return np.array([len(text) > self.max_tokens for text in texts])


def write_comparisons(path, pairs):
    """pairs: (prompt, chosen, rejected)."""
    n = len(pairs)
    prompts, chosen, rejected = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [], [])
    sides = {"chosen": chosen, "rejected": rejected}
    ids = {f"{k}_id": [content_id(p, t) for p, t in zip(prompts, v, strict=True)] for k, v in sides.items()}
    known = {"prompt": prompts, "label": [1.0] * n, "split": ["train"] * n, **sides, **ids}
    nothing = ("ranking_id", "shown_first", "confidence", "created_at")
    columns = {
        field.name: known.get(field.name, [None] * n if field.name in nothing else [str(i) for i in range(n)])
        for field in COMPARISON.fields
    }
    COMPARISON.write(path, columns)
    return path


def read_vectors(folder):
    table = VECTOR.read(folder / "vectors.parquet")
    return table["response_id"].to_pylist(), matrix(table["vector"]), matrix(table["style"])


# -------------------------------------------------------------------------------------------------------------- encode
PAIRS = [
    ("p", "abc", "aa"),
    ("q", "abc", "b" * 30),
    ("p", "aa", "abc"),
    ("r", "🙂" * 3, "e" * 100_000),
]


def test_one_vector_for_each_response_in_the_order_of_the_ids(tmp_path):
    comparisons = write_comparisons(tmp_path / "comparisons.parquet", PAIRS)
    encoder = Letters()
    metrics = encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", encoder)
    texts = {("p", "abc"), ("p", "aa"), ("q", "abc"), ("q", "b" * 30), ("r", "🙂" * 3), ("r", "e" * 100_000)}
    expected = {content_id(*text): text for text in texts}
    names, vectors, style = read_vectors(tmp_path)
    assert names == sorted(expected)
    np.testing.assert_array_equal(vectors, Letters().encode([expected[name][1] for name in names]))
    np.testing.assert_array_equal(style, style_features(*zip(*(expected[name] for name in names), strict=True)))
    assert sorted(encoder.seen) == sorted({response for _, response in texts})  # abc once, for p and q
    assert metrics["texts"] == 6
    assert metrics["truncated"] == 2
    assert metrics["volatile"] == {"encoded": 5, "from_cache": 1}
    metadata = VECTOR.metadata(tmp_path / "vectors.parquet")
    assert json.loads(metadata["style_names"]) == list(STYLE_NAMES)
    assert (metadata["encoder"], metadata["revision"], metadata["max_tokens"]) == ("letters", "1", "20")


def test_a_second_run_encodes_nothing_and_says_the_same(tmp_path):
    comparisons = write_comparisons(tmp_path / "comparisons.parquet", PAIRS)
    first = encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", Letters())
    content = (tmp_path / "vectors.parquet").read_bytes()
    encoder = Letters()
    second = encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", encoder)
    assert encoder.seen == []
    assert (tmp_path / "vectors.parquet").read_bytes() == content
    assert second.pop("volatile") == {"encoded": 0, "from_cache": 6}
    assert {k: v for k, v in first.items() if k != "volatile"} == second  # the cut texts are counted again


def test_other_runs_encode_only_what_is_new(tmp_path):
    encode(write_comparisons(tmp_path / "a.parquet", PAIRS), tmp_path, EncodeSettings(), tmp_path / "cache", Letters())
    encoder = Letters()
    more = write_comparisons(tmp_path / "b.parquet", [*PAIRS, ("new prompt", "aa", "new")])
    encode(more, tmp_path, EncodeSettings(), tmp_path / "cache", encoder)
    assert encoder.seen == ["new"]


@pytest.mark.parametrize("attribute", ["name", "revision", "max_tokens", "precision"])
def test_vectors_of_another_encoder_are_never_read(tmp_path, attribute):
    comparisons = write_comparisons(tmp_path / "comparisons.parquet", PAIRS)
    encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", Letters())
    other = Letters()
    setattr(other, attribute, 21 if attribute == "max_tokens" else "other")
    encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", other)
    assert len(other.seen) == 5


def test_nothing_to_encode(tmp_path):
    comparisons = write_comparisons(tmp_path / "comparisons.parquet", [])
    with pytest.raises(BadData, match="holds no comparisons"):
        encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", Letters())
    assert not (tmp_path / "vectors.parquet").exists()


def test_vectors_that_are_no_numbers_are_neither_kept_nor_written(tmp_path):
    class Broken(Letters):
        def encode(self, texts):
            return np.full_like(super().encode(texts), np.nan)

    comparisons = write_comparisons(tmp_path / "comparisons.parquet", PAIRS)
    with pytest.raises(RunFailed, match="not finite"):
        encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", Broken())
    assert not (tmp_path / "vectors.parquet").exists()
    encoder = Letters()
    encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", encoder)
    assert len(encoder.seen) == 5


# --------------------------------------------------------------------------------------------------------------- cache
CHILD = """
import sys, time
from pathlib import Path
from coterie.config import EncodeSettings
from coterie.encoding import encode
sys.path.insert(0, {tests!r})
from test_encoding import Letters

class Slow(Letters):
    calls = 0
    def encode(self, texts):
        self.calls += 1
        if self.calls == 3:  # two batches are kept; the third never ends
            print("third", flush=True)
            time.sleep(600)
        return super().encode(texts)

here = Path({here!r})
encode(here / "comparisons.parquet", here, EncodeSettings(), here / "cache", Slow())
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    pairs = [("p", f"response {i}", f"reply {i}") for i in range(1000)]
    comparisons = write_comparisons(tmp_path / "comparisons.parquet", pairs)
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), here=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "third\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "vectors.parquet").exists()
    encoder = Letters()
    metrics = encode(comparisons, tmp_path, EncodeSettings(), tmp_path / "cache", encoder)
    assert metrics["volatile"] == {"encoded": 2000 - 2 * 512, "from_cache": 2 * 512}
    assert len(encoder.seen) == 2000 - 2 * 512
    names, vectors, _ = read_vectors(tmp_path)
    texts = {content_id("p", text): text for _, *both in pairs for text in both}
    np.testing.assert_array_equal(vectors, Letters().encode([texts[name] for name in names]))


def test_two_processes_may_use_it_at_once(tmp_path):
    with VectorCache(tmp_path, Letters()) as one, VectorCache(tmp_path, Letters()) as two:
        key, other = content_id("a"), content_id("b")
        one.put({key: Cached(np.arange(DIMENSION, dtype=np.float32), True)})
        two.put({key: Cached(np.zeros(DIMENSION, dtype=np.float32), False)})  # late: the first stays
        two.put({other: Cached(np.ones(DIMENSION, dtype=np.float32), False)})
        found = one.get([key, other, content_id("c")])
    assert set(found) == {key, other}
    np.testing.assert_array_equal(found[key].vector, np.arange(DIMENSION))
    assert found[key].cut
    assert not found[other].cut


def test_more_ids_than_one_query_takes(tmp_path):
    ids = [content_id(str(i)) for i in range(2345)]
    vectors = np.random.default_rng(0).standard_normal((len(ids), DIMENSION)).astype(np.float32)
    with VectorCache(tmp_path, Letters()) as cache:
        cache.put({i: Cached(vector, False) for i, vector in zip(ids, vectors, strict=True)})
        found = cache.get(ids)
    np.testing.assert_array_equal([found[i].vector for i in ids], vectors)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("COTERIE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "coterie"


def test_a_cache_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailable, match="COTERIE_CACHE"):
        VectorCache(tmp_path / "file", Letters())
    with VectorCache(tmp_path, Letters()) as cache:
        path = cache.path
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(BackendUnavailable, match=r"delete the file"):
        VectorCache(tmp_path, Letters())


def test_a_full_disk_is_told_and_leaves_the_cache_whole(tmp_path):
    with VectorCache(tmp_path, Letters()) as cache:
        cache._connection.execute("PRAGMA max_page_count=8")
        many = {content_id(str(i)): Cached(np.ones(DIMENSION, dtype=np.float32), False) for i in range(5000)}
        with pytest.raises(BackendUnavailable, match="full"):
            cache.put(many)
        assert cache.get(list(many)) == {}
    with sqlite3.connect(cache.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
