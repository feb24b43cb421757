"""Encoders, and the cache that survives a kill: one vector for every unique response, computed once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from coterie.config import EncodeSettings
from coterie.contracts import COMPARISON, VECTOR, content_id, matrix
from coterie.encoding import STYLE_NAMES, encode, load_encoder, style_features
from coterie.encoding.cache import Cached, VectorCache, cache_folder
from coterie.errors import BackendUnavailable, BadConfiguration, BadData, RunFailed

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


# -------------------------------------------------------------------------------------------------------------- MiniLM
SENTENCES = ["A short one.", "A cat sat on the mat, " * 20, "🙂 emoji and ümlauts", "", "word " * 20_000]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(EncodeSettings(max_tokens=64, device="cpu"))


def test_minilm_encodes_responses_alone(minilm):
    assert (minilm.name, minilm.dimension, minilm.max_tokens, minilm.precision) == ("minilm", 384, 64, "float32")
    assert minilm.text("prompt", "response") == "response"
    vectors = minilm.encode(["A cat sat on the mat.", "A kitten rested on the rug.", "Shares fell by three percent."])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.4 > 0.2 > far  # these are the model's weights, and not random ones


def test_minilm_does_not_depend_on_the_batch(minilm):
    together = minilm.encode(SENTENCES)
    np.testing.assert_allclose(minilm.encode(SENTENCES[::-1])[::-1], together, atol=1e-5)
    for row, text in enumerate(SENTENCES):
        np.testing.assert_allclose(minilm.encode([text])[0], together[row], atol=1e-5)


def test_minilm_tells_what_it_cuts(minilm):
    np.testing.assert_array_equal(minilm.cut(SENTENCES), [False, True, False, False, True])
    # 62 words and the two special tokens are the limit.
    np.testing.assert_array_equal(minilm.cut(["word " * 62, "word " * 63]), [False, True])
    cut = minilm.encode(["word " * 62, "word " * 63, "word " * 61])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-5)
    assert np.abs(cut[0] - cut[2]).max() > 1e-4


def test_no_texts(minilm):
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.cut([]).shape == (0,)


# ---------------------------------------------------------------------------------------------------------- last token
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers, and a tokenizer that was trained on a few sentences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog on the rug"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **size)).save_pretrained(folder)
    return folder


def last_token(folder, **values):
    return load_encoder(EncodeSettings(encoder=f"last-token:{folder}", device="cpu", **{"max_tokens": 32, **values}))


def test_last_token_is_the_hidden_state_at_the_end(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder = last_token(tiny)
    text = encoder.text("the cat", "sat on the mat")
    assert text == "the cat\n\nsat on the mat"
    ids = AutoTokenizer.from_pretrained(tiny)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        expected = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    np.testing.assert_allclose(encoder.encode([text])[0], expected.numpy(), atol=1e-5)


def test_last_token_does_not_depend_on_the_batch(tiny):
    encoder = last_token(tiny, batch_size=3)
    texts = [encoder.text("the dog", text) for text in ["sat", "on the mat", "🙂", "and the rug " * 5, "", "the"]]
    together = encoder.encode(texts)
    assert together.shape == (6, 16)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], together, atol=1e-5)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode([text])[0], together[row], atol=1e-5)
    assert np.ptp(together, axis=0).min() > 1e-3


def test_a_long_prompt_loses_its_beginning_and_the_response_stays(tiny):
    encoder = last_token(tiny)
    prompt = "the dog on the rug " * 5_000  # 95,000 characters
    long = [encoder.text(prompt, response) for response in ("the cat sat", "on the mat")]
    np.testing.assert_array_equal(encoder.cut([*long, "the cat"]), [True, True, False])
    vectors = encoder.encode([*long, encoder.text("another beginning " + prompt, "the cat sat")])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)


def test_the_chat_template_of_the_tokenizer_is_used(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    assert last_token(tmp_path).text("the cat", "sat") == "<user>the cat<assistant>sat"


def test_a_reward_model_and_bfloat16(tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(tmp_path)
    exact, coarse = last_token(tmp_path), last_token(tmp_path, precision="bfloat16")
    assert (exact.precision, coarse.precision) == ("float32", "bfloat16")
    texts = ["the cat sat on the mat", "the dog"]
    np.testing.assert_allclose(exact.encode(texts), last_token(tiny).encode(texts), atol=1e-5)
    np.testing.assert_allclose(coarse.encode(texts), exact.encode(texts), atol=0.1)


def test_the_revision_of_a_folder_follows_its_weights(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    revision = last_token(tiny).revision
    assert revision == last_token(tiny).revision
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # one number in the middle of the file
    model.save_pretrained(tmp_path)
    assert last_token(tmp_path).revision != revision


# -------------------------------------------------------------------------------------------------------- bad settings
@pytest.mark.parametrize("encoder", ["./no-such-model", "last-token:./no-such-model"])
def test_an_unknown_model_is_told_with_the_remedy(encoder):
    with pytest.raises(BadConfiguration, match=r"no-such-model cannot be loaded.*Give minilm"):
        load_encoder(EncodeSettings(encoder=encoder))


def test_damaged_weights_are_told(tiny, tmp_path):
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadConfiguration, match="cannot be loaded"):
        last_token(tmp_path)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(tiny, device):
    with pytest.raises(BadConfiguration, match=device):
        load_encoder(EncodeSettings(encoder=f"last-token:{tiny}", device=device))


def test_without_torch_the_message_says_what_to_install():
    code = """
        import sys
        from importlib.abc import MetaPathFinder

        class Without(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torch":
                    raise ModuleNotFoundError(name)

        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
        sys.meta_path.insert(0, Without())
        from coterie.config import EncodeSettings
        from coterie.encoding import load_encoder, style_features
        from coterie.errors import BadConfiguration
        style_features(["p"], ["r"])
        try:
            load_encoder(EncodeSettings())
        except BadConfiguration as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "pip install 'coterie[encoders]'" in run.stdout
