"""Are the coteries' rewards those of their people, and is what they choose what their people prefer?

    python -m benchmarks.policies                      everything (hours; interrupted, it resumes)
    python -m benchmarks.policies --prompts 40 --samples 4 --out FILE

Standard groups (docs/method, section 8: 400 workers x 100 training comparisons, four groups of 40/30/20/10 %) judge pairs of
real texts, their tastes planted on the style features: TL;DR summaries, and arguments of UKPConvArg1. From these votes the
pipeline of `coterie run` makes the rewards. They are compared with oracles, the same heads told everybody's true group.

Then SmolLM2, fine-tuned on the chosen summaries of training posts to write the TL;DR of a post of which it sees the title,
answers test titles 1 + 16 times. Each reward chooses among the same 16; the first answer is the start's. Who wins is said by
the simulated annotators themselves, each for the coterie that the pipeline put them in, and by held-out judges.

Then the policy of the largest coterie is tuned from that start by PPO, with three seeds, on titles of training posts. How far
its mean reward rises is told in standard deviations of the start's answers, beside what the best of 16 reaches by choosing.

Posts of which there are most summaries train, since they give most pairs; 800 others test.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from sklearn.metrics import adjusted_rand_score

from benchmarks.scale import peak_memory
from coterie import stages
from coterie.bootstrap import TwoWayBootstrap
from coterie.bundle import Bundle
from coterie.config import (
    AlignSettings,
    BundleSettings,
    ClusterSettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    JudgeSettings,
    RewardSettings,
)
from coterie.contracts import ASSIGNMENT, GLOBAL, TEST, TRAIN, VALIDATION, Estimate, content_id, matrix, write_text
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Array, load_votes
from coterie.policies.align import align
from coterie.policies.best_of_n import best_of_n
from coterie.policies.judges import Answers, Judge, heldout_judges, true_judges
from coterie.policies.judging import Comparison, win_rates
from coterie.policies.policy import POLICY_FILE, Answer, Policy
from coterie.policies.start import make_start
from coterie.progress import progress
from coterie.rewards import RewardHead, fit_coterie, fit_global
from coterie.scoring import Question, average, load_scorer
from coterie.simulation import SimulationSettings, simulate
from coterie.simulation.truth import SimulatedTruth
from coterie.staging import content_digest

DATA = Path(__file__).parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "policies.json"
WORK = Path(tempfile.gettempdir()) / "coterie-benchmarks" / "policies"

WORKERS, GROUPS = 400, 4
AMOUNTS = {TRAIN: 100, VALIDATION: 25, TEST: 50}  # comparisons of a worker
START = AlignSettings(
    method="ppo", sft_steps=32, batch_size=8, learning_rate=2e-4, dtype="bfloat16", response_tokens=48
)
TUNED = START.model_copy(update={"sft_steps": 0, "steps": 24, "learning_rate": 1e-4})
RISE, DIVERGENCE = 1.0, 10.0  # standard deviations of the start's answers at least, at less than so many nats
CHUNK = 8  # prompts that are answered, and kept, together
RECOVERED = 0.9  # of the gap, and of the oracle's own minus wrong: the least that is asked for
WIN_RATES = {"start": 0.65, GLOBAL: 0.55, "wrong": 0.60}  # the least of own against these, at equal length


class Pair(NamedTuple):
    """Two responses to a prompt, and the split of the prompt."""

    prompt_id: str
    prompt: str
    first: str
    second: str
    split: str


# --------------------------------------------------------------------------------------------------------------- the texts
def tldr() -> list[Pair]:
    """Every two summaries of a post, whose prompt is its title."""
    titles: dict[str, str] = {}
    summaries: dict[str, set[str]] = defaultdict(set)
    for file in ("openai_sff_batch13.json.gz", "openai_sff_batch18.json.gz"):
        for row in _lines(DATA / file):
            info = row["info"]
            titles[info["id"]] = f"r/{info['subreddit']}: {info['title']}"
            summaries[info["id"]] |= {summary["text"].strip() for summary in row["summaries"]} - {""}
    order = sorted(titles, key=lambda post: (-len(summaries[post]), content_id(post)))
    held = len(order) - 800
    split = {post: TEST if i >= held else VALIDATION if i % 5 == 4 else TRAIN for i, post in enumerate(order)}
    return [
        Pair(post, titles[post], first, second, split[post])
        for post in order
        for first, second in combinations(sorted(summaries[post]), 2)
    ]


def ukp() -> list[Pair]:
    """Every two arguments for one side of a debate that somebody compared; the prompt is the side."""
    pairs: dict[tuple[str, ...], None] = {}
    for row in _lines(DATA / "ukpconvarg1.jsonl.gz"):
        if row["chosen"] != row["rejected"]:
            pairs.setdefault((row["prompt"], *sorted((row["chosen"], row["rejected"]))))
    sides = sorted({prompt for prompt, *_ in pairs}, key=content_id)
    split = {prompt: TEST if i < 8 else VALIDATION if i < 13 else TRAIN for i, prompt in enumerate(sides)}
    return [Pair(content_id(prompt), prompt, first, second, split[prompt]) for prompt, first, second in pairs]


TEXTS = {"tldr": tldr, "ukp": ukp}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path) as file:
        yield from map(orjson.loads, file)


def plant(pairs: list[Pair], out: Path, seed: int) -> None:
    """Let standard groups judge random pairs: `out`/preferences.jsonl and truth.json."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, amount in AMOUNTS.items():
        of_split = [pair for pair in pairs if pair.split == split]
        for worker in range(WORKERS):
            rows += [
                {"worker": f"annotator-{worker:03d}", "prompt": pair.prompt, "prompt_id": pair.prompt_id}
                | {"chosen": pair.first, "rejected": pair.second}
                for pair in (of_split[i] for i in rng.choice(len(of_split), amount, replace=False).tolist())
            ]
    out.mkdir(parents=True, exist_ok=True)
    incidence = out / "incidence.jsonl"
    _write_lines(incidence, rows)
    voted, truth = simulate(SimulationSettings(setting="planted", groups=GROUPS, texts=incidence, seed=seed))
    splits = {pair.prompt_id: pair.split for pair in pairs}
    _write_lines(out / "preferences.jsonl", [row | {"split": splits[row["prompt_id"]]} for row in voted])
    write_text(out / "truth.json", json.dumps(truth))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------- the rewards
def run_pipeline(folder: Path) -> None:
    """The stages up to the bundle, of `folder`/simulated."""
    at = {name: folder / name for name in ("ingest", "encode", "embed", "cluster", "rewards", "evaluate", "bundle")}
    source = [str(folder / "simulated" / "preferences.jsonl")]
    stages.ingest(at["ingest"], IngestSettings(source=source, columns={"split": "split"}, pseudonyms="none"))
    stages.encode(at["ingest"], at["encode"], EncodeSettings())
    stages.embed(at["ingest"], at["encode"], at["embed"], EmbedSettings())
    found = stages.cluster(at["embed"], at["cluster"], ClusterSettings())
    rewards = [at["rewards"] / GLOBAL]
    stages.reward(at["embed"], at["cluster"], rewards[0], RewardSettings())
    for k in stages.audiences(found):
        rewards.append(at["rewards"] / stages.reward_name(k))
        stages.reward(at["embed"], at["cluster"], rewards[-1], RewardSettings(), k, rewards[0])
    stages.evaluate(at["embed"], at["cluster"], rewards, at["evaluate"], EvaluateSettings())
    stages.bundle(
        at["ingest"], at["encode"], at["embed"], at["cluster"], rewards, at["evaluate"], at["bundle"], BundleSettings()
    )


def judge_rewards(folder: Path) -> dict[str, Any]:
    """Held-out log-loss of the coteries' rewards between that of the global one and of the oracle's."""
    train, validation, test = (load_votes(folder / "embed" / stages.DIFFERENCES, s) for s in (TRAIN, VALIDATION, TEST))
    table = ASSIGNMENT.read(folder / "cluster" / stages.ASSIGNMENTS, ["worker_id", "coterie", "posterior"])
    told = json.loads((folder / "simulated" / "truth.json").read_text(encoding="utf-8"))["workers"]
    group = np.array([told[worker]["group"] for worker in table["worker_id"].to_pylist()])
    posterior, coterie = matrix(table["posterior"]).astype(np.float64), table["coterie"].to_numpy()

    everybody = RewardHead.load(folder / "rewards" / GLOBAL)
    heads = [RewardHead.load(folder / "rewards" / f"coterie-{k}") for k in range(posterior.shape[1])]
    ones = np.ones(test.n_workers)
    common = fit_global(train, validation, ones).head
    oracle = [fit_coterie(train, validation, (group == g).astype(float), ones, common).head for g in range(GROUPS)]

    losses = {GLOBAL: log_loss(everybody.margin(test.x), test.y)}
    margins = np.stack([head.margin(test.x) for head in heads], axis=1)
    losses["coteries"] = log_loss(average(margins, posterior[test.worker]), test.y)
    own, wrong = _own_and_wrong(margins, coterie[test.worker], test.y)
    true, false = _own_and_wrong(np.stack([head.margin(test.x) for head in oracle], axis=1), group[test.worker], test.y)
    bootstrap = TwoWayBootstrap(test, replicates=1000, level=0.95, seed=0)
    found, evaluated = (json.loads((folder / name / "metrics.json").read_bytes()) for name in ("cluster", "evaluate"))
    return {
        "verdict": found["selection"]["verdict"],
        "coteries": len(heads),
        "ari": adjusted_rand_score(group, coterie),
        "serve_own": sum(gate["serves"] == "own" for gate in evaluated["gates"]),
        "log_loss": {name: _mean(bootstrap, values) for name, values in (losses | {"oracle": true}).items()},
        "recovered": _ratio(bootstrap, losses[GLOBAL] - losses["coteries"], losses[GLOBAL] - true),
        "own_minus_wrong": {"coteries": _mean(bootstrap, own - wrong), "oracle": _mean(bootstrap, true - false)},
        "own_minus_wrong_of_oracle": _ratio(bootstrap, own - wrong, true - false),
        "comparisons": {"train": len(train), "validation": len(validation), "test": len(test)},
    }


def _own_and_wrong(margins: Array, own: Array, y: Array) -> tuple[Array, Array]:
    """Losses [n] of everybody's own head of margins [n, K], and the mean of those of the others."""
    losses = log_loss(margins, y[:, None])
    mine = losses[np.arange(len(y)), own]
    return mine, (losses.sum(axis=1) - mine) / (losses.shape[1] - 1)


def _mean(bootstrap: TwoWayBootstrap, values: Array) -> dict[str, Any]:
    everything, workers = np.ones(len(values), dtype=bool), np.ones(WORKERS, dtype=bool)
    return bootstrap.estimate(values, everything, workers).model_dump()


def _ratio(bootstrap: TwoWayBootstrap, part: Array, whole: Array) -> dict[str, Any]:
    """The ratio of two macro means, with the interval of its linearisation."""
    value = _mean(bootstrap, part)["value"] / _mean(bootstrap, whole)["value"]
    return _mean(bootstrap, value + (part - value * whole) / _mean(bootstrap, whole)["value"])


# ------------------------------------------------------------------------------------------------------------- best of n
def draw(start: Path, prompts: list[str], n: int, log: Path) -> list[list[Answer]]:
    """1 + n answers of the start to each prompt; those that `log` holds are not drawn again."""
    known: dict[str, list[Answer]] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with suppress(json.JSONDecodeError):  # the last line of a killed run
            prompt, answers = json.loads(line)
            known[prompt] = [Answer(*answer) for answer in answers]
    missing = [prompt for prompt in prompts if len(known.get(prompt, ())) <= n]
    if missing:
        write_text(log, "".join(json.dumps(row) + "\n" for row in known.items()))
        policy = Policy.load(start, dtype="bfloat16")
        card = policy.card
        with (
            log.open("a", encoding="utf-8") as file,
            progress(total=len(missing), desc="samples", unit="prompts") as bar,
        ):
            for first in range(0, len(missing), CHUNK):
                asked = missing[first : first + CHUNK]
                seed, size = int(content_id(*asked)[:8], 16), CHUNK * (n + 1)
                drawn = policy.generate(asked, n + 1, card.response_tokens, card.temperature, seed, size)
                known |= dict(zip(asked, drawn, strict=True))
                file.writelines(json.dumps([prompt, known[prompt]]) + "\n" for prompt in asked)
                file.flush()
                bar.update(len(asked))
    return [known[prompt][: n + 1] for prompt in prompts]


def start_of(folder: Path) -> Path:
    """The policy that all others start from."""
    start = folder / f"start-{START.sft_steps}"
    if not (start / POLICY_FILE).is_file():
        make_start(folder / "ingest" / stages.COMPARISONS, start, START)
    return start


def judge_best_of(folder: Path, prompts: int, n: int) -> dict[str, Any]:
    """Win rates of the best of n by everybody's own reward."""
    start = start_of(folder)
    comparisons = folder / "ingest" / stages.COMPARISONS
    titles = sorted({pair.prompt for pair in tldr() if pair.split == TEST}, key=content_id)[:prompts]
    log = folder / f"samples-{content_digest(start)[:12]}.jsonl"
    started = time.perf_counter()
    answers = draw(start, titles, n, log)
    seconds = time.perf_counter() - started

    scorer = load_scorer(Bundle.load(folder / "bundle"))
    pool = [drawn[1:] for drawn in answers]
    scored = scorer.score_many([Question(p, [a.text for a in drawn]) for p, drawn in zip(titles, pool, strict=True)])
    by_coterie = np.stack([one.by_coterie for one in scored])
    chosen = {"start": [drawn[0] for drawn in answers]}
    chosen[GLOBAL] = best_of_n(pool, np.stack([one.by_global for one in scored]))
    own = [f"coterie-{k}" for k in range(by_coterie.shape[2])]
    chosen |= {name: best_of_n(pool, by_coterie[:, :, k]) for k, name in enumerate(own)}
    given = {name: Answers.of(titles, texts, scorer.features) for name, texts in chosen.items()}

    truth = SimulatedTruth.load(folder / "simulated" / "truth.json", comparisons)
    judges: dict[str, Sequence[Judge | None]] = {
        "truth": true_judges(truth, folder / "cluster"),
        "heldout": heldout_judges(folder / "embed", folder / "cluster"),
    }
    wins = []
    for kind, (_, *of_coteries) in judges.items():
        for against in WIN_RATES:
            parts = []
            for k, one in enumerate(of_coteries):
                others = [given[name] for name in own if name != own[k]] if against == "wrong" else [given[against]]
                parts.append(Comparison(one, given[own[k]], others))
            for name, compared in [
                ("everybody", parts),
                *((name, [part]) for name, part in zip(own, parts, strict=True)),
            ]:
                wins.append(
                    {"judge": kind, "audience": name, "against": against} | win_rates(compared, JudgeSettings())
                )
    words = {name: float(np.expm1(of.words).mean()) for name, of in given.items()}
    risen = (by_coterie.max(axis=1).mean(axis=0) - by_coterie.mean(axis=(0, 1))) / by_coterie.std(axis=(0, 1))
    return {
        "prompts": len(titles),
        "n": n,
        "rise": dict(zip(own, risen.tolist(), strict=True)),
        "wins": wins,
        "words": words,
        "finished": {name: float(of.finished.mean()) for name, of in given.items()},
        "like_length": _like_length(pool),
        "samples": [
            {"prompt": title} | {name: texts[row].text for name, texts in chosen.items()}
            for row, title in enumerate(titles[:3])
        ],
        "seconds": seconds,
    }


def _like_length(pool: list[list[Answer]]) -> float:
    """How many of the answers to a prompt, in the mean, are within a tenth of their median length."""
    words = [np.array([len(answer.text.split()) for answer in drawn]) for drawn in pool]
    return float(np.mean([np.count_nonzero(np.abs(w - np.median(w)) <= 0.1 * np.median(w)) for w in words]))


# ------------------------------------------------------------------------------------------------------------------- PPO
def tune(folder: Path, seed: int) -> dict[str, Any]:
    """The policy of coterie 0, tuned by PPO in this process."""
    out, started = folder / f"ppo-{seed}", time.perf_counter()
    settings = TUNED.model_copy(update={"seed": seed})
    told = align(folder / "bundle", folder / "ingest" / stages.COMPARISONS, start_of(folder), out, 0, settings)
    risen = (told["reward_end"] - told["reward_start"]["mean"]) / told["reward_start"]["sd"]
    seconds = time.perf_counter() - started
    return {"seed": seed, "rise": risen, **told, "seconds": seconds, "peak_memory": peak_memory()}


def judge_ppo(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """What `tune` makes with each seed; what an interrupted run has measured is not measured again."""
    log = folder / "ppo.jsonl"
    runs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    for seed in range(len(runs), seeds):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(tune, (folder, seed)))
        _write_lines(log, runs)
    return runs[:seeds]


# ------------------------------------------------------------------------------------------------------------- the figures
def targets(results: dict[str, Any]) -> dict[str, bool]:
    """Each demand in words, and whether it is met."""
    met = {}
    for name, figures in results["texts"].items():
        met[f"{name}: at least 90 % of the gap between global and oracle recovered"] = (
            figures["recovered"]["value"] >= RECOVERED
        )
        met[f"{name}: own minus wrong at least 90 % of the oracle's"] = (
            figures["own_minus_wrong_of_oracle"]["value"] >= RECOVERED
        )
    for win in results.get("best_of", {}).get("wins", ()):
        if win["audience"] == "everybody":
            rate, least = Estimate(**win["equal_length"]), WIN_RATES[win["against"]]
            words = f"own against {win['against']}, by {win['judge']}: at least {least:.0%}, interval above one half"
            met[words] = bool(
                rate.value is not None and rate.value >= least and rate.low is not None and rate.low > 0.5
            )
    if runs := results.get("ppo"):
        words = f"PPO: mean reward at least {RISE:g} sd above the start's at less than {DIVERGENCE:g} nats, every seed"
        met[words] = all(run["rise"] >= RISE and run["kl_end"] < DIVERGENCE for run in runs)
    return met


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| texts | coteries | ARI | recovered | own minus wrong, of the oracle's |", "|---|---|---|---|---|"]
    for name, figures in results["texts"].items():
        ratios = [_told(figures[key]) for key in ("recovered", "own_minus_wrong_of_oracle")]
        lines.append(f"| {name} | {figures['coteries']} | {figures['ari']:.2f} | {' | '.join(ratios)} |")
    lines += ["", "| judge | people | own against | raw | equal length | within a tenth |", "|---|---|---|---|---|---|"]
    for win in results.get("best_of", {}).get("wins", ()):
        rates = [_told(win[name]) for name in ("raw", "equal_length", "within_tolerance")]
        lines.append(f"| {win['judge']} | {win['audience']} | {win['against']} | {' | '.join(rates)} |")
    if runs := results.get("ppo"):
        lines += ["", "| PPO, seed | rise, sd | nats | updates | seconds | GB |", "|---|---|---|---|---|---|"]
        for run in runs:
            figures = f"{run['rise']:.2f} | {run['kl_end']:.1f} | {run['steps']} | {run['seconds']:.0f}"
            lines.append(f"| {run['seed']} | {figures} | {run['peak_memory'] / 1e9:.1f} |")
    lines += ["", *(f"- {what}: {'met' if met else '**missed**'}" for what, met in results["targets"].items())]
    return "\n".join(lines)


def _told(rate: dict[str, Any]) -> str:
    if rate["value"] is None:
        return ""
    return f"{rate['value']:.1%}" + ("" if rate["low"] is None else f" [{rate['low']:.1%}, {rate['high']:.1%}]")


def main() -> None:
    """Measure, write the results, and say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=tuple(TEXTS), default=tuple(TEXTS))
    parser.add_argument("--prompts", type=int, default=800, help="test titles that are answered; 0: rewards only")
    parser.add_argument("--samples", type=int, default=16, help="n of the best of n")
    parser.add_argument("--ppo", type=int, default=3, help="seeds of PPO; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="of the annotators; 0 is that of coterie's own draws")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: there is no {'/'.join(DATA.parts[-2:])} with the real texts", file=sys.stderr)
        return
    results: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "seed": options.seed,
        "texts": {},
    }
    for name in options.texts:
        folder = WORK / f"{name}-{options.seed}"
        if not (folder / "simulated" / "truth.json").is_file():
            plant(TEXTS[name](), folder / "simulated", options.seed)
        run_pipeline(folder)
        results["texts"][name] = judge_rewards(folder)
    if "tldr" in options.texts and options.prompts:
        results["best_of"] = judge_best_of(WORK / f"tldr-{options.seed}", options.prompts, options.samples)
    if "tldr" in options.texts and options.ppo:
        results["ppo"] = judge_ppo(WORK / f"tldr-{options.seed}", options.ppo)
    results["targets"] = targets(results)
    results["peak_memory"] = peak_memory()
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
