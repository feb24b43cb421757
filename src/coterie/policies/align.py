"""The align stage: one policy, tuned against one reward of a bundle."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from coterie.backbones import quietly
from coterie.config import AlignSettings
from coterie.contracts import COMPARISON, GLOBAL, TRAIN
from coterie.errors import BadConfiguration, BadData
from coterie.policies.policy import START, Policy, PolicyCard, prompt_ids, read_answer, write_policy
from coterie.policies.reward import NormalisedReward, TextReward, bundle_reward, scored

_SAMPLE = 64  # answers that the reward is normalised on, and that start and end are judged by


def align(
    bundle: Path,
    comparisons: Path,
    start: Path,
    out: Path,
    coterie: int | Literal["global"],
    settings: AlignSettings,
    reward: TextReward | None = None,
) -> dict[str, Any]:
    """Tune a policy against a coterie's reward, or the global one, and write it to the folder `out`.

    Only prompts of the training split are asked. The policy stays within `settings.kl_limit` of the start: when the
    answers of two updates in a row show it further away, training ends with the last policy that was not.

    Args:
        bundle: whose rewards.
        comparisons: comparisons.parquet; its prompts.
        start: folder of the policy that `make_start` wrote.
        out: folder to write to.
        coterie: number of the coterie, or "global".
        settings: the stage's settings; `method` is ppo, grpo or rloo.
        reward: scores texts in place of the bundle's.

    Returns:
        prompts, prompts_left_out (longer than `settings.prompt_tokens`), steps (updates that are in the policy), stopped
        (why it ended early, or None), reward_start {mean, sd} and reward_end (mean) of sampled answers to the same
        prompts, finished_start and finished_end (share), kl_end (nats a response), seed, and curve: of each update step,
        reward, normalised, length (tokens), finished (share), kl (nats a response) and entropy (nats a token), on the
        answers it sampled.

    Raises:
        BadConfiguration: no method, no such coterie, a start of another backbone, a batch that is not whole groups.
        BadData: no prompt is short enough, or the reward is the same for every answer.
        BadBundle: the bundle or the start cannot be read.
        RunFailed: a loss or a reward is not finite; the message names the update, or the text.
    """
    from transformers import set_seed

    from coterie.policies.training import PolicyWatch, run

    card = _checked(start, settings)
    score = reward or bundle_reward(bundle, coterie)
    policy = Policy.load(start, settings.device, settings.dtype)
    prompts, left_out = training_prompts(comparisons, policy.tokenizer, settings.prompt_tokens)
    rng = np.random.default_rng(settings.seed)
    asked = [str(prompt) for prompt in rng.choice(list(prompts.values()), _SAMPLE, replace=len(prompts) < _SAMPLE)]
    answers = [read_answer(policy.tokenizer, ids) for ids in _sampled(policy, asked, settings)]
    normalised = NormalisedReward.of(score, asked, answers)

    set_seed(settings.seed)
    watch = PolicyWatch(settings, normalised, policy.tokenizer)
    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer, tuned = _trainer(policy, prompts, watch, settings, Path(folder))
        stopped = run(trainer, watch)
    tuned = Policy(tuned, policy.tokenizer, card)
    steps = len(watch.curve)
    end = _judged(tuned, score, asked, settings) if stopped is None else None
    if end is None or end["kl_end"] > settings.kl_limit:
        watch.restore()
        steps, end = watch.kept, _judged(tuned, score, asked, settings)
        stopped = stopped or f"after the last update it was more than align.kl_limit = {settings.kl_limit:g} nats away"

    tuned_card = PolicyCard(
        backbone=card.backbone,
        revision=card.revision,
        start=None if card.method == "none" else START,  # where it lies in a bundle
        role=GLOBAL if coterie == GLOBAL else f"coterie-{coterie}",
        method=settings.method,
        temperature=settings.temperature,
        prompt_tokens=settings.prompt_tokens,
        response_tokens=settings.response_tokens,
        seed=settings.seed,
        reward_mean=normalised.mean,
        reward_sd=normalised.sd,
    )
    write_policy(out, tuned_card, policy.tokenizer, tuned.model)
    return {
        "prompts": len(prompts),
        "prompts_left_out": left_out,
        "steps": steps,
        "stopped": stopped,
        "reward_start": {"mean": normalised.mean, "sd": normalised.sd},
        "finished_start": float(np.mean([answer.finished for answer in answers])),
        **end,
        "curve": watch.curve,
        "seed": settings.seed,
    }


def training_prompts(comparisons: Path, tokenizer: Any, limit: int) -> tuple[dict[tuple[int, ...], str], int]:
    """The unique prompts of the training split by their token ids, and how many have more than `limit` tokens.

    Raises:
        BadData: there is none left.
    """
    table = COMPARISON.read(comparisons, ["prompt", "split"])
    rows = table.filter(pc.equal(table["split"].cast("string"), TRAIN))
    texts = sorted(set(rows["prompt"].to_pylist()))
    tokens = prompt_ids(tokenizer, texts)
    prompts = {tuple(ids): text for ids, text in zip(tokens, texts, strict=True) if len(ids) <= limit}
    left_out = sum(len(ids) > limit for ids in tokens)
    if not prompts:
        raise BadData(
            f"{comparisons}: none of its {len(texts)} training prompts has at most {limit} tokens, so there is nothing to "
            "answer. Raise align.prompt_tokens, or give comparisons with training prompts."
        )
    return prompts, left_out


def _checked(start: Path, settings: AlignSettings) -> PolicyCard:
    card = PolicyCard.read(start)
    if settings.method == "none":
        raise BadConfiguration("align.method is none, so no policy is made. Say ppo, grpo or rloo.")
    if card.backbone != settings.backbone:
        raise BadConfiguration(
            f"{start}: a start of the backbone {card.backbone}, and align.backbone is {settings.backbone}. "
            "Make the start again, or give the backbone that it was made of."
        )
    if settings.method != "ppo" and settings.batch_size % settings.group:
        raise BadConfiguration(
            f"align.batch_size = {settings.batch_size} responses are no whole number of groups of align.group = "
            f"{settings.group}. Give a multiple."
        )
    return card


def _trainer(
    policy: Policy, prompts: dict[tuple[int, ...], str], watch: Any, settings: AlignSettings, folder: Path
) -> tuple[Any, Any]:
    """The trainer of the method, and the PeftModel that it trains."""
    if settings.method == "ppo":
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from coterie.policies.ppo import ppo_trainer

        trainer = ppo_trainer(policy.model, policy.tokenizer, prompts, watch, settings, folder)
        return trainer, trainer.policy_model
    from coterie.policies.online import online_trainer

    trainer = online_trainer(policy.model, policy.tokenizer, list(prompts.values()), watch, settings, folder)
    return trainer, trainer.model


def _sampled(policy: Policy, asked: Sequence[str], settings: AlignSettings) -> list[list[int]]:
    rows = policy.sample(asked, 1, settings.response_tokens, settings.temperature, settings.seed)
    return [row[0] for row in rows]


def _judged(policy: Policy, reward: TextReward, asked: Sequence[str], settings: AlignSettings) -> dict[str, float]:
    """Mean reward and share finished of sampled answers, and the divergence from the start that they show."""
    rows = _sampled(policy, asked, settings)
    answers = [read_answer(policy.tokenizer, ids) for ids in rows]
    return {
        "reward_end": float(scored(reward, asked, [answer.text for answer in answers]).mean()),
        "finished_end": float(np.mean([answer.finished for answer in answers])),
        "kl_end": _divergence(policy, prompt_ids(policy.tokenizer, asked), rows, settings.temperature),
    }


def _divergence(
    policy: Policy, questions: Sequence[list[int]], answers: Sequence[list[int]], temperature: float
) -> float:
    """Mean log-ratio of the policy to itself without its adapter, over answers that it sampled: nats a response."""
    import torch
    from trl.trainer.utils import selective_log_softmax

    def log_probability(ids: torch.Tensor) -> torch.Tensor:
        logits = policy.model(input_ids=ids).logits[:, :-1].float() / temperature
        found: torch.Tensor = selective_log_softmax(logits, ids[:, 1:])
        return found

    ratios = []
    with torch.no_grad():
        for question, answer in zip(questions, answers, strict=True):
            ids = torch.tensor([question + answer], device=policy.model.device)
            ratio = log_probability(ids)
            with policy.model.disable_adapter():
                ratio = ratio - log_probability(ids)
            ratios.append(float(ratio[0, len(question) - 1 :].sum()))
    return math.fsum(ratios) / len(ratios)
