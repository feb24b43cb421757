"""GRPO (Shao et al. 2024, arXiv 2402.03300) and RLOO (Ahmadian et al. 2024, arXiv 2402.14740), by TRL's trainers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from coterie.config import AlignSettings
from coterie.policies.training import PolicyWatch, lora, trainer_arguments

_TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
_LEAST_PRICE = 1e-9  # at a price of zero TRL would not measure the divergence


def online_trainer(
    model: Any, tokenizer: Any, prompts: Sequence[str], watch: PolicyWatch, settings: AlignSettings, folder: Path
) -> Any:
    """A trainer of an adapter of `model`, with the model itself as reference; arguments as of `ppo_trainer`."""

    def earned(completion_ids: list[list[int]], text: list[str], **_: Any) -> list[float]:
        return [float(reward) for reward in watch.earn(text, completion_ids)]

    trainer_class, config_class = _TRAINERS[settings.method]
    arguments = trainer_arguments(
        config_class,
        settings,
        folder,
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps,
        num_generations=settings.group,
        max_completion_length=settings.response_tokens,
        temperature=settings.temperature,
        beta=max(settings.kl_coefficient, _LEAST_PRICE),
    )
    template = tokenizer.chat_template is not None
    texts = [*prompts] * math.ceil(settings.batch_size / settings.group / len(prompts))  # less than a batch is dropped
    asked = [[{"role": "user", "content": text}] if template else f"{text}\n\n" for text in texts]
    trainer = trainer_class(
        model=model,
        reward_funcs=earned,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": asked, "text": texts}),
        processing_class=copy.deepcopy(tokenizer),
        callbacks=[watch],
        peft_config=lora(settings),
    )
    watch.follow(trainer.model)
    return trainer
