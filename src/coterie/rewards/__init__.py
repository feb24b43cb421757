"""Rewards: linear heads on frozen features, and adapters of a backbone."""

from coterie.rewards.heads import (
    SMALLEST_RESPONSIBILITY,
    FittedHead,
    RewardHead,
    fit_coterie,
    fit_global,
    fit_head,
    served_heads,
    serving_own,
)
from coterie.rewards.personal import PersonalHead
from coterie.rewards.train import train_reward

__all__ = [
    "SMALLEST_RESPONSIBILITY",
    "FittedHead",
    "PersonalHead",
    "RewardHead",
    "fit_coterie",
    "fit_global",
    "fit_head",
    "served_heads",
    "serving_own",
    "train_reward",
]
