"""Reward adapters: what our path costs beside TRL's own, and what starting from the global adapter saves.

    python -m benchmarks.adapters [--backbone smollm2] [--steps 72] [--repeats 3] [--out benchmarks/results/adapters.json]

Two groups of simulated annotators judge short made-up texts, on which coterie.simulation plants their tastes (at cosine 0.7 to
each other, right in 76 % of the votes). SmolLM2-135M learns from them on the CPU, four comparisons a step. A third of the
prompts is held out.

Warm start: the global adapter is trained on everybody, and one of the larger group alone from scratch, in --steps steps each;
then that group's starts from the global one and is given ever fewer steps, with a linear decay over each. Reported is the
least number of steps that reaches the held-out log-loss of the one from scratch, as a share of its steps.

Cost: `coterie.rewards.trainer.fit` (weights, pull, checks of the gradients, checkpoint at the end) beside a plain
RewardTrainer with the same token ids, LoRA, batch and arguments, from loading the model to the last checkpoint, without
imports. Both in turns, each time in a process of its own; peak memory is the kernel's count (Linux). The ratio is of processor seconds, which
other load on the machine disturbs least; wall seconds stand beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.scale import peak_memory
from coterie.backbones import SMOLLM2, backbone_source
from coterie.config import RewardSettings
from coterie.contracts import COMPARISON, DIFFERENCE, TRAIN, VALIDATION, content_id
from coterie.rewards.adapter_training import train_adapter
from coterie.rewards.backbone import load_tokenizer, tokenized
from coterie.rewards.examples import TextComparisons
from coterie.simulation import SimulationSettings, simulate
from coterie.simulation.topics import TOPICS

WORKERS, COMPARISONS, PROMPTS, RESPONSES = 30, 60, 24, 6  # comparisons of a worker, responses to a prompt
SETTINGS = RewardSettings(kind="adapter", device="cpu", learning_rate=1e-3, batch_size=4, checkpoint_steps=10_000)
SHARES = (1 / 3, 1 / 6, 1 / 12)  # of the steps from scratch that a warm start is given
COST_STEPS = 10


def _answer(step: str, attributes: int) -> str:
    """One sentence or two about `step`; five visible attributes are on or off."""
    hedges, figures, cheers, asks, example = ((attributes >> i) & 1 for i in range(5))
    text = f"{'perhaps ' * hedges}{step}{' in 10 minutes' * figures}"
    text = text[0].upper() + text[1:] + ".!"[cheers]
    return text + " Are you ready?" * asks + " For example, start today." * example


def write(folder: Path) -> tuple[list[str], np.ndarray]:
    """comparisons.parquet and differences.parquet of simulated annotators; their ids and groups."""
    rng = np.random.default_rng(0)
    answers = [
        [_answer(topic.steps[i % 3], code) for i, code in enumerate(rng.choice(32, RESPONSES, replace=False).tolist())]
        for topic in TOPICS[:PROMPTS]
    ]
    with (folder / "texts.jsonl").open("w") as file:
        for worker in range(WORKERS):
            for _ in range(COMPARISONS):
                prompt = int(rng.integers(PROMPTS))
                first, second = rng.choice(RESPONSES, 2, replace=False)
                row = {
                    "worker": f"w{worker:02d}",
                    "prompt_id": f"prompt-{prompt}",
                    "prompt": f"How do I {TOPICS[prompt].task}?",
                }
                row |= {"chosen": answers[prompt][first], "rejected": answers[prompt][second]}
                file.write(json.dumps(row) + "\n")
    rows, truth = simulate(SimulationSettings(setting="planted", groups=2, texts=folder / "texts.jsonl"))
    workers = sorted(truth["workers"])
    columns: dict[str, list[Any]] = {field.name: [] for field in COMPARISON.fields}
    for number, row in enumerate(rows):
        prompt = row["prompt"]
        ids = [content_id(prompt, row[side]) for side in ("chosen", "rejected")]
        held = int(row["prompt_id"].removeprefix("prompt-")) % 3 == 0
        told = row | {
            "comparison_id": f"c{number}",
            "worker_id": row["worker"],
            "chosen_id": ids[0],
            "rejected_id": ids[1],
            "pair_id": content_id(*sorted(ids)),
            "label": 1.0,
            "split": VALIDATION if held else TRAIN,
            "source": "simulated",
            "created_at": None,
        }
        for name, column in columns.items():
            column.append(told.get(name))
    COMPARISON.write(folder / "comparisons.parquet", columns)
    DIFFERENCE.write(
        folder / "differences.parquet",
        {
            "comparison_id": columns["comparison_id"],
            "worker": [workers.index(worker) for worker in columns["worker_id"]],
            "prompt": np.zeros(len(rows), np.int64),
            "split": columns["split"],
            "label": columns["label"],
            "weight": np.ones(len(rows)),
            "x": np.zeros((len(rows), 1), np.float32),
        },
        x=1,
    )
    return workers, np.array([truth["workers"][worker]["group"] for worker in workers])


def warm_start(
    folder: Path, workers: list[str], group: np.ndarray, settings: RewardSettings, steps: int
) -> dict[str, Any]:
    """Held-out log-loss of the larger group by steps, from scratch and from the global adapter."""
    everybody, own = np.ones(len(workers)), (group == 0).astype(float)

    def train(name: str, steps: int, audience: np.ndarray, start: Path | None) -> dict[str, Any]:
        out = folder / name
        out.mkdir()
        limited = settings.model_copy(update={"max_steps": steps})
        began = time.perf_counter()
        told = train_adapter(folder, folder / "comparisons.parquet", out, limited, workers, audience, everybody, start)
        keys = ("steps", "adapter_train_log_loss", "adapter_validation_log_loss", "adapter_global_validation_log_loss")
        figures = {key: told[key] for key in keys if key in told} | {"seconds": time.perf_counter() - began}
        print(name, figures, flush=True)
        return figures

    common = train("global", steps, everybody, None)
    scratch = train("scratch", steps, own, None)
    warm = [
        train(f"warm-{share:.3f}", max(1, round(share * scratch["steps"])), own, folder / "global") for share in SHARES
    ]
    goal = scratch["adapter_validation_log_loss"]
    reached = [run["steps"] for run in warm if run["adapter_validation_log_loss"] <= goal]
    return {
        "global": common,
        "scratch": scratch,
        "warm": warm,
        "ratio": min(reached) / scratch["steps"] if reached else None,
    }


def prepare(folder: Path, group: np.ndarray, settings: RewardSettings) -> Path:
    """A job that trains the larger group's adapter from the global one; returns its file."""
    from coterie.rewards.launch import Job

    own, sure = (group == 0).astype(float), np.ones(len(group))
    asked = TextComparisons.read(folder, folder / "comparisons.parquet", own, sure)
    tokens, _ = tokenized(
        load_tokenizer(settings.backbone, "main"), asked.prompts, asked.responses, settings.max_tokens
    )
    asked.write(folder / "examples.arrow", rows := asked.counted(TRAIN), tokens)
    job = Job(
        settings=settings,
        examples=folder / "examples.arrow",
        steps=COST_STEPS,
        start=folder / "global",
        pull=settings.pull / float(asked.weight[rows].sum()),
        batch_size=settings.batch_size,
        accumulation=1,
        checkpoints=folder / "checkpoints",
    )
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    return path


def cost(way: str, path: Path) -> dict[str, float]:
    """Seconds and peak memory of one training, in this process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from coterie.rewards.launch import Job
    from coterie.rewards.trainer import fit

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        job = Job.model_validate_json(path.read_text()).model_copy(update={"checkpoints": Path(folder)})
        began, processor = time.perf_counter(), time.process_time()
        if way == "coterie":
            fit(job)
        else:
            lora = LoraConfig(
                task_type="SEQ_CLS",
                r=job.settings.lora_rank,
                lora_alpha=job.settings.lora_alpha,
                target_modules="all-linear",
                modules_to_save=["score"],
            )
            arguments = RewardConfig(
                output_dir=folder,
                max_steps=job.steps,
                per_device_train_batch_size=job.batch_size,
                learning_rate=job.settings.learning_rate,
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                max_length=None,
                report_to="none",
                disable_tqdm=True,
            )
            RewardTrainer(
                model=backbone_source(job.settings.backbone),
                args=arguments,
                train_dataset=Dataset.from_file(str(job.examples)).select_columns(["chosen_ids", "rejected_ids"]),
                processing_class=AutoTokenizer.from_pretrained(backbone_source(job.settings.backbone)),
                peft_config=lora,
            ).train()
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
    return {"seconds": seconds, "processor_seconds": processor, "peak_memory": peak_memory()}


def costs(path: Path, repeats: int) -> dict[str, Any]:
    """Both ways in turns, and the medians of their ratios."""
    runs: dict[str, list[dict[str, float]]] = {"trl": [], "coterie": []}
    for repeat in range(repeats):
        for way in sorted(runs, reverse=bool(repeat % 2)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs[way].append(pool.apply(cost, (way, path)))
            print(way, runs[way][-1], flush=True)
    ratios = {
        f"ratio_of_{name}": median(
            ours[name] / theirs[name] for ours, theirs in zip(*(runs[w] for w in ("coterie", "trl")), strict=True)
        )
        for name in ("processor_seconds", "seconds", "peak_memory")
    }
    return {"steps": COST_STEPS, **runs, **ratios}


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=72, help="of the optimiser, at most, for an adapter from scratch")
    parser.add_argument("--repeats", type=int, default=3, help="of the measured cost")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adapters.json")
    options = parser.parse_args()
    settings = SETTINGS.model_copy(update={"backbone": options.backbone})
    results: dict[str, Any] = {
        "settings": settings.model_dump(),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "load_average": os.getloadavg()[0]},
    }
    with tempfile.TemporaryDirectory() as folder:
        workers, group = write(Path(folder))
        results["warm_start"] = warm_start(Path(folder), workers, group, settings, options.steps)
        results["cost"] = costs(prepare(Path(folder), group, settings), options.repeats)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
