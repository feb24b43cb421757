"""One vector for every unique response, computed once for all runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coterie.config import EncodeSettings
from coterie.contracts import COMPARISON, VECTOR, batched, content_id, iterate, table_of
from coterie.encoding.cache import VectorCache, cache_folder
from coterie.encoding.encoders import Encoder, load_encoder
from coterie.encoding.style import STYLE_NAMES, STYLE_WORDS, style_features
from coterie.errors import BadData, RunFailed
from coterie.progress import progress

__all__ = ["STYLE_NAMES", "STYLE_WORDS", "Encoder", "cache_folder", "encode", "load_encoder", "style_features"]

_CHUNK = 512  # texts that are encoded, and kept, together


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
        How many texts there are and how many were cut; under `volatile`, how many were encoded and how many were there.

    Raises:
        BadData: no comparisons. BadConfiguration: the encoder cannot be loaded.
    """
    encoder = encoder or load_encoder(settings)
    where = _where_responses_are(comparisons)
    if not where:
        raise BadData(f"{comparisons} holds no comparisons; look into quarantine.parquet beside it")
    metadata = {
        "encoder": encoder.name,
        "revision": encoder.revision,
        "max_tokens": str(encoder.max_tokens),
        "style_names": json.dumps(STYLE_NAMES),
    }
    sizes = {"vector": encoder.dimension, "style": len(STYLE_NAMES)}
    schema, encoded = VECTOR.schema(metadata, **sizes), 0
    vectors = np.empty((len(where), encoder.dimension), dtype=np.float32)
    style = np.empty((len(where), len(STYLE_NAMES)), dtype=np.float32)
    with (
        VectorCache(cache or cache_folder(), encoder) as kept,
        progress(total=len(where), desc="encode", unit="texts") as bar,
    ):
        for chunk in batched(_responses(comparisons, where), _CHUNK):
            rows, prompts, responses = zip(*chunk, strict=True)
            texts = [encoder.text(p, r) for p, r in zip(prompts, responses, strict=True)]
            ids = [content_id(text) for text in texts]
            found = kept.get(ids)
            missing = {i: text for i, text in zip(ids, texts, strict=True) if i not in found}
            if missing:
                new = encoder.encode(list(missing.values()))
                if not np.isfinite(new).all():
                    raise RunFailed(f"the encoder {encoder.name} returned numbers that are not finite; try precision float32")
                kept.put(list(missing), new)
                found |= dict(zip(missing, new, strict=True))
                encoded += len(missing)
            vectors[list(rows)] = [found[i] for i in ids]
            style[list(rows)] = style_features(list(prompts), list(responses))
            bar.update(len(chunk))
    with VECTOR.writer(out / "vectors.parquet", metadata, **sizes) as writer:
        names = sorted(where)
        for start in range(0, len(names), 65536):
            part = slice(start, start + 65536)
            columns = {"response_id": names[part], "vector": vectors[part], "style": style[part]}
            writer.write_table(table_of(columns, schema))
    return {
        "texts": len(where),
        "encoder": encoder.name,
        "revision": encoder.revision,
        "dimension": encoder.dimension,
        "max_tokens": encoder.max_tokens,
        "volatile": {"encoded": encoded, "from_cache": len(where) - encoded, "truncated_now": encoder.truncated},
    }


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
            for prompt, text, name in zip(prompts, batch[side].to_pylist(), batch[f"{side}_id"].to_pylist(), strict=True):
                row = where[name]
                if not seen[row]:
                    seen[row] = True
                    yield row, prompt, text
