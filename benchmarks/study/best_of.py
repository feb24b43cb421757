"""Policies of coteries in feature space, over the number of coteries: what benchmarks.study.policies measures.

A policy answers a prompt with the best of sixteen responses by its reward; the start answers with the first of them. A coterie's
policy goes by the coterie's reward, and everybody is answered by the policy of their most probable coterie. Everybody's own
true taste says how probably they prefer one answer to another. Responses are points of independent normal features, as in
benchmarks.settings.
"""

from __future__ import annotations

import numpy as np

from benchmarks import settings
from benchmarks.rows import Row, Task
from benchmarks.settings import SETTINGS
from coterie.config import ClusterSettings
from coterie.discovery import MixtureReward
from coterie.discovery.selection import COTERIE_PRECISIONS, HeldOut, sample_of
from coterie.discovery.votes import Array, one_thread
from coterie.simulation.annotators import Annotators

SIZES = range(1, 9)
PROMPTS, RESPONSES = 200, 16


@one_thread()
def measure(task: Task) -> Row:
    """Win rates on one data set: [setting, seed]."""
    name, seed = task
    data = settings.draw(SETTINGS[name].model_copy(update={"seed": seed}))
    base = HeldOut(sample_of(data.train, 0), ClusterSettings().splits, 0).base(data.train)
    rng = np.random.default_rng([seed, PROMPTS])
    h = rng.standard_normal((PROMPTS, RESPONSES, data.train.n_features)) / np.sqrt(2)
    wins = {}
    for size in SIZES:
        mixture = MixtureReward(size, COTERIE_PRECISIONS[1], base=base).fit(data.train)
        own = mixture.responsibilities_.argmax(axis=1)
        answers = {"own": best(h, mixture.theta_)[own], "global": best(h, base.theta_[None])[np.zeros_like(own)]}
        start = np.broadcast_to(h[:, 0], answers["own"].shape)
        told = {
            "own against global": rate(data.people, answers["own"], answers["global"]),
            "own against start": rate(data.people, answers["own"], start),
            "global against start": rate(data.people, answers["global"], start),
        }
        if size > 1:
            others = [best(h, mixture.theta_)[(own + k) % size] for k in range(1, size)]
            told["own against wrong"] = float(np.mean([rate(data.people, answers["own"], one) for one in others]))
        wins[str(size)] = told
    return {"workers": data.train.n_workers, "prompts": PROMPTS, "wins": wins}


def best(h: Array, rewards: Array) -> Array:
    """The response to every prompt that each reward [K, d] likes best: [K, prompts, d] of h [prompts, responses, d]."""
    chosen = (h @ rewards.T).argmax(axis=1)  # [prompts, K]
    return np.asarray(h[np.arange(len(h)), chosen.T])


def rate(people: Annotators, answers: Array, others: Array) -> float:
    """How probably a worker prefers the answers to the others, both [workers, prompts, d]: the mean over workers."""
    margins = np.einsum("wpd,wd->wp", answers - others, people.tastes) * people.reliability[:, None]
    return float((1 / (1 + np.exp(-margins))).mean())
