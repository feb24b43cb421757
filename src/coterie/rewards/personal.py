"""A reward for each person: what everybody wants and the directions of taste, weighed by the person's embedding.

r(x, i) = (theta + U a_i) . h for h of any kind, an encoder's features or a backbone's hidden state (docs/method, section 2).
Given the embeddings, theta and U are r + 1 heads of one penalised logistic regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from coterie.contracts import PERSONAL_FILE, PERSONAL_TENSORS, replacing
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Votes, one_thread
from coterie.errors import BadData, RunFailed
from coterie.rewards.heads import COTERIE_PRECISIONS, Array, RewardHead, head_tensors, mean_loss, weighted


@dataclass(frozen=True)
class PersonalHead:
    """A reward for each person: theta and U of a member with embeddings, calibrated as one (docs/method, section 2).

    Attributes:
        common: what everybody wants.
        basis: [d, r].
        basis_center: [r], mean of h @ basis over the reference responses.
    """

    common: RewardHead
    basis: Array
    basis_center: Array

    def of(self, embedding: Array) -> RewardHead:
        """The head of a person with this embedding [r]; its mean score over the reference responses is zero."""
        common = self.common
        return replace(
            common,
            weight=common.weight + self.basis @ embedding,
            center=common.center + float(self.basis_center @ embedding),
        )

    def margin(self, x: Array, embeddings: Array) -> Array:
        """Score differences [n] of comparisons x [n, d] by people with embeddings [n, r]."""
        own = np.einsum("nr,nr->n", np.asarray(x, dtype=np.float64) @ self.basis, embeddings)
        margins: Array = self.common.margin(x) + self.common.scale * own
        return margins

    def loss(self, votes: Votes, embeddings: Array, reliability: Array) -> float:
        """Mean log-loss of votes, in nats, by workers of these embeddings [n_workers, r] and reliabilities [n_workers]."""
        margin = reliability[votes.worker] * self.margin(votes.x, embeddings[votes.worker])
        return mean_loss(margin, votes.y, votes.weighted(np.ones(len(votes))))

    def calibrated(self, x: Array, y: Array, embeddings: Array) -> PersonalHead:
        """The same heads with the scale of least log-loss on held-out comparisons, as in `margin`, y [n]."""
        own = replace(self, common=replace(self.common, scale=1.0)).margin(x, embeddings)
        # The margins are calibrated as the one feature of a head.
        scale = RewardHead(np.ones(1)).calibrated(own[:, None], y, np.ones(len(own))).scale
        return replace(self, common=replace(self.common, scale=scale))

    def centered(self, reference: Array) -> PersonalHead:
        """The same heads with mean score zero over the reference responses [n, d]."""
        mean = np.asarray(reference, dtype=np.float64).mean(axis=0)
        return replace(self, common=self.common.centered(reference), basis_center=mean @ self.basis)

    def save(self, path: Path) -> None:
        """Write the heads as safetensors with the names of contracts.PERSONAL_TENSORS, float32."""
        from safetensors.numpy import save_file

        common = self.common
        values = (common.weight, np.array([common.center]), np.array([common.scale]), self.basis, self.basis_center)
        tensors = {n: np.ascontiguousarray(v, np.float32) for n, v in zip(PERSONAL_TENSORS, values, strict=True)}
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; `path` is the file or the folder that holds it. Raises BadData."""
        tensors = head_tensors(path / PERSONAL_FILE if path.is_dir() else path, PERSONAL_TENSORS)
        weight, center, scale, basis, basis_center = (tensors[name].astype(np.float64) for name in PERSONAL_TENSORS)
        return cls(RewardHead(weight, float(center[0]), float(scale[0])), basis, basis_center)


@one_thread()
def fit_heads(
    x: Array, y: Array, sample_weight: Array, embeddings: Array, prior_mean: Array, precision: float
) -> Array:
    """The r + 1 heads theta and U that maximise sum_n w_n log P(y_n | x_n . (theta + U a_n)) - precision / 2 * (|theta -
    prior_mean|^2 + |U|^2), for known embeddings a_n; by L-BFGS.

    Args:
        x, y, sample_weight: as of `fit_head`.
        embeddings: of each comparison's worker [n, r].
        prior_mean: [d], of theta.
        precision: above zero.

    Returns:
        theta and U side by side [d, 1 + r], float64.

    Raises:
        BadData: features that are not finite.
        RunFailed: the optimum was not reached.
    """
    features, weight = np.asarray(x, dtype=np.float32), np.asarray(sample_weight, dtype=np.float32)
    if not np.isfinite(features.sum(dtype=np.float64)):
        raise BadData("a reward cannot be fitted on features that are not finite; run embed again")
    taste = np.column_stack([np.ones(len(y)), embeddings]).astype(np.float32)
    mean = np.zeros((features.shape[1], taste.shape[1]))
    mean[:, 0] = prior_mean
    unit = 1.0 / max(float(weight.sum()), 1.0)

    def objective(flat: Array) -> tuple[float, Array]:
        heads = flat.reshape(mean.shape)
        margin = np.einsum("nk,nk->n", features @ heads.astype(np.float32), taste)
        residual = weight * (expit(margin) - y)
        pull = heads - mean
        value = float(weight @ log_loss(margin, y)) + precision / 2 * float((pull**2).sum())
        gradient = features.T @ (residual[:, None] * taste) + precision * pull
        return unit * value, unit * gradient.astype(np.float64).ravel()

    options = {"maxiter": 1000, "gtol": 1e-5, "ftol": 1e-10, "maxcor": 20}
    result = minimize(objective, mean.ravel(), jac=True, method="L-BFGS-B", options=options)
    if not np.isfinite(result.fun) or np.abs(result.jac).max() > 1e-3:
        raise RunFailed(
            f"the heads of the reward by embedding did not converge on {len(y):,} comparisons ({result.message}). "
            "Are the features standardised? Run embed again."
        )
    solution: Array = result.x.reshape(mean.shape)
    return solution


def fit_personal(
    train: Votes,
    validation: Votes,
    embeddings: Array,
    reliability: Array,
    prior_mean: Array,
    precisions: Sequence[float] = COTERIE_PRECISIONS,
) -> tuple[PersonalHead, float]:
    """theta and U under the prior of least validation log-loss, and the prior's precision.

    Args:
        train: comparisons to fit.
        validation: comparisons that choose the precision.
        embeddings: [n_workers, r].
        reliability: beta_i of each worker [n_workers].
        prior_mean: [d], of theta.
        precisions: to choose from.
    """
    x, y, weight = weighted(train, np.ones(len(embeddings)), reliability)
    rows = train.weighted(np.ones(len(train))) > 0
    best: tuple[float, float, PersonalHead] | None = None
    for precision in precisions:
        heads = fit_heads(x, y, weight, embeddings[train.worker[rows]], prior_mean, precision)
        head = PersonalHead(RewardHead(heads[:, 0]), heads[:, 1:], np.zeros(embeddings.shape[1]))
        held = head.loss(validation, embeddings, reliability)
        if best is None or held < best[0]:
            best = (held, precision, head)
    assert best is not None
    return best[2], best[1]
