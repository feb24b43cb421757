"""Proximal policy optimisation, by TRL's experimental trainer (Ziegler et al. 2019, arXiv 1909.08593)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from trl.experimental.ppo import PPOConfig, PPOTrainer

from coterie.config import AlignSettings
from coterie.policies.training import PolicyWatch, lora, trainer_arguments

_PAD = "<|coterie:pad|>"
_EPOCHS = 2  # passes over the responses of an update
_MICRO_BATCH = 4  # responses of a forward pass: logits of every token over the whole vocabulary are held


def ppo_trainer(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[tuple[int, ...], str],
    watch: PolicyWatch,
    settings: AlignSettings,
    folder: Path,
) -> PPOTrainer:
    """A trainer of an adapter of `model`, with the model itself as reference.

    Args:
        model: a causal model; the adapter is put into it.
        tokenizer: its tokenizer.
        prompts: by their token ids.
        watch: gives the rewards.
        settings: of the stage.
        folder: for the trainer.
    """
    policy = get_peft_model(model, lora(settings))
    # TRL reads the end of a response from a padding token that is not eos. It masks that token before any model sees
    # it, so one beyond the vocabulary does, which no policy can write; no embedding has to grow.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": _PAD})
    tokenizer.padding_side = "left"
    micro = math.gcd(settings.batch_size, _MICRO_BATCH)
    arguments = trainer_arguments(
        PPOConfig,
        settings,
        folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        local_rollout_forward_batch_size=settings.batch_size,
        total_episodes=settings.steps * settings.batch_size,
        num_ppo_epochs=_EPOCHS,
        num_sample_generations=0,
        response_length=settings.response_tokens,
        stop_token="eos",
        temperature=settings.temperature,
        kl_coef=settings.kl_coefficient,
        lam=1.0,  # the value learns from nothing; below one, early tokens would hear of the reward through it only
    )
    rounds = math.ceil(settings.batch_size / len(prompts))  # fewer than a batch would be dropped, for ever
    data = Dataset.from_dict({"input_ids": [list(ids) for ids in prompts] * rounds})
    reward = _Reward(prompts, watch)
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=_Value(policy),
        train_dataset=data,
        eval_dataset=data,  # asked for, and never used
        callbacks=[watch],
    )
    trainer.dataloader = _Told(trainer.dataloader, reward)
    watch.follow(policy)
    return trainer


class _Value(nn.Module):  # type: ignore[misc]
    """The value of a token: linear in the last hidden state that the start has there.

    The start is the policy without its adapter, so that no second model is held in memory.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        model = policy.get_base_model()
        self.score = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.score.weight)  # normalised rewards have mean zero under the start
        nn.init.zeros_(self.score.bias)
        self._start = [policy, getattr(model, model.base_model_prefix)]  # in a list: not this module's parameters

    def trunk(self, **inputs: Any) -> Any:
        policy, model = self._start
        with torch.no_grad(), policy.disable_adapter():
            hidden = model(**inputs).hidden_states[-1]
        return SimpleNamespace(hidden_states=[hidden.float()])


class _Reward(nn.Module):  # type: ignore[misc]
    """What TRL takes for a reward model, around a reward of texts.

    Its backbone hands the token ids on as hidden states, and its head reads them.
    """

    base_model_prefix = "ids"

    def __init__(self, prompts: Mapping[tuple[int, ...], str], watch: PolicyWatch) -> None:
        super().__init__()
        self.queries: torch.Tensor | None = None  # of the batch at hand [n, tokens], set by _Told
        self._prompts, self._watch = prompts, watch

    def ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids.masked_fill(~attention_mask, -1)])

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """Rewards [n, tokens, 1], the same at every token of a response; ids are -1 where there is padding."""
        assert self.queries is not None
        rows = [[token for token in row if token >= 0] for row in ids.tolist()]
        begins = (ids[:, : self.queries.shape[1]] >= 0).sum(1).tolist()
        prompts = [self._prompts[tuple(row[:begin])] for row, begin in zip(rows, begins, strict=True)]
        earned = self._watch.earn(prompts, [row[begin:] for row, begin in zip(rows, begins, strict=True)])
        rewards = torch.tensor(earned, dtype=torch.float32, device=ids.device)
        return rewards[:, None, None].expand(*ids.shape, 1)


class _Told:
    """A data loader that tells the reward which prompts are being answered: where they end, the ids alone do not say."""

    def __init__(self, dataloader: Any, reward: _Reward) -> None:
        self._dataloader, self._reward = dataloader, reward

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            self._reward.queries = batch["input_ids"]
            yield batch
