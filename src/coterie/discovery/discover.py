"""The verdict: one taste, tastes that vary by degrees, or coteries (docs/method, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coterie.config import ClusterSettings, EmbedSettings
from coterie.contracts import Candidate, Estimate, Heterogeneity, Selection, Ships, Verdict
from coterie.discovery.clustering import fit_coteries
from coterie.discovery.heterogeneity import heterogeneity
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import ReliabilityReward, Reward
from coterie.discovery.selection import (
    Choice,
    HeldOut,
    beats,
    candidate,
    paired,
    sample_of,
    select_coteries,
    select_embedding,
)
from coterie.discovery.slopes import SlopesReward
from coterie.discovery.stability import DISTINCT, STABLE, half_split_ari
from coterie.discovery.votes import Array, VoteSet, one_thread
from coterie.errors import BadData

LEVEL = 0.05  # of the test
_RESAMPLES, _INTERVAL = 1000, 0.9

Embedding = LowRankReward | SlopesReward


@dataclass(frozen=True)
class Learned:
    """What embed learns: the choice of a member, and the member fitted on all votes.

    Where no member beats pooled + reliability, `choice.size` is 0, and the embedding has one direction all the same.
    """

    choice: Choice
    base: ReliabilityReward
    embedding: Embedding


@dataclass(frozen=True)
class Discovery:
    """What was found in votes.

    Attributes:
        selection: the verdict, what is shipped, and what was tried.
        heterogeneity: the test of differing tastes; None where none was asked for.
        stability: half-split ARI of the coteries; None where there is one, or no two halves.
        base: pooled + reliability, on all votes.
        mixture: the coteries, on all votes.
        embedding: the member with worker embeddings, on all votes.
        heldout: the splits on which it was decided.
        prior: of the mixture's rewards.
    """

    selection: Selection
    heterogeneity: Heterogeneity | None
    stability: float | None
    base: ReliabilityReward
    mixture: MixtureReward
    embedding: Embedding
    heldout: HeldOut
    prior: float

    @property
    def reward(self) -> Reward:
        """The fitted member that is shipped."""
        shipped: dict[Ships, Reward] = {
            "one-reward": self.base,
            "embedding": self.embedding,
            "coteries": self.mixture,
        }
        return shipped[self.selection.ships]


def learn(votes: VoteSet, settings: EmbedSettings) -> Learned:
    """Choose and fit the member with worker embeddings: on a sample the former, on all votes the latter."""
    with one_thread():
        choice = select_embedding(HeldOut(sample_of(votes, settings.seed), settings.splits, settings.seed), settings)
        base = choice.heldout.base(votes)
        embedding = fit_embedding(votes, choice.member, choice.size, choice.prior, base, settings.seed)
    return Learned(choice, base, embedding)


def fit_embedding(
    votes: VoteSet, member: str, size: int, prior: float, base: ReliabilityReward, seed: int
) -> Embedding:
    """Fit a member with embeddings; of pooled + reliability, which has none, a low rank of one direction."""
    if member == "slopes":
        return SlopesReward(prior, base=base).fit(votes)
    return LowRankReward(max(size, 1), base.precision, prior or 100.0, base=base, seed=seed).fit(votes)


def discover(votes: VoteSet, embed: EmbedSettings, cluster: ClusterSettings) -> Discovery:
    """Embed and cluster training votes, and decide. Raises BadData as `decide` does."""
    learned = learn(votes, embed)
    choice = learned.choice
    return decide(votes, learned.embedding, (choice.member, choice.size, choice.prior), cluster)


def decide(
    votes: VoteSet, embedding: Embedding, described: tuple[str, int, float], settings: ClusterSettings
) -> Discovery:
    """Choose the number of coteries, test, and give the verdict.

    Args:
        votes: training votes.
        embedding: fitted on them.
        described: the member's name, directions and prior; "reliability" and 0 where nothing beat that.
        settings: of the cluster stage.

    Raises:
        BadData: a number of coteries was asked for that the workers cannot fill.
    """
    voting = int(votes.present.sum())
    if settings.coteries != "auto" and not 1 <= settings.coteries <= voting:
        raise BadData(
            f"cluster.coteries = {settings.coteries}, but {voting} workers have training comparisons; "
            f"ask for 1 to {voting}, or auto"
        )
    with one_thread():
        return _decide(votes, embedding, described, settings)


def _decide(
    votes: VoteSet, embedding: Embedding, described: tuple[str, int, float], settings: ClusterSettings
) -> Discovery:
    voting = int(votes.present.sum())
    sample = sample_of(votes, settings.seed)
    heldout = HeldOut(sample, settings.splits, settings.seed)
    share = int(sample.present.sum()) / voting
    rank = embedding.basis_.shape[1]
    choice = select_coteries(heldout, settings, rank, max(int(np.ceil(share * settings.min_workers)), 1))
    base = heldout.base(votes)
    mixture = _fit_mixture(votes, choice, settings, base, embedding)
    stability = None
    if mixture.n_coteries > 1:
        stability = half_split_ari(
            sample,
            mixture.n_coteries,
            settings.method,
            heldout,
            mixture.precision,
            rank,
            settings.splits,
            settings.seed,
        )
    tested = heterogeneity(heldout, settings.replicates, settings.seed) if settings.replicates else None

    member, size, prior = described
    candidates, losses = list(choice.candidates), list(choice.losses)
    if heldout.splits and size > 0:
        fits = heldout.fit(lambda train, base: fit_embedding(train, member, size, prior, base, settings.seed))
        losses.append(heldout.losses(fits))
        candidates.append(candidate(member, size, losses[-1], choice.losses[1]))
    evidence = _Evidence(candidates, losses, mixture.n_coteries, (member, size), stability, tested)
    verdict, member, size = evidence.verdict()
    ships = _ships(verdict, described[1], mixture.n_coteries) if settings.ship == "auto" else settings.ship
    if settings.coteries != "auto" and settings.ship == "auto":
        ships = "coteries" if settings.coteries > 1 else "one-reward"
    selection = Selection(
        verdict=verdict,
        member=member,
        size=size,
        coteries=mixture.n_coteries,
        ships=ships,
        insisted=settings.coteries != "auto" or settings.ship != "auto",
        confidence=evidence.confidence(settings.seed),
        gain=evidence.gain(settings.seed),
        candidates=[c.model_copy(update={"chosen": (c.member, c.size) == (member, size)}) for c in candidates],
    )
    return Discovery(selection, tested, stability, base, mixture, embedding, heldout, mixture.precision)


def _ships(verdict: Verdict, directions: int, coteries: int) -> Ships:
    if verdict == "continuous":
        return "embedding" if directions else "coteries"
    return "coteries" if verdict == "coteries" and coteries > 1 else "one-reward"


def _fit_mixture(
    votes: VoteSet, choice: Choice, settings: ClusterSettings, base: ReliabilityReward, embedding: Embedding
) -> MixtureReward:
    """The coteries on all votes; fewer than chosen where one would be smaller than the settings allow."""
    given = None if settings.method == "mixture" else embedding.embeddings_
    rank = embedding.basis_.shape[1]
    for size in range(choice.size, 0, -1):
        mixture = fit_coteries(votes, size, settings.method, base, choice.prior or 100.0, rank, settings.seed, given)
        if size == 1 or mixture.smallest_ >= settings.min_workers:
            return mixture
        if settings.coteries != "auto":
            raise BadData(
                f"cluster.coteries = {size}: the smallest coterie would have {mixture.smallest_} workers, at least "
                f"{settings.min_workers} are asked for; ask for fewer coteries, or lower cluster.min_workers"
            )
    return mixture


@dataclass(frozen=True)
class _Evidence:
    """Held-out log-loss of each worker under each candidate, and what else the verdict rests on."""

    candidates: list[Candidate]
    losses: list[Array]
    coteries: int
    embedding: tuple[str, int]
    stability: float | None
    tested: Heterogeneity | None

    def _loss(self, key: tuple[str, int], rows: Array | slice) -> Array | None:
        found = (loss[rows] for c, loss in zip(self.candidates, self.losses, strict=True) if (c.member, c.size) == key)
        return next(found, None)

    def verdict(self, rows: Array | slice = slice(None)) -> tuple[Verdict, str, int]:
        """The verdict, and the member and size that it rests on, as the workers in `rows` have it."""
        none: tuple[Verdict, str, int] = ("one-taste", "reliability", 1)
        reference = self._loss(("reliability", 1), rows)
        if reference is None or (self.tested is not None and self.tested.p_value >= LEVEL):
            return none
        groups = self._loss(("mixture", self.coteries), rows) if self.coteries > 1 else None
        degrees = self._loss(self.embedding, rows) if self.embedding[1] else None
        grouped = groups is not None and beats(*paired(reference, groups))
        graded = degrees is not None and beats(*paired(reference, degrees))
        if not grouped and not graded:
            return none
        if grouped and self.stability is not None and self.stability >= STABLE:
            behind, error = paired(groups, degrees) if graded else (0.0, 0.0)  # type: ignore[arg-type]
            if behind <= error or self.stability >= DISTINCT:
                return "coteries", "mixture", self.coteries
        return ("continuous", *self.embedding) if graded else ("continuous", "mixture", self.coteries)

    def confidence(self, seed: int) -> float | None:
        """Share of resamples of the workers that give the same verdict, test and stability being what they are."""
        if not self.losses:
            return None
        mine, n = self.verdict()[0], len(self.losses[0])
        rng = np.random.default_rng(seed)
        same = [self.verdict(rng.integers(0, n, n))[0] == mine for _ in range(_RESAMPLES)]
        return float(np.mean(same))

    def gain(self, seed: int) -> Estimate | None:
        """What the best taste member gains over pooled + reliability, with a bootstrap interval over workers."""
        tastes = [loss for c, loss in zip(self.candidates, self.losses, strict=True) if c.member not in _SIMPLE]
        reference = self._loss(("reliability", 1), slice(None))
        if reference is None or not tastes:
            return None
        gains = np.array([reference - loss for loss in tastes])
        best = gains[int(np.argmax(np.nanmean(gains, axis=1)))]
        best = best[np.isfinite(best)]
        rng = np.random.default_rng(seed)
        means = [best[rng.integers(0, len(best), len(best))].mean() for _ in range(_RESAMPLES)]
        low, high = np.quantile(means, [(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2])
        return Estimate(value=float(best.mean()), low=float(low), high=float(high), level=_INTERVAL)


_SIMPLE = ("pooled", "reliability")
