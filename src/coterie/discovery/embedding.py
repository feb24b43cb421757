"""What the members that place each worker in a space of tastes share: theta_i = theta + U a_i, a_i ~ N(0, I)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from coterie.contracts import LOWRANK_TENSORS, replacing
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array
from coterie.errors import BadData


class EmbeddingReward(Reward):
    """A reward with worker embeddings.

    Attributes:
        theta_: [d] float32, what everybody wants.
        basis_: [d, r] float32, U.
        embeddings_: [n_workers, r] float32, a_i; the spread of tastes is in the lengths of U's columns.
        log_reliability_: [n_workers].
        reliability_variance_: tau^2.
    """

    def tensors(self) -> dict[str, Array]:
        """What contracts.LOWRANK_TENSORS names."""
        values = (self.theta_, self.basis_, np.array([self.reliability_variance_]))
        return {n: np.ascontiguousarray(v, np.float32) for n, v in zip(LOWRANK_TENSORS, values, strict=True)}

    def save(self, path: Path) -> None:
        """Write contracts.LOWRANK_TENSORS."""
        with replacing(path) as temporary:
            save_file(self.tensors(), temporary)

    def restore(self, path: Path, embeddings: Array, log_reliability: Array) -> Self:
        """Be what `save` wrote, with the workers' embeddings [n_workers, r] and log reliabilities [n_workers].

        Raises:
            BadData: no such file, not safetensors, or a tensor is missing.
        """
        try:
            tensors = load_file(path)
            self.theta_, self.basis_, variance = (tensors[name] for name in LOWRANK_TENSORS)
        except (OSError, SafetensorError, KeyError) as error:
            raise BadData(f"{path}: no embedding of coterie ({error}); run `coterie embed` again") from error
        self.n_features_in_, self.reliability_variance_ = self.theta_.shape[0], float(variance[0])
        self.embeddings_, self.log_reliability_ = embeddings, log_reliability
        return self
