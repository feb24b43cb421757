"""Real annotators: is what coterie ships worse than one reward that allows for carelessness?

    python -m benchmarks.real [--only ukpconvarg1 tldr] [--seeds 0 1 2] [--folder FOLDER]

The stages ingest to evaluate under default settings, on the preferences in ../shared/data (skipped where they are not
there), once for every seed of the split into training, validation and test prompts; no prompt is in two of them. On the
test votes, macro over workers:

shipped      what serves after the gate: the served heads averaged over the worker's posterior, the personal head, or the
             global head. It is fitted to the training votes, and its scale to the validation votes.
reliability  the reference: pooled + reliability, fitted to the same training votes under the priors that selection chose.
pooled       the same without reliabilities.
mixture, embedding   the members as discovered, shipped or not. Where nothing beat the reference, the mixture is the
             reference, and the embedding the one direction that embed learns all the same.

What is shipped has a scale from the validation votes and no reliabilities, which change no order of a person's responses.
The others have their reliabilities, which only the training votes tell. So that neither is ahead for being scaled better,
they get one factor from the same validation votes by the same rule. "as fitted" is without it.

The target is about the upper end of the interval of shipped - reliability in log-loss, over all workers, with the factor
and without, under every seed. Workers of many comparisons, whose reliabilities are known best, are reported beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from coterie import stages
from coterie.bootstrap import TwoWayBootstrap
from coterie.config import (
    ClusterSettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    RewardSettings,
)
from coterie.contracts import ASSIGNMENT, EMBEDDING_REWARD, GLOBAL, TEST, TRAIN, VALIDATION, Gate, matrix, write_text
from coterie.discovery import PooledReward, ReliabilityReward, Votes, fit_coteries, load_votes
from coterie.discovery.discover import fit_embedding
from coterie.discovery.logistic import log_loss
from coterie.discovery.pooled import Reward
from coterie.discovery.votes import Array, one_thread
from coterie.rewards import PersonalHead, RewardHead, served_heads, serving_own
from coterie.scoring import average
from coterie.staging import read_metrics

DATA = Path(__file__).parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "real.json"
SOURCES = {
    "ukpconvarg1": ("ukpconvarg1.jsonl.gz",),
    "tldr": ("openai_sff_batch13.json.gz", "openai_sff_batch18.json.gz"),
}
WORSE = {"ukpconvarg1": 0.005}  # nats: what the upper end of the interval may be at most
MANY = 50  # comparisons, in all splits
MEMBERS = ("pooled", "reliability", "mixture", "embedding")

Folders = dict[str, Path]
Figures = dict[str, Any]


def stage(sources: list[str], seed: int, out: Path) -> tuple[Folders, Folders]:
    """The folders of the stages, and of the rewards by name; a stage that `out` holds already is not done again."""
    folders = {name: out / name for name in ("ingest", "encode", "embed", "cluster", "evaluate")}
    stages.ingest(folders["ingest"], IngestSettings(source=sources, pseudonyms="none", seed=seed))
    stages.encode(folders["ingest"], folders["encode"], EncodeSettings())
    stages.embed(folders["ingest"], folders["encode"], folders["embed"], EmbedSettings())
    discovered = folders["embed"], folders["cluster"]
    clustered = stages.cluster(*discovered, ClusterSettings())
    rewards = {GLOBAL: out / "rewards" / GLOBAL}
    stages.reward(*discovered, rewards[GLOBAL], RewardSettings())
    for audience in stages.audiences(clustered):
        name = stages.reward_name(audience)
        rewards[name] = out / "rewards" / name
        stages.reward(*discovered, rewards[name], RewardSettings(), audience, rewards[GLOBAL])
    stages.evaluate(*discovered, list(rewards.values()), folders["evaluate"], EvaluateSettings())
    return folders, rewards


def shipped(folders: Folders, rewards: Folders, test: Votes) -> Array:
    """Margins [n] of the test votes by what serves after the gate."""
    evaluated = read_metrics(folders["evaluate"])
    table = ASSIGNMENT.read(folders["cluster"] / stages.ASSIGNMENTS, ["posterior", "embedding"])
    if evaluated["ships"] == "embedding":
        return PersonalHead.load(rewards[EMBEDDING_REWARD]).margin(test.x, matrix(table["embedding"])[test.worker])
    heads = {name: RewardHead.load(folder) for name, folder in rewards.items() if name != EMBEDDING_REWARD}
    if evaluated["ships"] == "one-reward":
        return heads[GLOBAL].margin(test.x)
    posterior = matrix(table["posterior"])
    own = serving_own([Gate(**gate) for gate in evaluated["gates"]])
    served = served_heads(heads, posterior.shape[1], own)
    return average(np.stack([head.margin(test.x) for head in served], axis=1), posterior[test.worker])


@one_thread()
def members(clustered: Figures, train: Votes) -> dict[str, Reward]:
    """The members as cluster and embed fitted them: the same votes and the same priors."""
    priors, seed, coteries = clustered["priors"], clustered["seed"], clustered["selection"]["coteries"]
    base = ReliabilityReward(priors["precision"], priors["reliability_variance"]).fit(train)
    embedding = fit_embedding(train, *priors["embedding"], base, seed)
    rank = embedding.basis_.shape[1]
    mixture = fit_coteries(train, coteries, "mixture", base, priors["coterie_precision"], rank, seed)
    return dict(zip(MEMBERS, (PooledReward(priors["precision"]).fit(train), base, mixture, embedding), strict=True))


def factor(reward: Reward, validation: Votes) -> float:
    """What its logits are multiplied by: the rule by which a served head gets its scale."""
    logits = reward.decision_function(validation)[:, None]
    return RewardHead(np.ones(1)).calibrated(logits, validation.y, validation.weighted(np.ones(len(validation)))).scale


def measure(sources: list[str], seed: int, worse: float | None, out: Path) -> Figures:
    """The figures of one data set under one seed."""
    started = time.perf_counter()
    folders, rewards = stage(sources, seed, out)
    ingested, clustered, evaluated = (read_metrics(folders[name]) for name in ("ingest", "cluster", "evaluate"))
    train, validation, test = (
        load_votes(folders["embed"] / stages.DIFFERENCES, split) for split in (TRAIN, VALIDATION, TEST)
    )
    fitted = members(clustered, train)
    factors = {name: factor(reward, validation) for name, reward in fitted.items()}
    as_fitted = {name: reward.decision_function(test) for name, reward in fitted.items()}
    as_fitted["shipped"] = shipped(folders, rewards, test)
    scaled = {name: factors.get(name, 1.0) * logits for name, logits in as_fitted.items()}
    comparisons = train.counts + validation.counts + test.counts
    people = {"all": test.present, f"{MANY} or more": test.present & (comparisons >= MANY)}
    settings = EvaluateSettings()
    bootstrap = TwoWayBootstrap(test, settings.replicates, settings.level, settings.seed)
    compared = {
        told: {"workers": int(who.sum()), **compare(test, scaled, as_fitted, bootstrap, who)}
        for told, who in people.items()
    }
    selection, records = clustered["selection"], [*folders.values(), *rewards.values()]
    told = [json.loads((folder / stages.STAGE_FILE).read_text(encoding="utf-8")) for folder in records]
    figures = {
        "seed": seed,
        **{name: ingested[name] for name in ("workers", "comparisons", "refused", "splits")},
        "verdict": selection["verdict"],
        "confidence": selection["confidence"],
        "p_value": clustered["heterogeneity"]["p_value"],
        "half_split_ari": clustered["stability"].get("half_split_ari"),
        "member": [selection["member"], selection["size"]],
        "gain": selection["gain"],
        "coteries": selection["coteries"],
        "ships": {"verdict": selection["ships"], "gate": evaluated["ships"]},
        "gates": [gate["reason"] for gate in evaluated["gates"]],
        "factors": factors,
        "people": compared,
        "seconds": {record["stage"]: record["seconds"] for record in told},
        "seconds_in_all": time.perf_counter() - started,
        "peak_memory": max(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            *(record["peak_memory"] for record in told),
        ),
    }
    if worse is not None:
        differences = compared["all"]["to reliability"]["shipped"]
        upper = {name: differences[name]["high"] for name in ("log_loss", "log_loss_as_fitted")}
        figures["target"] = {"at_most": worse, "upper_end": upper, "met": max(upper.values()) <= worse}
    return figures


def compare(
    test: Votes, scaled: dict[str, Array], as_fitted: dict[str, Array], bootstrap: TwoWayBootstrap, who: Array
) -> Figures:
    """Of each model for these workers: log-loss and accuracy, and how they differ from the reference's and from pooled."""
    every, decided = np.ones(len(test), bool), test.y != 0.5
    losses = {name: log_loss(logits, test.y) for name, logits in scaled.items()}
    unscaled = {name: log_loss(logits, test.y) for name, logits in as_fitted.items()}
    right = {name: np.where(logits == 0, 0.5, logits > 0) for name, logits in scaled.items()}

    def estimate(values: Array, valid: Array) -> Figures:
        return bootstrap.estimate(values, valid, who).model_dump()

    def against(reference: str) -> dict[str, Figures]:
        return {
            name: {
                "log_loss": estimate(losses[name] - losses[reference], every),
                "log_loss_as_fitted": estimate(unscaled[name] - unscaled[reference], every),
                "accuracy": estimate(right[name] - right[reference], decided),
            }
            for name in scaled
            if name != reference
        }

    return {
        "log_loss": {name: estimate(loss, every) for name, loss in losses.items()},
        "accuracy": {name: estimate(hits, decided) for name, hits in right.items()},
        "to reliability": against("reliability"),
        "to pooled": against("pooled"),
    }


def table(name: str, figures: Figures) -> str:
    """The figures of one run in Markdown; log-losses in nats, differences in thousandths of a nat or in points."""
    ships, target = figures["ships"], figures.get("target")
    lines = [
        f"### {name}, seed {figures['seed']}: {figures['verdict']} (p = {figures['p_value']:.2g}), "
        f"{ships['verdict']} to be shipped, {ships['gate']} after the gate",
        "",
        "|workers|model|log-loss|accuracy|log-loss - reliability's|as fitted|accuracy - reliability's|log-loss - pooled's|",
        "|---|---|---|---|---|---|---|---|",
    ]
    for who, told in figures["people"].items():
        for model in ("shipped", *MEMBERS):
            cells = [f"{told['log_loss'][model]['value']:.4f}", f"{100 * told['accuracy'][model]['value']:.1f}"]
            for reference, measures in (
                ("reliability", {"log_loss": 1000, "log_loss_as_fitted": 1000, "accuracy": 100}),
                ("pooled", {"log_loss": 1000}),
            ):
                found = told[f"to {reference}"].get(model)
                cells += ["" if found is None else spoken(found[m], f) for m, f in measures.items()]
            lines.append(f"|{who}, {told['workers']:,}|{model}|" + "|".join(cells) + "|")
    seconds, memory = figures["seconds_in_all"], figures["peak_memory"] / 1e9
    lines += ["", f"{sum(figures['seconds'].values()):.0f} s in the stages, {seconds:.0f} s in all, {memory:.2f} GB."]
    if target is not None:
        upper = max(target["upper_end"].values())
        said = "met" if target["met"] else "missed"
        lines.append(f"Target {said}: upper end {1000 * upper:+.1f}, at most {1000 * target['at_most']:+.1f} is asked.")
    return "\n".join(lines) + "\n"


def spoken(estimate: Figures, factor: float) -> str:
    """+1.5 [-2.2, +5.3]."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{factor * value:+.1f}" + ("" if low is None else f" [{factor * low:+.1f}, {factor * high:+.1f}]")


def main() -> None:
    """Run what is asked for, write the results, and say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SOURCES), default=tuple(SOURCES), metavar="DATA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split into prompts")
    parser.add_argument("--folder", type=Path, help="where the stages are kept, and done only once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results of other data that it holds are kept")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    results["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            sources = [DATA / source for source in SOURCES[name]]
            if absent := [str(source) for source in sources if not source.is_file()]:
                print(f"{name}: skipped, there is no {', '.join(absent)}", file=sys.stderr)
                continue
            runs = []
            for seed in options.seeds:
                task = [str(source) for source in sources], seed, WORSE.get(name), Path(folder) / name / str(seed)
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a peak of memory of its own
                    runs.append(pool.apply(measure, task))
                print(table(name, runs[-1]), flush=True)
            results[name] = {"source": list(SOURCES[name]), "runs": runs}
            write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
