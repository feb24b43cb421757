"""One vector for every unique response, computed once for all runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.backbones import cache_folder
from coterie.config import EncodeSettings
from coterie.contracts import COMPARISON, VECTOR, batched, content_id, iterate, table_of
from coterie.encoding.cache import Cached, VectorCache
from coterie.encoding.encoders import Encoder, load_encoder
from coterie.encoding.style import STYLE_NAMES, STYLE_WORDS, style_features
from coterie.errors import BadData, RunFailed
from coterie.progress import progress

__all__ = ["STYLE_NAMES", "STYLE_WORDS", "Encoder", "encode", "load_encoder", "style_features"]

_CHUNK = 512  # texts that are encoded, and kept, together
_ROWS = 16384  # vectors that are in memory together


def encode(
    comparisons: Path,
    out: Path,
    settings: EncodeSettings,
    cache: Path | None = None,
    encoder: Encoder | None = None,
) -> dict[str, Any]:
    """Write `out`/vectors.parquet: one row a unique response of `comparisons`, in the order of their ids.

    Args:
        comparisons: a comparisons.parquet.
        out: an existing folder.
        settings: which encoder, and how.
        cache: folder of vectors that were computed before; None: `cache_folder()`.
        encoder: in place of the one that the settings name.

    Returns:
        How many texts there are and how many were cut at the encoder's limit; the encoder; under `volatile`, how many
        were encoded now and how many were in the cache.

    Raises:
        BadData: no comparisons. BadConfiguration: the encoder cannot be loaded. BackendUnavailable: the cache cannot
        be used. RunFailed: the encoder returned numbers that are not finite.
    """
    encoder = encoder or load_encoder(settings)
    where = _where_responses_are(comparisons)
    if not where:
        raise BadData(f"{comparisons} holds no comparisons; look into quarantine.parquet beside it")
    keys = [""] * len(where)  # of each row's text in the cache
    style = np.empty((len(where), len(STYLE_NAMES)), dtype=np.float32)
    encoded = truncated = 0
    with VectorCache(cache or cache_folder(), encoder) as kept:
        with progress(total=len(where), desc="encode", unit="texts") as bar:
            for chunk in batched(_responses(comparisons, where), _CHUNK):
                rows, prompts, responses = (list(column) for column in zip(*chunk, strict=True))
                texts = [encoder.text(p, r) for p, r in zip(prompts, responses, strict=True)]
                ids = [content_id(text) for text in texts]
                found = kept.get(ids)
                missing = {i: text for i, text in zip(ids, texts, strict=True) if i not in found}
                new = _encode(encoder, missing)
                kept.put(new)
                found |= new
                encoded += len(new)
                truncated += sum(found[i].cut for i in ids)
                for row, i in zip(rows, ids, strict=True):
                    keys[row] = i
                style[rows] = style_features(prompts, responses)
                bar.update(len(chunk))
        _write(out / "vectors.parquet", sorted(where), keys, style, kept, encoder)
    return {
        "texts": len(where),
        "truncated": truncated,
        "encoder": encoder.name,
        "revision": encoder.revision,
        "dimension": encoder.dimension,
        "max_tokens": encoder.max_tokens,
        "volatile": {"encoded": encoded, "from_cache": len(where) - encoded},
    }


def _encode(encoder: Encoder, texts: dict[str, str]) -> dict[str, Cached]:
    """The vectors of texts by id. Raises RunFailed where they are no numbers."""
    if not texts:
        return {}
    vectors, cut = encoder.encode(list(texts.values())), encoder.cut(list(texts.values()))
    if not np.isfinite(vectors).all():
        raise RunFailed(
            f"the encoder {encoder.name} returned numbers that are not finite. Try precision float32, or another model."
        )
    return {i: Cached(vector, bool(c)) for i, vector, c in zip(texts, vectors, cut, strict=True)}


def _write(
    path: Path,
    names: list[str],
    keys: list[str],
    style: NDArray[np.float32],
    kept: VectorCache,
    encoder: Encoder,
) -> None:
    """Write the table of vectors, which come back from the cache so that memory holds few of them at a time."""
    metadata = {
        "encoder": encoder.name,
        "revision": encoder.revision,
        "max_tokens": str(encoder.max_tokens),
        "style_names": json.dumps(STYLE_NAMES),
    }
    sizes = {"vector": encoder.dimension, "style": len(STYLE_NAMES)}
    schema = VECTOR.schema(metadata, **sizes)
    with VECTOR.writer(path, metadata, **sizes) as writer:
        for start in range(0, len(names), _ROWS):
            part = slice(start, start + _ROWS)
            found = kept.get(keys[part])
            columns = {
                "response_id": names[part],
                "vector": np.stack([found[i].vector for i in keys[part]]),
                "style": style[part],
            }
            writer.write_table(table_of(columns, schema))


def _where_responses_are(comparisons: Path) -> dict[str, int]:
    """Every response id with the row that it will have: their order."""
    ids: set[str] = set()
    for batch in iterate(COMPARISON.open(comparisons), ["chosen_id", "rejected_id"]):
        ids.update(batch["chosen_id"].to_pylist(), batch["rejected_id"].to_pylist())
    return {name: row for row, name in enumerate(sorted(ids))}


def _responses(comparisons: Path, where: dict[str, int]) -> Iterator[tuple[int, str, str]]:
    """(row, prompt, response) of every response, once."""
    seen = np.zeros(len(where), dtype=bool)
    columns = ["prompt", "chosen", "rejected", "chosen_id", "rejected_id"]
    for batch in iterate(COMPARISON.open(comparisons), columns, rows=8192):
        prompts = batch["prompt"].to_pylist()
        for side in ("chosen", "rejected"):
            for prompt, text, name in zip(
                prompts, batch[side].to_pylist(), batch[f"{side}_id"].to_pylist(), strict=True
            ):
                row = where[name]
                if not seen[row]:
                    seen[row] = True
                    yield row, prompt, text
