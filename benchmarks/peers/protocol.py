"""The protocol: everything on the same votes, and nothing judged on what anything was fitted to.

Test prompts are in no other split. Some workers are new: no vote of theirs is in what a peer is fitted, tuned or calibrated
on. The others are seen. A peer is tuned on item-disjoint splits of the seen workers' training votes, fitted to all of these,
and its logits are scaled by one factor from their validation votes, the same rule for every peer. Seen workers are judged
on their test votes. A new worker gives k shots, drawn from their training and validation votes, several times over, and is
judged on their test votes; the shots of few are part of the shots of more. At every k those are judged who have k.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.peers import Peer, chosen, inner_splits
from benchmarks.peers.every import PEERS
from benchmarks.peers.ours import Found
from benchmarks.real import factor
from benchmarks.settings import together
from coterie.discovery import Votes
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Array, one_thread

SHOTS = (0, 5, 10, 20, 50)
SEEN = "seen"
_DECILE_COMPARISONS = 5  # a worker's accuracy over fewer is noise, not a bad reward

Figures = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Votes of the same workers, numbered alike; no prompt is in two of them."""

    train: Votes
    validation: Votes
    test: Votes


@dataclass
class Tally:
    """What the peers said of an audience's test votes, averaged over fits and draws.

    Attributes:
        y: [n], of all test votes.
        sums: by peer [3, n], how often each vote was judged, and the sums of its log-loss and of being right (a logit of
            exactly zero says nothing: half right).
    """

    y: Array
    sums: dict[str, Array] = field(default_factory=dict)

    def add(self, peer: str, rows: Array, logits: Array) -> None:
        """Judge the test votes `rows` by their logits."""
        told = self.sums.setdefault(peer, np.zeros((3, len(self.y))))
        right = np.where(logits == 0, 0.5, (logits > 0) == (self.y[rows] > 0.5))
        told[:, rows] += np.stack([np.ones(len(rows)), log_loss(logits, self.y[rows]), right])

    @property
    def judged(self) -> Array:
        """[n] bool, which test votes were."""
        return np.asarray(next(iter(self.sums.values()))[0] > 0)

    def log_loss(self, peer: str) -> Array:
        """[n], 0 where a vote was not judged."""
        return np.asarray(self.sums[peer][1] / np.maximum(self.sums[peer][0], 1))

    def right(self, peer: str) -> Array:
        """The same of being right."""
        return np.asarray(self.sums[peer][2] / np.maximum(self.sums[peer][0], 1))


def tallies(test: Votes) -> dict[str, Tally]:
    """An empty one of each audience: the seen workers, and new ones by the number of their shots."""
    return {audience: Tally(test.y) for audience in (SEEN, *map(str, SHOTS))}


@one_thread()
def confront(
    split: Split,
    new: Array,
    into: Mapping[str, Tally],
    draws: int,
    seed: int,
    calibrate: bool = True,
    peers: Mapping[str, Peer] = PEERS,
) -> Figures:
    """Let every peer learn from the seen workers, and judge it; what it said is added to `into`.

    Args:
        split: votes of all workers.
        new: [n_workers] bool, who is new.
        into: of `tallies`.
        draws: of the shots.
        seed: of inner splits, peers and shots.
        calibrate: scale the logits by one factor from the validation votes.
        peers: by name.

    Returns:
        Of each peer its settings, its factor and the seconds of processor time that it took, and what coterie found.
    """
    seen, strangers = np.flatnonzero(~new), np.flatnonzero(new)
    train, validation, test = (votes.of_workers(seen) for votes in (split.train, split.validation, split.test))
    pool, asked = together([split.train, split.validation]).of_workers(strangers), split.test.of_workers(strangers)
    rows, rows_asked = (np.flatnonzero(who[split.test.worker]) for who in (~new, new))
    splits, told = inner_splits(train, seed), Figures()
    for name, peer in peers.items():
        started = time.process_time()
        settings = chosen(peer, splits, seed)
        fitted = peer.fit(train, settings, seed)
        scale = factor(fitted, validation) if calibrate else 1.0  # type: ignore[arg-type]
        into[SEEN].add(name, rows, scale * fitted.decision_function(test))
        for draw in range(draws):
            turn = turns(pool, np.random.default_rng([seed, draw]))
            for k in SHOTS if draw == 0 else SHOTS[1:]:
                able = pool.counts >= k
                reward = fitted.adapt(pool.subset((turn < k) & able[pool.worker]))
                judged = able[asked.worker]
                into[str(k)].add(name, rows_asked[judged], scale * reward.decision_function(asked)[judged])
        told[name] = {"settings": dict(settings), "factor": scale, "seconds": round(time.process_time() - started, 1)}
        if isinstance(fitted, Found):
            told["found"] = found(fitted)
    return told


def found(fitted: Found) -> Figures:
    """What coterie found, in brief."""
    selection, tested = fitted.discovery.selection, fitted.discovery.heterogeneity
    return {
        "verdict": selection.verdict,
        "member": [selection.member, selection.size],
        "ships": selection.ships,
        "p_value": None if tested is None else tested.p_value,
        "temperature": fitted.temperature,
    }


def turns(votes: Votes, rng: np.random.Generator, last: Array | float = 0.0) -> Array:
    """The place of each vote [n] in a random order of its worker's votes, from 0; who is `last` [n] more comes later."""
    order = np.lexsort((rng.random(len(votes)), np.broadcast_to(last, len(votes)), votes.worker))
    turn = np.empty(len(votes), np.intp)
    turn[order] = np.arange(len(votes)) - (np.cumsum(votes.counts) - votes.counts)[votes.worker]
    return turn


def some_prompts(votes: Votes, share: float, seed: int) -> Array:
    """[n] bool: the votes on a random share of the prompts."""
    prompts = np.unique(votes.prompt)
    few = np.random.default_rng(seed).choice(prompts, max(1, round(share * len(prompts))), replace=False)
    return np.isin(votes.prompt, few)


def worst_tenth(votes: Votes, right: Array, valid: Array) -> float | None:
    """Mean accuracy of the tenth of the workers who are served worst, of those with five valid test votes or more."""
    count, hits = (votes.sum_by_worker(values) for values in (valid.astype(float), right * valid))
    enough = count >= _DECILE_COMPARISONS
    each = np.sort(hits[enough] / count[enough])
    return float(each[: max(1, len(each) // 10)].mean()) if len(each) else None
