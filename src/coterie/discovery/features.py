"""The features that every reward is linear in: principal components of the encoder's vector, and readable style.

h(prompt, response) is affine in what the encoder and the style features say, so a comparison is x = h(chosen) -
h(rejected) and its own mean cancels. Only differences are ever modelled, so the map is fitted on the differences of
training pairs, not on the responses: what varies between prompts (the topic) takes no component. Scale: the encoder's
part of x has mean square 1 averaged over its components, each style feature of x has mean square 1. All components
share one factor (standardised, not whitened: docs/method, section 4), so a prior precision means the same in every run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coterie.config import EmbedSettings
from coterie.contracts import (
    COMPARISON,
    FEATURE_TENSORS,
    TRAIN,
    VECTOR,
    iterate,
    matrix,
    replacing,
)
from coterie.discovery.votes import Array
from coterie.errors import BadData

_FIT_PAIRS = 100_000  # training pairs that means, scales and components are estimated on
_ROWS = 16384


@dataclass(frozen=True)
class FeatureMap:
    """An affine map from an encoder's vector and style features to h.

    Attributes:
        vector_mean, vector_scale: [e] float32.
        components: [p, e] float32; orthogonal rows, one common length.
        style_mean, style_scale: [s] float32; empty where style is not used.
        names: d = p + s readable names, pc1 .. pcp and the style features'.
    """

    vector_mean: Array
    vector_scale: Array
    components: Array
    style_mean: Array
    style_scale: Array
    names: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        vectors: Array,
        style: Array,
        pairs: Array,
        components: int,
        use_style: bool,
        style_names: Sequence[str] = (),
    ) -> Self:
        """Fit to the differences of training pairs.

        Args:
            vectors: [n, e], the encoder's.
            style: [n, s].
            pairs: [m, 2] row numbers of the two responses of each training pair.
            components: principal components to keep; fewer where the differences span fewer.
            use_style: put the style features beside them.
            style_names: s names.

        Raises:
            BadData: no pair, numbers that are not finite, or responses of which no feature differs.
        """
        if not len(pairs):
            raise BadData("no training pair to fit the features on; look at the splits and at the quarantine of ingest")
        used = np.unique(pairs)
        if not (np.isfinite(vectors[used]).all() and np.isfinite(style[used]).all()):
            raise BadData("an encoder's vector or a style feature is not finite; run encode again with another encoder")
        vector_mean = vectors[used].mean(axis=0, dtype=np.float64)
        vector_scale, second = _second_moments(vectors, pairs)
        values, directions = np.linalg.eigh(second)
        values, directions = values[::-1], directions[:, ::-1]
        kept = min(components, int((values > 1e-6 * max(values[0], 1e-12)).sum())) if values[0] > 0 else 0
        basis = directions[:, :kept].T * np.sqrt(kept / values[:kept].sum()) if kept else np.zeros((0, len(second)))
        basis *= np.sign(basis[np.arange(kept), np.abs(basis).argmax(axis=1)])[:, None] if kept else 1.0
        style = style if use_style else style[:, :0]
        style_mean = style[used].mean(axis=0, dtype=np.float64)
        difference = style[pairs[:, 0]].astype(np.float64) - style[pairs[:, 1]]
        style_scale = _safe(np.sqrt((difference**2).mean(axis=0)))
        if not kept and not (difference != 0).any():
            raise BadData("the two responses of every training pair have the same features; use another encoder")
        names = [f"pc{i + 1}" for i in range(kept)]
        names += list(style_names or [f"style{i + 1}" for i in range(style.shape[1])])[: style.shape[1]]
        fitted = (vector_mean, vector_scale, basis, style_mean, style_scale)
        tensors = {n: np.asarray(t, np.float32) for n, t in zip(FEATURE_TENSORS, fitted, strict=True)}
        return cls(**tensors, names=tuple(names))

    @property
    def size(self) -> int:
        """The number of features, d."""
        return len(self.components) + len(self.style_mean)

    def transform(self, vectors: Array, style: Array) -> Array:
        """h, [n, d] float32, of vectors [n, e] and style [n, s].

        Raises:
            BadData: another encoder's vectors, or another number of style features.
        """
        styled = len(self.style_mean)
        if vectors.shape[1] != len(self.vector_mean) or (styled and style.shape[1] != styled):
            raise BadData(
                f"vectors of {vectors.shape[1]} and style of {style.shape[1]} numbers, but these features were fitted "
                f"on {len(self.vector_mean)} and {styled}; encode with the encoder that they were fitted on"
            )
        encoded = ((vectors - self.vector_mean) / self.vector_scale) @ self.components.T
        if not styled:
            return np.asarray(encoded, np.float32)
        return np.concatenate([encoded, (style - self.style_mean) / self.style_scale], axis=1, dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write the tensors of contracts.FEATURE_TENSORS; the names travel in the file's metadata."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in FEATURE_TENSORS}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises BadData: no such file, not safetensors, or a tensor is missing."""
        try:
            with safe_open(path, framework="numpy") as file:
                names = tuple(json.loads((file.metadata() or {})["names"]))
                return cls(**{name: file.get_tensor(name) for name in FEATURE_TENSORS}, names=names)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadData(f"{path}: no features of coterie ({error}); run `coterie embed` again") from error


def _safe(scale: Array) -> Array:
    """A scale to divide by: 1 where a column is constant."""
    return np.where(scale > 1e-6, scale, 1.0)


def _second_moments(vectors: Array, pairs: Array) -> tuple[Array, Array]:
    """Root mean squares [e] of the pairs' differences (1 where constant), standardised second moments [e, e]."""
    second = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(pairs), _ROWS):
        rows = pairs[start : start + _ROWS]
        difference = vectors[rows[:, 0]] - vectors[rows[:, 1]]
        second += difference.T @ difference
    second /= len(pairs)
    scale = _safe(np.sqrt(np.diag(second)))
    return scale, second / np.outer(scale, scale)


def fit_features(comparisons: Path, vectors: Path, settings: EmbedSettings) -> FeatureMap:
    """Fit a FeatureMap on the training pairs (a random hundred thousand of them where there are more).

    Raises:
        BadData: not a table of comparisons or vectors, no training pair, or a response without a vector.
    """
    sides = _training_pairs(comparisons, settings.seed)
    wanted, pairs = np.unique(sides, return_inverse=True)
    file = VECTOR.open(vectors)
    schema = file.schema_arrow
    encoded = np.full((len(wanted), schema.field("vector").type.list_size), np.nan, np.float32)
    style = np.full((len(wanted), schema.field("style").type.list_size), np.nan, np.float32)
    found = np.zeros(len(wanted), bool)
    for batch in iterate(file, rows=_ROWS):
        names = batch["response_id"].to_numpy(zero_copy_only=False)
        place = np.minimum(np.searchsorted(wanted, names), max(len(wanted) - 1, 0))
        keep = wanted[place] == names if len(wanted) else np.zeros(len(names), bool)
        encoded[place[keep]], style[place[keep]] = matrix(batch["vector"])[keep], matrix(batch["style"])[keep]
        found[place[keep]] = True
    if not found.all():
        raise missing_vector(wanted[~found][0], vectors)
    names = json.loads(VECTOR.metadata(vectors).get("style_names", "[]"))
    return FeatureMap.fit(encoded, style, pairs.reshape(-1, 2), settings.components, settings.style, names)


def _training_pairs(comparisons: Path, seed: int) -> Array:
    """Chosen and rejected id, [pairs, 2], of training pairs: those whose ids have the smallest hashes, so that any order
    of the file gives the same sample, and each pair once."""
    hashes, sides = np.zeros(0, np.uint64), np.zeros((0, 2), object)
    for batch in iterate(
        COMPARISON.open(comparisons), ["chosen_id", "rejected_id", "pair_id", "split"], rows=8 * _ROWS
    ):
        batch = batch.filter(pc.equal(batch["split"].cast(pa.string()), TRAIN))
        columns = [batch[name].to_numpy(zero_copy_only=False) for name in ("chosen_id", "rejected_id")]
        hashes = np.concatenate([hashes, hashed(batch["pair_id"], seed)])
        sides = np.concatenate([sides, np.stack(columns, axis=1)])
        hashes, first = np.unique(hashes, return_index=True)
        hashes, sides = hashes[:_FIT_PAIRS], sides[first[:_FIT_PAIRS]]
    return sides


def hashed(ids: pa.Array, seed: int = 0) -> Array:
    """A 64-bit hash of each id, [n] uint64."""
    names = ids.to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(names, categorize=False, hash_key=f"{seed:016x}"))


def missing_vector(response_id: str, vectors: Path) -> BadData:
    """The error for a response that was not encoded."""
    return BadData(f"{vectors}: no vector for response {response_id}; encode the comparisons that you embed")
