"""Policies: what answers prompts as a coterie would like it, tuned against the coterie's reward."""

from coterie.policies.align import align
from coterie.policies.policy import POLICY_FILE, Answer, Policy, PolicyCard
from coterie.policies.reward import TextReward
from coterie.policies.start import make_start

__all__ = ["POLICY_FILE", "Answer", "Policy", "PolicyCard", "TextReward", "align", "make_start"]
