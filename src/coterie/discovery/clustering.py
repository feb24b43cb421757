"""Coteries of workers: by the mixture, or by clustering their embeddings and fitting a reward for each cluster."""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans

from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import ReliabilityReward
from coterie.discovery.votes import Array, VoteSet
from coterie.errors import BadConfiguration, BadData

Method = Literal["mixture", "kmeans", "ward", "average"]

_MOST_LINKED = 20_000  # workers; agglomerative clustering holds all their distances


def cluster_embeddings(embeddings: Array, n_coteries: int, method: Method, seed: int) -> Array:
    """Cluster embeddings [n, r] by k-means, Ward, or average linkage of the cosine distance: labels [n].

    Raises:
        BadData: fewer workers than coteries.
        BadConfiguration: linkage of so many workers that their distances do not fit in memory.
    """
    if n_coteries > len(embeddings):
        raise BadData(f"{n_coteries} coteries of {len(embeddings)} workers; ask for 1 to {len(embeddings)}")
    if n_coteries == 1:
        return np.zeros(len(embeddings), np.intp)
    if method == "kmeans":
        distinct = len(np.unique(embeddings, axis=0))
        return np.asarray(KMeans(min(n_coteries, distinct), n_init=10, random_state=seed).fit_predict(embeddings))
    if len(embeddings) > _MOST_LINKED:
        raise BadConfiguration(
            f"{method} linkage of {len(embeddings)} workers needs all their distances in memory; up to "
            f"{_MOST_LINKED} workers it is possible. Choose the method mixture or kmeans."
        )
    if method == "ward":
        return np.asarray(AgglomerativeClustering(n_coteries, linkage="ward").fit_predict(embeddings))
    null = np.abs(embeddings).sum(axis=1) == 0
    directed = np.where(null[:, None], 1.0, embeddings)  # which has no direction
    return np.asarray(AgglomerativeClustering(n_coteries, metric="cosine", linkage="average").fit_predict(directed))


def fit_coteries(
    votes: VoteSet,
    n_coteries: int,
    method: Method,
    base: ReliabilityReward,
    precision: float,
    rank: int,
    seed: int,
    embeddings: Array | None = None,
) -> MixtureReward:
    """Fit K coteries to votes by any method; rewards and posteriors are a mixture's in every case.

    Args:
        votes: training votes.
        n_coteries: K.
        method: mixture, or how to cluster the embeddings of the workers who vote.
        base: fitted on the same votes.
        precision: of the prior of a coterie's reward around the pooled one.
        rank: of the embeddings, where they are not given.
        seed: of k-means.
        embeddings: [n_workers, r], learned from the same votes; None: learn them here.
    """
    mixture = MixtureReward(n_coteries, precision, base.reliability_variance, base, seed=seed)
    if method == "mixture" or n_coteries == 1:
        return mixture.fit(votes)
    if embeddings is None:
        embeddings = LowRankReward(rank, base.precision, base=base, seed=seed).fit(votes).embeddings_
    labels = np.zeros(votes.n_workers, np.intp)
    labels[votes.present] = cluster_embeddings(embeddings[votes.present], n_coteries, method, seed)
    return mixture.fit(votes, labels=labels)
