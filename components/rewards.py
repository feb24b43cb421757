"""Components that make and judge rewards: the global one, one a coterie, evaluation with its gate, bundle, report."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from typing import List  # noqa: UP035 - Kubeflow knows List[Model], not list[Model]

from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def global_reward(
    comparisons: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    reward: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    kind: str,
    precision: str,
    backbone: str,
    revision: str,
    lora_rank: int,
    lora_alpha: int,
    learning_rate: float,
    epochs: float,
    max_steps: int,
    batch_size: int,
    accumulation: int,
    max_tokens: int,
    pull: float,
    dtype: str,
    device: str,
    nodes: int,
    checkpoint_steps: int,
    seed: int,
):
    """The reward of everybody together."""
    from components import artifacts
    from coterie import stages
    from coterie.config import RewardSettings

    settings = RewardSettings.of(
        kind=kind, precision=precision, backbone=backbone, revision=revision, lora_rank=lora_rank,
        lora_alpha=lora_alpha, learning_rate=learning_rate, epochs=epochs, max_steps=max_steps,
        batch_size=batch_size, accumulation=accumulation, max_tokens=max_tokens, pull=pull, dtype=dtype,
        device=device, nodes=nodes, checkpoint_steps=checkpoint_steps, seed=seed,
    )  # fmt: skip
    artifacts.run(
        stages.reward, out=reward, metrics=metrics, embedded=embedded, clustered=clustered, settings=settings,
        comparisons=comparisons,
    )  # fmt: skip


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def coterie_reward(
    coterie: str,  # a loop over an untyped list hands its items on as text
    comparisons: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    global_reward: dsl.Input[dsl.Model],
    reward: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    kind: str,
    precision: str,
    backbone: str,
    revision: str,
    lora_rank: int,
    lora_alpha: int,
    learning_rate: float,
    epochs: float,
    max_steps: int,
    batch_size: int,
    accumulation: int,
    max_tokens: int,
    pull: float,
    dtype: str,
    device: str,
    nodes: int,
    checkpoint_steps: int,
    seed: int,
):
    """The reward of one coterie, started from the global one and pulled towards it; or of everybody by embedding."""
    from components import artifacts
    from coterie import stages
    from coterie.config import RewardSettings

    settings = RewardSettings.of(
        kind=kind, precision=precision, backbone=backbone, revision=revision, lora_rank=lora_rank,
        lora_alpha=lora_alpha, learning_rate=learning_rate, epochs=epochs, max_steps=max_steps,
        batch_size=batch_size, accumulation=accumulation, max_tokens=max_tokens, pull=pull, dtype=dtype,
        device=device, nodes=nodes, checkpoint_steps=checkpoint_steps, seed=seed,
    )  # fmt: skip
    artifacts.run(
        stages.reward, out=reward, metrics=metrics, embedded=embedded, clustered=clustered, settings=settings,
        coterie=int(coterie) if coterie.isdigit() else coterie, global_reward=global_reward, comparisons=comparisons,
    )  # fmt: skip


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    comparisons: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    global_reward: dsl.Input[dsl.Model],
    coterie_rewards: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluated: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    replicates: int,
    level: float,
    seed: int,
):
    """Own against global against wrong coterie on test prompts; the gate on validation prompts."""
    from components import artifacts
    from coterie import stages
    from coterie.config import EvaluateSettings

    settings = EvaluateSettings.of(replicates=replicates, level=level, seed=seed)
    artifacts.run(
        stages.evaluate, out=evaluated, metrics=metrics, embedded=embedded, clustered=clustered,
        rewards=[global_reward, *coterie_rewards], settings=settings, comparisons=comparisons,
    )  # fmt: skip


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def bundle(
    comparisons: dsl.Input[dsl.Dataset],
    vectors: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    global_reward: dsl.Input[dsl.Model],
    coterie_rewards: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluated: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    name: str,
    reference: int,
):
    """Everything that serves, as one versioned and checksummed artifact."""
    from components import artifacts
    from coterie import stages
    from coterie.config import BundleSettings

    figures = artifacts.run(
        stages.bundle, out=model, ingested=comparisons, encoded=vectors, embedded=embedded, clustered=clustered,
        rewards=[global_reward, *coterie_rewards], evaluated=evaluated,
        settings=BundleSettings.of(name=name, reference=reference),
    )  # fmt: skip
    model.metadata.update(model_version=figures["model_version"], mixture_version=figures["mixture_version"])


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def report(
    comparisons: dsl.Input[dsl.Dataset],
    vectors: dsl.Input[dsl.Dataset],
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Input[dsl.Dataset],
    global_reward: dsl.Input[dsl.Model],
    coterie_rewards: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluated: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    title: str,
):
    """The report for people, and metrics.json for programs."""
    from pathlib import Path

    from components import artifacts
    from coterie import stages
    from coterie.report import report_markdown

    figures = artifacts.run(
        stages.report, out=out, ingested=comparisons, encoded=vectors, embedded=embedded, clustered=clustered,
        rewards=[global_reward, *coterie_rewards], evaluated=evaluated, title=title,
    )  # fmt: skip
    artifacts.show(summary, report_markdown(figures))
    artifacts.show(page, (Path(out.path) / "report.html").read_text(encoding="utf-8"))
