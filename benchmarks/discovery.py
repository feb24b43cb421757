"""Speed and memory of the members of the model family, each beside its reference in the same run.

    python -m benchmarks.discovery [--out benchmarks/results/discovery.json] [--repeats 3]

Every measurement is a process of its own (peak memory by getrusage), on the standard groups of docs/method, section 8: four
groups, 100 comparisons a worker, 128 independent features. Reference of the mixture and the low-rank member: scikit-learn's
LogisticRegression (lbfgs) on the pooled data, under the same prior and stopped at the same largest component of the gradient
of the mean penalised log-loss (1e-4, its default tolerance and ours). Reference of the low-rank member at 1e5 comparisons:
LoRe-like worker embeddings and reward by full-batch Adam in torch, 1,000 steps at most, its clock stopped at the first step
whose held-out log-loss reaches that of the low-rank member; judging the held-out votes is not on its clock. Twice: with its
rate tuned, as published, and with its weight decay tuned on the held-out votes as well, which nobody could do in earnest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from coterie.discovery import LowRankReward, MixtureReward, ReliabilityReward, Votes

TOLERANCE, PRECISION = 1e-4, 10.0
FEATURES, COMPARISONS, GROUPS = 128, 100, (0.4, 0.3, 0.2, 0.1)
LEARNING_RATES, WEIGHT_DECAYS, ADAM_STEPS = (0.5, 0.1, 0.03), (1e-4, 3e-4, 1e-3), 1000


def simulated(workers: int, seed: int = 0) -> Votes:
    """Standard groups with FEATURES features, filled a worker at a time so that x is the only large array."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(np.random.default_rng(7).standard_normal((FEATURES, len(GROUPS) + 1)))[0].T
    tastes = 1.99 * (np.sqrt(0.7) * frame[0] + np.sqrt(0.3) * frame[1:])
    group = np.random.default_rng(8).choice(len(GROUPS), workers, p=GROUPS)
    x = np.empty((workers * COMPARISONS, FEATURES), np.float32)
    for i in range(workers):
        rows = x[i * COMPARISONS : (i + 1) * COMPARISONS]
        rng.standard_normal(dtype=np.float32, out=rows)
        logits = rows @ tastes[group[i]].astype(np.float32)
        rows[rng.random(COMPARISONS) > 1 / (1 + np.exp(-logits))] *= -1
    worker = np.repeat(np.arange(workers, dtype=np.int32), COMPARISONS)
    return Votes.of(x, np.ones(len(x), np.float32), worker, n_workers=workers)


def logistic_regression(workers: int) -> dict[str, float]:
    """scikit-learn on the pooled data; half the rows are turned round, since it wants both classes."""
    from sklearn.linear_model import LogisticRegression

    votes = simulated(workers)
    y = np.arange(len(votes)) % 2 == 0
    votes.x[~y] *= -1
    model = LogisticRegression(C=1 / PRECISION, fit_intercept=False, tol=TOLERANCE, max_iter=1000)
    started = time.perf_counter()
    model.fit(votes.x, y)
    seconds = time.perf_counter() - started
    theta = model.coef_[0].astype(np.float32)
    gradient = votes.x.T @ (y - 1 / (1 + np.exp(-(votes.x @ theta)))) - PRECISION * theta
    return {
        "seconds": seconds,
        "gradient": float(np.abs(gradient).max()) / len(votes),
        "iterations": int(model.n_iter_[0]),
    }


def member(name: str, workers: int) -> dict[str, float]:
    """Pooled + reliability, the mixture (K = 4) or the low-rank member (r = 4), from votes to fitted, nothing given."""
    made = {
        "reliability": ReliabilityReward(PRECISION, tol=TOLERANCE),
        "mixture": MixtureReward(4, tol=TOLERANCE),
        "lowrank": LowRankReward(4, PRECISION, tol=TOLERANCE),
    }[name]
    votes = simulated(workers)
    started = time.perf_counter()
    made.fit(votes)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "gradient": made.gradient_, "iterations": made.n_iter_}


def against_adam(workers: int) -> dict[str, Any]:
    """Our low-rank member and Adam, both judged on other comparisons of the same workers."""
    train, test = simulated(workers), simulated(workers, seed=1)
    started = time.perf_counter()
    ours = LowRankReward(4, PRECISION, tol=TOLERANCE).fit(train)
    seconds, loss = time.perf_counter() - started, -ours.score(test)
    figures: dict[str, Any] = {"seconds": seconds, "log_loss": loss}
    for name, decays in (("rate tuned", (0.0,)), ("rate and weight decay tuned", WEIGHT_DECAYS)):
        runs = [adam(train, test, rate, decay, loss) for rate in LEARNING_RATES for decay in decays]
        best = min(runs, key=lambda run: (run["best_log_loss"] > loss, run["seconds"]))
        figures[name] = best | {"times_faster": best["seconds"] / seconds, "reached": best["best_log_loss"] <= loss}
    return figures


def adam(train: Votes, test: Votes, rate: float, decay: float, target: float, rank: int = 4) -> dict[str, float]:
    """Full-batch Adam on theta, U and all a_i, until it reaches the target or has made all its steps."""
    import torch

    torch.manual_seed(0)
    x, worker = torch.from_numpy(train.x), torch.from_numpy(train.worker).long()
    held, of = torch.from_numpy(test.x), torch.from_numpy(test.worker).long()
    theta = torch.zeros(train.n_features, requires_grad=True)
    basis = (0.1 * torch.randn(train.n_features, rank)).requires_grad_()
    embeddings = (0.1 * torch.randn(train.n_workers, rank)).requires_grad_()
    optimiser = torch.optim.Adam([theta, basis, embeddings], lr=rate)

    def loss(x: torch.Tensor, worker: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-(x @ theta + ((x @ basis) * embeddings[worker]).sum(dim=1))).mean()

    seconds, best = 0.0, np.inf
    for step in range(1, ADAM_STEPS + 1):  # noqa: B007 - read after the loop
        started = time.perf_counter()
        optimiser.zero_grad()
        penalty = decay * (basis.square().sum() + embeddings.square().sum())
        (loss(x, worker) + penalty).backward()
        optimiser.step()
        seconds += time.perf_counter() - started
        with torch.no_grad():
            best = min(best, float(loss(held, of)))  # every worker has equally many, so that this is macro over workers
        if best <= target:
            break
    return {"seconds": seconds, "steps": step, "best_log_loss": best, "rate": rate, "weight_decay": decay}


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call in a fresh process, and add its peak memory in bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, arguments))


def _measured(function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    figures = function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return figures | {"peak_memory": peak}


def typical(repeats: int, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The run with the median time of several."""
    runs = sorted((alone(function, *arguments) for _ in range(repeats)), key=lambda run: run["seconds"])
    return runs[len(runs) // 2]


def main() -> None:
    """Run everything, write the results, and say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "discovery.json")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement; the median is reported")
    parser.add_argument(
        "--workers", type=int, default=10_000, help="workers of the large setting, 100 comparisons each"
    )
    options = parser.parse_args()
    large, small = options.workers, options.workers // 10
    threads = max(library["num_threads"] for library in threadpool_info())
    figures: dict[str, Any] = {"cores": os.cpu_count(), "threads": threads, "machine": platform.machine()}
    figures["tolerance"] = TOLERANCE
    for workers in (small, large):
        n = str(workers * COMPARISONS)
        figures[n] = {"scikit-learn pooled": typical(options.repeats, logistic_regression, workers)}
        for name in ("reliability", "mixture", "lowrank"):
            figures[n][name] = typical(options.repeats, member, name, workers)
            print(n, name, figures[n][name], flush=True)
    big, little = figures[str(large * COMPARISONS)], figures[str(small * COMPARISONS)]
    reference = big["scikit-learn pooled"]["seconds"]
    figures["summary"] = {
        f"{name} {what}": value
        for name in ("mixture", "lowrank")
        for what, value in (
            ("times scikit-learn", big[name]["seconds"] / reference),
            ("growth", big[name]["seconds"] / little[name]["seconds"]),
            ("peak GB", big[name]["peak_memory"] / 1e9),
        )
    }
    figures["adam"] = alone(against_adam, small)
    for name in ("rate tuned", "rate and weight decay tuned"):
        against = figures["adam"][name]
        told = "" if against["reached"] else ", which does not get there, at least"
        figures["summary"][f"lowrank times faster than Adam, {name}{told}"] = against["times_faster"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures["summary"], indent=2))


if __name__ == "__main__":
    main()
