"""Linear heads on the last hidden state of the global adapter: one a coterie, or theta and U of everybody by embedding.

The heads are fitted as those on the encoder's features (rewards/heads.py; docs/method, section 6): a penalised logistic
regression on differences of hidden states, which a coterie's head starts on at the global adapter's. The states are seen
through their principal components, on one scale, so that a precision of the prior means the same on any backbone, with the
global reward's own margin beside them, so that a prior of infinite precision leaves that reward. What is written reads the
whole state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from coterie.contracts import PERSONAL_FILE, SCORE, SCORES_FILE, TRAIN, VALIDATION
from coterie.discovery.features import FeatureMap
from coterie.discovery.votes import Votes, load_votes
from coterie.rewards.adapters import score_weight, write_with_head
from coterie.rewards.examples import reference_rows
from coterie.rewards.heads import (
    SMALLEST_RESPONSIBILITY,
    Array,
    RewardHead,
    fit_coterie,
    mean_loss,
    weighted,
)
from coterie.rewards.personal import fit_personal
from coterie.rewards.scored import ScoredResponses, States, compared

_COMPONENTS = 256  # of the differences of hidden states at most
_PAIRS = 100_000  # training pairs that they are estimated on


@dataclass(frozen=True)
class StateFeatures:
    """Hidden states as heads are fitted on them, [p] components and the score by `weight` behind them.

    Attributes:
        components: from hidden states to the components of their differences.
        weight: [hidden], the head that the prior lies around.
    """

    components: FeatureMap
    weight: Array

    @classmethod
    def fit(cls, states: Array, pairs: Array, weight: Array) -> Self:
        """Fit to the differences of training pairs [n, 2], rows of states [m, hidden]. Raises BadData as FeatureMap.fit."""
        some = np.random.default_rng(0).permutation(len(pairs))[:_PAIRS]
        none = np.zeros((len(states), 0), np.float32)
        return cls(FeatureMap.fit(states, none, pairs[some], _COMPONENTS, use_style=False), weight)

    @property
    def prior_mean(self) -> Array:
        """The weights [p + 1] that score as `weight` does."""
        mean: Array = np.eye(self.components.size + 1)[-1]
        return mean

    def transform(self, states: Array) -> Array:
        """Features [m, p + 1] float32 of states [m, hidden]."""
        seen = self.components.transform(states, np.zeros((len(states), 0), np.float32))
        return np.column_stack([seen, (states @ self.weight).astype(np.float32)])

    def on_states(self, weights: Array) -> Array:
        """Weights of features, [p + 1] or [p + 1, k], as weights of hidden states."""
        back = self.components.components.T.astype(np.float64) / self.components.vector_scale[:, None]
        found: Array = np.column_stack([back, self.weight]) @ weights
        return found


class _Fitting:
    """The votes of train and validation by what the global adapter says of their responses."""

    def __init__(self, embedded: Path, comparisons: Path, global_reward: Path) -> None:
        self.states, self._embedded, self._comparisons = States.load(global_reward), embedded, comparisons
        sides = [self.states.rows(ids) for ids in compared(embedded, comparisons, TRAIN)]
        weight = score_weight(global_reward)
        self.features = StateFeatures.fit(self.states.values, np.column_stack(sides), weight)
        self._seen = self.features.transform(self.states.values)
        self.train, self.validation = self._votes(TRAIN), self._votes(VALIDATION)

    def _votes(self, split: str) -> Votes:
        votes = load_votes(self._embedded / "differences.parquet", split)
        chosen, rejected = (self.states.rows(ids) for ids in compared(self._embedded, self._comparisons, split))
        return replace(votes, x=self._seen[chosen] - self._seen[rejected])

    @property
    def reference(self) -> Array:
        """The states that a reward is centred on."""
        return self.states.values[reference_rows(len(self.states.values))]


def train_coterie_head(
    embedded: Path,
    comparisons: Path,
    global_reward: Path,
    out: Path,
    audience: Array,
    reliability: Array,
    precision: float | Literal["auto"],
) -> dict[str, Any]:
    """Write to `out` the global adapter with the head of a coterie, and what it scores.

    Args:
        embedded, comparisons, audience, reliability: as of TextComparisons.read.
        global_reward: folder of the global adapter, with its states.parquet.
        out: folder to write to.
        precision: of the prior around the global head, or "auto": least validation log-loss.

    Returns:
        adapter_train_log_loss, adapter_validation_log_loss, adapter_global_validation_log_loss and adapter_scale as of
        train_adapter; adapter_precision; no steps and no curve.

    Raises:
        BadData: an input is missing or of another run, or no training comparison belongs to the coterie.
    """
    on = _Fitting(embedded, comparisons, global_reward)
    base = RewardHead(on.features.prior_mean)
    fitted = fit_coterie(on.train, on.validation, audience, reliability, base, precision)
    head = RewardHead(on.features.on_states(fitted.head.weight), scale=fitted.head.scale).centered(on.reference)
    write_with_head(head.weight, global_reward, out, head.center, head.scale)
    scored = ScoredResponses.load(global_reward).raw.index.tolist()
    raw = on.states.values[on.states.rows(scored)] @ head.weight
    SCORE.write(out / SCORES_FILE, {"response_id": scored, "score": raw})
    counts = np.where(audience < SMALLEST_RESPONSIBILITY, 0, audience)
    x, y, weight = weighted(on.validation, counts, reliability)
    return {
        "adapter_train_log_loss": fitted.train_log_loss,
        "adapter_validation_log_loss": fitted.validation_log_loss,
        "adapter_global_validation_log_loss": mean_loss(x @ base.weight, y, weight) if len(y) else float("nan"),
        "adapter_scale": head.scale,
        "adapter_precision": fitted.precision,
        "steps": 0,
        "curve": [],
    }


def train_personal_heads(
    embedded: Path, comparisons: Path, global_reward: Path, out: Path, embeddings: Array, reliability: Array
) -> dict[str, float]:
    """Write to `out` theta and U on the global adapter's hidden state, for given embeddings [n_workers, r].

    Args:
        embedded, comparisons, global_reward, out: as of train_coterie_head.
        reliability: [n_workers].

    Returns:
        rank, scale, precision, validation_log_loss.

    Raises:
        BadData: an input is missing or of another run.
    """
    on = _Fitting(embedded, comparisons, global_reward)
    found, precision = fit_personal(on.train, on.validation, embeddings, reliability, on.features.prior_mean)
    votes, places = on.validation, embeddings[on.validation.worker]
    found = found.calibrated(votes.x, votes.y, places)
    seen = found.common
    common, basis = replace(seen, weight=on.features.on_states(seen.weight)), on.features.on_states(found.basis)
    replace(found, common=common, basis=basis).centered(on.reference).save(out / PERSONAL_FILE)
    return {
        "rank": float(embeddings.shape[1]),
        "scale": common.scale,
        "precision": precision,
        "validation_log_loss": mean_loss(found.margin(votes.x, places), votes.y, np.ones(len(votes))),
    }
