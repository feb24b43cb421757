"""Reward heads on frozen features: a global one, and one a coterie that starts from it and is pulled towards it.

A head is a penalised logistic regression on x = h(prompt, chosen) - h(prompt, rejected), with a Gaussian prior around
zero (the global head) or around the global head (a coterie's); docs/method.md, sections 1 and 6. A worker's reliability
beta_i multiplies x while fitting, so that careless answers do not shrink the taste of the careful. What is served has no
beta: `scale` makes sigmoid(score difference) the calibrated probability of a worker of the head's audience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit

from coterie.contracts import (
    GLOBAL,
    HEAD_FILE,
    HEAD_TENSORS,
    Gate,
    replacing,
)
from coterie.discovery.logistic import gram, log_loss
from coterie.discovery.votes import Votes, one_thread
from coterie.errors import BadData, RunFailed

Array = NDArray[np.floating[Any]]

GLOBAL_PRECISIONS = (1.0, 10.0, 100.0, 1000.0)
COTERIE_PRECISIONS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SMALLEST_RESPONSIBILITY = 0.05
_SCALE_PRIOR_SD = 1.0  # of log scale: keeps the scale finite where a small validation set is separable


@one_thread()
def fit_head(x: Array, y: Array, sample_weight: Array, prior_mean: Array, precision: float) -> Array:
    """Weights that maximise sum_n w_n log P(y_n | x_n) - precision / 2 * |weight - prior_mean|^2.

    Args:
        x: feature differences [n, d].
        y: 1 where the first response was chosen, .5 for a tie [n].
        sample_weight: weight of each comparison [n].
        prior_mean: centre of the Gaussian prior [d], and where the search starts.
        precision: of that prior, above zero; the objective is then strictly convex.

    Returns:
        weight [d], float64.

    Raises:
        BadData: features that are not finite.
        RunFailed: the optimum was not reached.
    """
    mean = np.asarray(prior_mean, dtype=np.float64)
    features, weight = np.asarray(x, dtype=np.float32), np.asarray(sample_weight, dtype=np.float32)
    if not np.isfinite(features.sum(dtype=np.float64)):
        raise BadData("a reward cannot be fitted on features that are not finite; run embed again")
    unit = 1.0 / max(float(weight.sum()), 1.0)  # the objective a comparison, so that one tolerance fits all sizes

    def objective(theta: Array) -> tuple[float, Array]:
        margin = features @ theta.astype(np.float32)
        residual = weight * (expit(margin) - y)
        pull = theta - mean
        value = float(weight @ log_loss(margin, y)) + precision / 2 * float(pull @ pull)
        return unit * value, unit * (features.T @ residual + precision * pull).astype(np.float64)

    def hessian(theta: Array) -> Array:
        p = expit(features @ theta.astype(np.float32))
        curved: Array = unit * (gram(features, weight * p * (1 - p)) + precision * np.eye(len(mean)))
        return curved

    result = minimize(objective, mean, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-5})
    # float32 sums stop improving near 1e-6, which the solver reports as failure: the gradient decides.
    if not np.isfinite(result.fun) or np.abs(objective(result.x)[1]).max() > 1e-3:
        raise RunFailed(
            f"the reward head did not converge on {len(y):,} comparisons ({result.message}). "
            "Are the features standardised? Run embed again."
        )
    solution: Array = result.x
    return solution


@dataclass(frozen=True)
class RewardHead:
    """A linear reward: score = scale * (h @ weight - center).

    Attributes:
        weight: [d].
        center: mean of h @ weight over the reference responses, so that a score of zero is an average response.
        scale: above zero; makes sigmoid(score difference) a calibrated probability.
    """

    weight: Array
    center: float = 0.0
    scale: float = 1.0

    def score(self, h: Array) -> Array:
        """Scores [n] of responses with features h [n, d]."""
        scores: Array = self.scale * (np.asarray(h, dtype=np.float64) @ self.weight - self.center)
        return scores

    def margin(self, x: Array) -> Array:
        """Score differences [n] of comparisons with feature differences x [n, d]; the centre cancels."""
        margins: Array = self.scale * (np.asarray(x, dtype=np.float64) @ self.weight)
        return margins

    def centered(self, reference: Array) -> RewardHead:
        """The same head with mean score zero over the reference responses [n, d]."""
        return replace(self, center=float(np.mean(np.asarray(reference, dtype=np.float64) @ self.weight)))

    def calibrated(self, x: Array, y: Array, sample_weight: Array) -> RewardHead:
        """The same head with the scale of least weighted log-loss on held-out comparisons x [n, d], y [n]."""
        raw = np.asarray(x, dtype=np.float64) @ self.weight

        def loss(log_scale: float) -> float:
            nats = float(sample_weight @ log_loss(np.exp(log_scale) * raw, y))
            return nats + 0.5 * (log_scale / _SCALE_PRIOR_SD) ** 2

        found = minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-6})
        return replace(self, scale=float(np.exp(found.x)))

    def save(self, path: Path) -> None:
        """Write the head as safetensors with the names of contracts.HEAD_TENSORS, float32."""
        from safetensors.numpy import save_file

        values = (self.weight, np.array([self.center]), np.array([self.scale]))
        with replacing(path) as temporary:
            save_file(
                {n: np.ascontiguousarray(v, np.float32) for n, v in zip(HEAD_TENSORS, values, strict=True)}, temporary
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a head; `path` is the file or the folder that holds it.

        Raises:
            BadData: no such file, or not a reward head.
        """
        tensors = head_tensors(path / HEAD_FILE if path.is_dir() else path, HEAD_TENSORS)
        weight, center, scale = (tensors[name].astype(np.float64) for name in HEAD_TENSORS)
        return cls(weight, float(center[0]), float(scale[0]))


def head_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Array]:
    """The tensors of a reward. Raises BadData: no such file, or not this kind of reward."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        raise BadData(f"{file}: no reward head. Run the reward stage first.")
    try:
        tensors: dict[str, Array] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadData(f"{file}: not a readable safetensors file ({error}). Run the reward stage again.") from error
    if set(tensors) != set(names) or tensors["weight"].ndim != 1:
        raise BadData(f"{file}: holds {', '.join(sorted(tensors))}, not a reward head. Run the reward stage again.")
    return tensors


def serving_own(gates: Sequence[Gate]) -> list[bool]:
    """Whether each coterie, in the order of their numbers, serves its own reward."""
    of_coteries = {gate.coterie: gate.serves == "own" for gate in gates if gate.coterie is not None}
    return [of_coteries[k] for k in sorted(of_coteries)]


def served_heads(heads: Mapping[str, RewardHead], coteries: int, own: Sequence[bool]) -> list[RewardHead]:
    """The head that each coterie serves: its own, or the global one where the gate said so."""
    return [heads[f"coterie-{k}"] if own[k] else heads[GLOBAL] for k in range(coteries)]


@dataclass(frozen=True)
class FittedHead:
    """A head and how it was chosen: log-losses in nats a comparison, weighted by responsibility."""

    head: RewardHead
    precision: float
    train_log_loss: float
    validation_log_loss: float


def fit_global(
    train: Votes, validation: Votes, reliability: Array, precision: float | Literal["auto"] = "auto"
) -> FittedHead:
    """The head of everybody: prior around zero, all comparisons alike.

    Args:
        train: comparisons to fit.
        validation: comparisons that choose the precision and the scale.
        reliability: beta_i of each worker [n_workers].
        precision: of the prior, or "auto": least validation log-loss among GLOBAL_PRECISIONS.
    """
    everybody = np.ones(train.n_workers)
    start = np.zeros(train.x.shape[1])
    return _fit(train, validation, everybody, reliability, start, precision, GLOBAL_PRECISIONS)


def fit_coterie(
    train: Votes,
    validation: Votes,
    responsibility: Array,
    reliability: Array,
    global_head: RewardHead,
    precision: float | Literal["auto"] = "auto",
) -> FittedHead:
    """The head of one coterie: started from the global head and pulled towards it.

    Args:
        train: comparisons to fit.
        validation: comparisons that choose the precision and the scale.
        responsibility: posterior probability of this coterie for each worker [n_workers]; comparisons count by it, and
            workers below 0.05 not at all.
        reliability: beta_i of each worker [n_workers].
        global_head: centre of the prior.
        precision: of the prior, or "auto": least validation log-loss among COTERIE_PRECISIONS.

    Raises:
        BadData: no training comparison belongs to the coterie.
    """
    kept = np.where(responsibility < SMALLEST_RESPONSIBILITY, 0.0, responsibility)
    if not np.any(kept[train.worker] > 0):
        raise BadData(
            "no training comparison belongs to this coterie. Cluster again with fewer coteries (cluster.coteries or cluster.max_coteries)."
        )
    return _fit(train, validation, kept, reliability, global_head.weight, precision, COTERIE_PRECISIONS)


def _fit(
    train: Votes,
    validation: Votes,
    responsibility: Array,
    reliability: Array,
    prior_mean: Array,
    precision: float | Literal["auto"],
    grid: tuple[float, ...],
) -> FittedHead:
    x, y, weight = weighted(train, responsibility, reliability)
    held_x, held_y, held_weight = weighted(validation, responsibility, reliability)
    judged = bool(held_weight.sum() > 0)
    if precision != "auto":
        grid = (float(precision),)
    elif not judged:  # nothing to choose by: stay close to the prior
        grid = grid[-1:]
    best: tuple[float, float, Array] | None = None
    for candidate in grid:
        theta = fit_head(x, y, weight, prior_mean, candidate)
        held = mean_loss(held_x @ theta, held_y, held_weight) if judged else float("nan")
        if best is None or held < best[0]:
            best = (held, candidate, theta)
    assert best is not None
    held, chosen, theta = best
    head = RewardHead(theta)
    if judged:  # on x without beta: what a score difference means for the audience as it is
        rows = responsibility[validation.worker] > 0
        head = head.calibrated(validation.x[rows], held_y, held_weight)
    return FittedHead(head, chosen, mean_loss(x @ theta, y, weight), held)


def weighted(votes: Votes, responsibility: Array, reliability: Array) -> tuple[Array, Array, Array]:
    """beta x, y and weights of the comparisons whose worker counts."""
    weight = votes.weighted(responsibility[votes.worker])
    rows = weight > 0
    x = votes.x[rows] * reliability[votes.worker[rows]].astype(np.float32)[:, None]
    return x, votes.y[rows], weight[rows]


def mean_loss(margin: Array, y: Array, weight: Array) -> float:
    """Weighted mean log-loss of margins [n] for answers y [n], in nats."""
    return float(np.average(log_loss(np.asarray(margin, dtype=np.float64), y), weights=weight))
