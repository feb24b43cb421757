"""The backbone of reward adapters: a response as text, as tokens, and the hidden state that its score is read off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.backbones import backbone_source, no_model, quietly, revision_of
from coterie.contracts import batched
from coterie.errors import BadConfiguration
from coterie.progress import progress

_CHARACTERS_A_TOKEN = 40  # more than any tokenizer packs into one: text before limit * this needs no tokenizing
_TEXTS = 1024  # tokenized at a time
_BATCH, _UNWATCHED = 32, 4  # responses read at a time; batches of a request, which is worth no progress bar


def load_tokenizer(name: str, revision: str) -> Any:
    """The tokenizer of a backbone, with a pad token.

    transformers reads the score off the last token that is no pad token, so one that ends every text must not pad: some
    other special token does where there is one.

    Args:
        name: as RewardSettings.backbone, or a folder.
        revision: on the hub.

    Raises:
        BadConfiguration: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    where = backbone_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **_on_hub(where, revision))
    except Exception as error:  # of the hub or of the tokenizer: each library has its own
        raise no_model(name, error) from error
    tokenizer.padding_side = "right"
    special = [id for id, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
    end = _encoded(tokenizer, [conversation(tokenizer, "", "")])[0][-1:]
    tokenizer.pad_token_id = next((id for id in candidates if id is not None and id not in end), tokenizer.eos_token_id)
    if tokenizer.pad_token_id is None:
        raise BadConfiguration(
            f"the backbone {name}: its tokenizer has no special token to pad with. Give one that does."
        )
    return tokenizer


def load_model(name: str, revision: str, dtype: str, pad_token_id: int) -> tuple[Any, str]:
    """A backbone with a reward head of one output, on the CPU, and its revision.

    The head is kept in float32 whatever the dtype: adapters train a copy of it.

    Raises:
        BadConfiguration: it cannot be loaded, or its head is not the linear `score` of decoder-only models.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    where = backbone_source(name)
    try:
        with quietly():
            model = AutoModelForSequenceClassification.from_pretrained(
                where, num_labels=1, dtype=getattr(torch, dtype), **_on_hub(where, revision)
            )
    except Exception as error:  # of the hub or of the weights: each library has its own
        raise no_model(name, error) from error
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise BadConfiguration(
            f"the backbone {name}: a {type(model).__name__} has no linear head `score` that reads the last token. "
            "Give a decoder-only language model."
        )
    model.score.float()
    model.config.pad_token_id = pad_token_id
    return model, revision_of(where, revision, model)


def _on_hub(where: str, revision: str) -> dict[str, str]:
    return {} if Path(where).is_dir() else {"revision": revision}


def conversation(tokenizer: Any, prompt: str, response: str) -> str:
    """The text of a response: in the tokenizer's chat template, or `prompt`, a blank line, `response` and the end token."""
    if not tokenizer.chat_template:
        return f"{prompt}\n\n{response}{tokenizer.eos_token or ''}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def tokenized(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], max_tokens: int
) -> tuple[list[NDArray[np.int32]], NDArray[np.bool_]]:
    """Token ids of responses [n], and which have more than `max_tokens`: those lose their beginning."""
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    tokens: list[NDArray[np.int32]] = []
    longer: list[bool] = []
    batches: Any = list(batched(zip(prompts, responses, strict=True), _TEXTS))
    for batch in progress(batches, desc="tokens", unit="batches") if len(batches) > 1 else batches:
        texts = [conversation(tokenizer, prompt, response) for prompt, response in batch]
        clipped = [text[-max_tokens * _CHARACTERS_A_TOKEN :] for text in texts]
        for ids, full, text in zip(_encoded(tokenizer, clipped), texts, clipped, strict=True):
            while len(ids) > 1 and ids[-1] == pad:  # behind the token that the score is read off
                ids.pop()
            longer.append(len(ids) > max_tokens or len(full) > len(text))
            if longer[-1]:
                ids = [*ids[:1], *ids[1 - max_tokens :]] if ids[0] == bos else ids[-max_tokens:]
            tokens.append(np.array(ids or [pad], dtype=np.int32))
    return tokens, np.array(longer, dtype=bool)


def last_states(
    classifier: Any, tokens: Sequence[NDArray[np.int32]], forward: Callable[..., Any] | None = None
) -> NDArray[np.float32]:
    """The last hidden state at the last token, [n, hidden], of token ids [n]; the composition of a batch does not matter.

    Args:
        classifier: what `load_model` gives; where it is in a PeftModel, its active adapter counts.
        tokens: of `tokenized`.
        forward: hidden states [batch, tokens, hidden] of the rows of a batch (a list), by input_ids and attention_mask;
            default: by the backbone of the classifier, whatever the rows.
    """
    import torch

    backbone, device = getattr(classifier, classifier.base_model_prefix), classifier.device
    forward = forward or (lambda rows, **inputs: backbone(**inputs, use_cache=False)[0])
    states = np.empty((len(tokens), classifier.config.get_text_config().hidden_size), dtype=np.float32)
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=classifier.dtype == torch.bfloat16)
    starts: Any = range(0, len(order), _BATCH)
    with torch.inference_mode():
        for start in progress(starts, desc="hidden states", unit="batches") if len(starts) > _UNWATCHED else starts:
            rows = order[start : start + _BATCH].tolist()
            lengths = torch.tensor([len(tokens[row]) for row in rows])
            # Padding on the right: under causal attention no token sees what is behind it.
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for line, row in zip(ids, rows, strict=True):
                line[: len(tokens[row])] = torch.from_numpy(tokens[row])
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            with bfloat16:
                hidden = forward(rows, input_ids=ids.to(device), attention_mask=mask.to(device))
            last = hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)]
            states[rows] = last.float().cpu().numpy()
    return states


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    special = not tokenizer.chat_template  # a template writes them out
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids
