"""Components that make and judge policies: the shared start, one for everybody and one a coterie, the judging, the release."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from typing import List  # noqa: UP035 - Kubeflow knows List[Model], not list[Model]

from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def start(
    bundle: dsl.Input[dsl.Model],
    comparisons: dsl.Input[dsl.Dataset],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str,
    backbone: str,
    revision: str,
    sft_steps: int,
    steps: int,
    batch_size: int,
    group: int,
    response_tokens: int,
    prompt_tokens: int,
    temperature: float,
    learning_rate: float,
    kl_coefficient: float,
    kl_limit: float,
    lora_rank: int,
    lora_alpha: int,
    dtype: str,
    device: str,
    seed: int,
) -> list:
    """The policy that all start from; returns whom policies are tuned for."""
    from pathlib import Path

    from components import artifacts
    from coterie import stages
    from coterie.config import AlignSettings

    settings = AlignSettings.of(
        method=method, backbone=backbone, revision=revision, sft_steps=sft_steps, steps=steps,
        batch_size=batch_size, group=group, response_tokens=response_tokens, prompt_tokens=prompt_tokens,
        temperature=temperature, learning_rate=learning_rate, kl_coefficient=kl_coefficient, kl_limit=kl_limit,
        lora_rank=lora_rank, lora_alpha=lora_alpha, dtype=dtype, device=device, seed=seed,
    )  # fmt: skip
    artifacts.run(stages.start, out=policy, metrics=metrics, comparisons=comparisons, settings=settings)
    return [stages.reward_name(coterie) for coterie in stages.policies_of(Path(bundle.path))]


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def align(
    audience: str,  # global or coterie-<k>
    bundle: dsl.Input[dsl.Model],
    comparisons: dsl.Input[dsl.Dataset],
    start: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str,
    backbone: str,
    revision: str,
    sft_steps: int,
    steps: int,
    batch_size: int,
    group: int,
    response_tokens: int,
    prompt_tokens: int,
    temperature: float,
    learning_rate: float,
    kl_coefficient: float,
    kl_limit: float,
    lora_rank: int,
    lora_alpha: int,
    dtype: str,
    device: str,
    seed: int,
):
    """The policy of everybody or of one coterie, tuned against their reward."""
    from components import artifacts
    from coterie import stages
    from coterie.config import AlignSettings

    settings = AlignSettings.of(
        method=method, backbone=backbone, revision=revision, sft_steps=sft_steps, steps=steps,
        batch_size=batch_size, group=group, response_tokens=response_tokens, prompt_tokens=prompt_tokens,
        temperature=temperature, learning_rate=learning_rate, kl_coefficient=kl_coefficient, kl_limit=kl_limit,
        lora_rank=lora_rank, lora_alpha=lora_alpha, dtype=dtype, device=device, seed=seed,
    )  # fmt: skip
    artifacts.run(
        stages.align, out=policy, metrics=metrics, bundle=bundle, comparisons=comparisons, start=start,
        settings=settings, coterie=None if audience == "global" else int(audience.removeprefix("coterie-")),
    )  # fmt: skip


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def judge(
    bundle: dsl.Input[dsl.Model],
    comparisons: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    start: dsl.Input[dsl.Model],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    judged: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
    title: str,
    prompts: int,
    best_of: int,
    length_tolerance: float,
    replicates: int,
    level: float,
    seed: int,
):
    """Whose policy people prefer, and the gate of each."""
    from pathlib import Path

    from components import artifacts
    from coterie import stages
    from coterie.config import JudgeSettings

    settings = JudgeSettings.of(
        prompts=prompts, best_of=best_of, length_tolerance=length_tolerance, replicates=replicates, level=level,
        seed=seed,
    )  # fmt: skip
    artifacts.run(
        stages.judge, out=judged, metrics=metrics, policies=[start, *policies], bundle=bundle, comparisons=comparisons,
        embedded=embedded, clustered=clustered, settings=settings, title=title,
    )  # fmt: skip
    artifacts.show(page, (Path(judged.path) / "policies.html").read_text(encoding="utf-8"))


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def release(
    bundle: dsl.Input[dsl.Model],
    start: dsl.Input[dsl.Model],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    judged: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
):
    """The bundle with the policies that serve."""
    from components import artifacts
    from coterie import stages

    figures = artifacts.run(
        stages.release, out=model, bundle=bundle, policies=[start, *policies], judged=judged,
    )  # fmt: skip
    model.metadata.update(model_version=figures["model_version"], mixture_version=figures["mixture_version"])
