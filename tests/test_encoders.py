"""The encoders: MiniLM from its package, the last token of any transformers model, and what they say of bad settings."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from coterie.config import EncodeSettings
from coterie.encoding import load_encoder
from coterie.errors import BadConfiguration

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
