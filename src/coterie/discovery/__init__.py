"""Who wants what: features, the members of the model family (docs/method, section 1), and the choice among them."""

from coterie.discovery.clustering import cluster_embeddings, fit_coteries
from coterie.discovery.features import FeatureMap
from coterie.discovery.lowrank import LowRankReward
from coterie.discovery.mixture import MixtureReward
from coterie.discovery.pooled import PooledReward, ReliabilityReward
from coterie.discovery.run import cluster, embed
from coterie.discovery.votes import Votes, load_votes

__all__ = [
    "FeatureMap",
    "LowRankReward",
    "MixtureReward",
    "PooledReward",
    "ReliabilityReward",
    "Votes",
    "cluster",
    "cluster_embeddings",
    "embed",
    "fit_coteries",
    "load_votes",
]
