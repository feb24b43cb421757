"""The policy that every other starts from: the backbone itself, or what supervised fine-tuning on chosen responses makes of it."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from coterie.backbones import quietly
from coterie.config import AlignSettings
from coterie.contracts import COMPARISON, TRAIN
from coterie.errors import BadData
from coterie.policies.policy import START, PolicyCard, load_backbone, prompt_ids, write_policy

_LEARNING_RATE = 2e-4  # of a LoRA adapter; align.learning_rate is that of reinforcement


def make_start(comparisons: Path, out: Path, settings: AlignSettings) -> dict[str, Any]:
    """Write the shared start to the folder `out`: the backbone, or with `sft_steps` an adapter of it.

    It learns from chosen responses to training prompts that end within `response_tokens`: a start that had learnt from
    longer ones would not finish.

    Returns:
        examples, examples_left_out (too long), steps, seed, and curve: step and loss (nats a token).

    Raises:
        BadData: no example is short enough.
        BadConfiguration: the backbone cannot be loaded.
    """
    model, tokenizer, revision = load_backbone(settings.backbone, settings.revision, settings.device, settings.dtype)
    card = PolicyCard(
        backbone=settings.backbone,
        revision=revision,
        role=START,
        method="sft" if settings.sft_steps else "none",
        temperature=settings.temperature,
        prompt_tokens=settings.prompt_tokens,
        response_tokens=settings.response_tokens,
        seed=settings.seed,
    )
    figures: dict[str, Any] = {"examples": 0, "examples_left_out": 0, "curve": []}
    if settings.sft_steps:
        data, left_out = _examples(comparisons, tokenizer, settings)
        model, curve = _tuned(model, tokenizer, data, settings)
        figures = {"examples": len(data["input_ids"]), "examples_left_out": left_out, "curve": curve}
    write_policy(out, card, tokenizer, model if settings.sft_steps else None)
    return {**figures, "steps": settings.sft_steps, "seed": settings.seed}


def _examples(comparisons: Path, tokenizer: Any, settings: AlignSettings) -> tuple[dict[str, list[list[int]]], int]:
    """Token ids and labels of training examples, and how many were too long. Ties have no chosen response."""
    table = COMPARISON.read(comparisons, ["prompt", "chosen", "label", "split"])
    rows = table.filter(pc.and_(pc.equal(table["split"].cast("string"), TRAIN), pc.equal(table["label"], 1)))
    prompts, chosen = rows["prompt"].to_pylist(), rows["chosen"].to_pylist()
    unique = sorted(set(prompts))
    asked = dict(zip(unique, prompt_ids(tokenizer, unique), strict=True))
    texts = tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"] if chosen else []
    data: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for prompt, ids in zip(prompts, texts, strict=True):
        question, response = asked[prompt], [*ids, tokenizer.eos_token_id]
        if len(question) <= settings.prompt_tokens and len(response) <= settings.response_tokens:
            data["input_ids"].append(question + response)
            data["labels"].append([-100] * len(question) + response)
    if not data["input_ids"]:
        raise BadData(
            f"{comparisons}: none of its {len(prompts)} chosen training responses ends within {settings.response_tokens} "
            f"tokens after a prompt of at most {settings.prompt_tokens}. Raise align.response_tokens or "
            "align.prompt_tokens, or start from the backbone itself: align.sft_steps = 0."
        )
    return data, len(prompts) - len(data["input_ids"])


def _tuned(
    model: Any, tokenizer: Any, data: dict[str, list[list[int]]], settings: AlignSettings
) -> tuple[Any, list[dict[str, float]]]:
    """The PeftModel after `sft_steps`, and the losses on the way."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from coterie.policies.training import Watch, lora, run, trainer_arguments

    set_seed(settings.seed)
    watch = Watch("sft", settings.sft_steps, _LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder, quietly():
        arguments = trainer_arguments(
            SFTConfig,
            settings,
            Path(folder),
            learning_rate=_LEARNING_RATE,
            per_device_train_batch_size=settings.batch_size,
            max_steps=settings.sft_steps,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[watch],
            peft_config=lora(settings),
        )
        run(trainer, watch)
    return trainer.model, watch.curve
