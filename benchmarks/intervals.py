"""How often intervals hold the truth: simulated votes whose population values are known.

    python -m benchmarks.intervals [--datasets 1000] [--seed 0] [--settings balanced ukp ...]

Every data set draws new workers, new prompts and new votes. A worker weighs the features of a comparison by a taste of
their own and answers with a reliability of their own; a prompt moves the weights of all who judge it, and in some settings
each worker's apart. Two fixed rewards are judged on these votes as in coterie.evaluation: macro accuracy and log-loss of
one, and the paired differences between the two. The truth is their mean over the population of workers and prompts, from
DRAWS workers who each judge one prompt, with the votes integrated out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from threadpoolctl import threadpool_limits

from coterie.bootstrap import TwoWayBootstrap
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Votes
from coterie.progress import progress

Array = NDArray[Any]

LEVEL, REPLICATES, TIES, DRAWS = 0.9, 400, 0.1, 4_000_000
BATCH = 25  # data sets that a process makes at a time
FEATURES = 6
_FRAME = np.linalg.qr(np.random.default_rng(7).standard_normal((FEATURES, 3)))[0].T
TASTE = 1.5 * _FRAME[0]  # of the mean worker on the mean prompt
REWARDS = np.stack(  # [FEATURES, 2]: the judged one, and its baseline
    [
        1.3 * (np.sqrt(0.9) * _FRAME[0] + np.sqrt(0.1) * _FRAME[1]),
        1.1 * (np.sqrt(0.7) * _FRAME[0] + np.sqrt(0.3) * _FRAME[2]),
    ],
    axis=1,
)

Amounts = Callable[[Array, np.random.Generator], Array]  # comparisons of workers of these reliabilities


def _unequal(reliability: Array, rng: np.random.Generator, power: float = 0.0, spread: float = 1.2) -> Array:
    amounts = 12 * reliability**power * np.exp(spread * rng.standard_normal(len(reliability)))
    return np.clip(amounts, 1, 300).astype(int)


def _careful_do_more(reliability: Array, rng: np.random.Generator) -> Array:
    return _unequal(reliability, rng, power=2, spread=0.3)


def _careless_do_more(reliability: Array, rng: np.random.Generator) -> Array:
    return _unequal(reliability, rng, power=-2, spread=0.3)


def _crowd(reliability: Array, rng: np.random.Generator) -> Array:
    """As in UKPConvArg1: 4 in the median, 17 in the mean."""
    n = len(reliability)
    return np.minimum(rng.geometric(1 / 3, n) + (2 * rng.pareto(1.1, n)).astype(int) + 1, 300)


@dataclass(frozen=True)
class Setting:
    """Who judges what, and how much workers and prompts matter.

    Attributes:
        prompts: None gives every comparison a prompt of its own.
        amounts: comparisons of a worker.
        pairs: different comparisons of a prompt.
        visits: prompts of a worker; None: all.
        popularity: exponent of the Zipf law by which prompts are judged.
        taste: standard deviation of a worker's weights. care: of their log reliability.
        shared: of what a prompt adds to everybody's weights. own: of what it adds to each worker's.
        judged: the first so many workers are a coterie whose intervals are wanted; None: all.
    """

    workers: int = 100
    prompts: int | None = 60
    amounts: int | Amounts = 20
    pairs: int = 8
    visits: int | None = None
    popularity: float = 0.0
    taste: float = 0.6
    care: float = 0.5
    shared: float = 0.5
    own: float = 0.0
    judged: int | None = None

    @property
    def population(self) -> tuple[float, float, float]:
        """What the truth depends on: taste, care, and all that a prompt adds."""
        return self.taste, self.care, float(np.hypot(self.shared, self.own))


SETTINGS = {
    "balanced": Setting(prompts=80),
    "few workers": Setting(workers=12, prompts=80),
    "fewest workers": Setting(workers=10, prompts=80),
    "a coterie of twelve": Setting(workers=120, prompts=80, judged=12),
    "few prompts": Setting(prompts=12, amounts=10),
    "three prompts": Setting(workers=200, prompts=3, amounts=3),
    "few workers and prompts": Setting(workers=12, prompts=12, amounts=12),
    "unequal amounts": Setting(workers=80, amounts=_unequal),
    "careful do more": Setting(workers=80, amounts=_careful_do_more),
    "careless do more": Setting(workers=80, amounts=_careless_do_more),
    "few who do more if careful": Setting(workers=15, amounts=_careful_do_more),
    "ukp": Setting(workers=400, prompts=32, amounts=_crowd, pairs=500, visits=3),
    "ukp, six prompts": Setting(workers=400, prompts=6, amounts=_crowd, pairs=500, visits=3),
    "tl;dr": Setting(workers=30, prompts=300, amounts=12, pairs=3),
    "three votes each": Setting(workers=300, prompts=40, amounts=3),
    "strong prompts": Setting(prompts=40, pairs=1, shared=1.0),
    "popular prompts": Setting(popularity=1.0),
    "no prompt effect": Setting(prompts=None, pairs=1, shared=0.0),
    "no worker effect": Setting(workers=60, prompts=40, taste=0.0, care=0.0),
    "personal prompts": Setting(workers=60, prompts=40, visits=4, own=1.0),
}
STATISTICS = ("accuracy", "log_loss", "accuracy difference", "log_loss difference")


def workers(n: int, taste: float, care: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Weights [n, FEATURES] and reliabilities [n] of n workers."""
    reliability = np.exp(care * rng.standard_normal(n))
    return reliability[:, None] * (TASTE + taste * rng.standard_normal((n, FEATURES))), reliability


def simulate(setting: Setting, rng: np.random.Generator) -> Votes:
    """One data set."""
    taste, reliability = workers(setting.workers, setting.taste, setting.care, rng)
    amounts = setting.amounts
    counts = amounts(reliability, rng) if callable(amounts) else np.full(setting.workers, amounts)
    worker = np.repeat(np.arange(setting.workers), counts)
    n = len(worker)
    prompt = np.arange(n) if setting.prompts is None else _prompts(setting, counts, rng)
    x = rng.standard_normal((prompt.max() + 1, setting.pairs, FEATURES))[prompt, rng.integers(0, setting.pairs, n)]
    weights = taste[worker] + setting.shared * rng.standard_normal((prompt.max() + 1, FEATURES))[prompt]
    if setting.own:
        cells, cell = np.unique(worker * n + prompt, return_inverse=True)
        weights += setting.own * rng.standard_normal((len(cells), FEATURES))[cell]
    chosen = rng.random(n) < expit((x * weights).sum(axis=1))
    x[~chosen] *= -1  # every row is chosen minus rejected
    return Votes.of(x, np.where(rng.random(n) < TIES, 0.5, 1), worker, prompt, setting.workers)


def _prompts(setting: Setting, counts: Array, rng: np.random.Generator) -> Array:
    """Which prompt each comparison is of: a worker's are different ones as long as there are."""
    assert setting.prompts is not None
    if setting.popularity:
        popularity = np.arange(1.0, setting.prompts + 1) ** -setting.popularity
        return rng.choice(setting.prompts, counts.sum(), p=popularity / popularity.sum())
    shuffled = rng.permuted(np.tile(np.arange(setting.prompts), (len(counts), 1)), axis=1)
    turn = np.concatenate([np.arange(count) for count in counts])
    return shuffled[np.repeat(np.arange(len(counts)), counts), turn % (setting.visits or setting.prompts)]


def judged(margins: Array, y: Array | float) -> tuple[Array, Array]:
    """Hits and losses [2, n] of the judged reward and of its difference to the baseline; margins [n, 2], y 1 or .5."""
    hits, losses = (margins > 0).T.astype(float), log_loss(margins.T, y)
    return np.stack([hits[0], hits[0] - hits[1]]), np.stack([losses[0], losses[0] - losses[1]])


def truth(taste: float, care: float, of_prompt: float) -> Array:
    """[STATISTICS] means of a population."""
    rng = np.random.default_rng(1)
    total, part = np.zeros(len(STATISTICS)), DRAWS // 20
    for _ in range(20):
        weights, _ = workers(part, taste, care, rng)
        x = rng.standard_normal((part, FEATURES))
        weights += of_prompt * rng.standard_normal((part, FEATURES))
        first = expit((x * weights).sum(axis=1))  # chance of the one that x is oriented towards
        margins = x @ REWARDS
        (hits, losses), (misses, others) = judged(margins, 1), judged(-margins, 1)
        _, tied = judged(margins, 0.5)
        accuracy = (first * hits + (1 - first) * misses).mean(axis=1)
        loss = (1 - TIES) * (first * losses + (1 - first) * others).mean(axis=1) + TIES * tied.mean(axis=1)
        total += [accuracy[0], loss[0], accuracy[1], loss[1]]
    return total / 20


def intervals(task: tuple[str, int, range]) -> tuple[str, Array, float]:
    """Low and high [datasets, STATISTICS, 2] of some data sets of a setting, and the seconds that took."""
    name, seed, numbers = task
    setting, started, made = SETTINGS[name], time.perf_counter(), []
    with threadpool_limits(1):
        for number in numbers:
            votes = simulate(setting, np.random.default_rng([seed, number, *name.encode()]))
            bootstrap = TwoWayBootstrap(votes, REPLICATES, LEVEL, number)
            people = np.arange(votes.n_workers) < (setting.judged or votes.n_workers)
            hits, losses = judged(votes.x @ REWARDS.astype(np.float32), votes.y)
            decided, everything = votes.y != 0.5, np.ones(len(votes), dtype=bool)
            estimates = [
                bootstrap.estimate(values, valid, people)
                for of_hits, of_losses in zip(hits, losses, strict=True)
                for values, valid in ((of_hits, decided), (of_losses, everything))
            ]
            made.append([(estimate.low, estimate.high) for estimate in estimates])
    return name, np.array(made, dtype=float), time.perf_counter() - started


def summary(ends: Array, true: float, seconds: float) -> dict[str, Any]:
    """Of the intervals [datasets, 2]: how many hold the truth, lie above it (missed low) and below it, as shares."""
    low, high = ends[~np.isnan(ends[:, 0])].T
    above, below = float((true < low).mean()), float((true > high).mean())
    covered = 1 - above - below
    return {
        "covered": round(covered, 4),
        "standard_error": round(float(np.sqrt(covered * (1 - covered) / len(low))), 4),
        "datasets": len(low),
        "level": LEVEL,
        "truth": round(true, 5),
        "mean_width": round(float((high - low).mean()), 5),
        "missed_low": round(above, 4),
        "missed_high": round(below, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure the settings in two processes, write the figures, and say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000, help="of each setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "intervals.json")
    options = parser.parse_args()
    tasks = [
        (name, options.seed, range(first, min(first + BATCH, options.datasets)))
        for name in options.settings
        for first in range(0, options.datasets, BATCH)
    ]
    populations = sorted({SETTINGS[name].population for name in options.settings})
    ends: dict[str, list[Array]] = {name: [] for name in options.settings}
    seconds = dict.fromkeys(options.settings, 0.0)
    with (
        multiprocessing.get_context("spawn").Pool(2) as pool,
        progress(total=len(options.settings) * options.datasets, desc="intervals", unit="data sets") as bar,
    ):
        truths = pool.starmap_async(truth, populations)
        for name, made, took in pool.imap_unordered(intervals, tasks):
            ends[name].append(made)
            seconds[name] += took
            bar.update(len(made))
        true = dict(zip(populations, truths.get(), strict=True))
    figures = {
        name: {
            statistic: summary(
                np.concatenate(ends[name])[:, i], float(true[SETTINGS[name].population][i]), seconds[name]
            )
            for i, statistic in enumerate(STATISTICS)
        }
        for name in options.settings
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    for name, of in figures.items():
        print(f"{name:28}", *(f"{100 * of[statistic]['covered']:6.1f} %" for statistic in STATISTICS))


if __name__ == "__main__":
    main()
