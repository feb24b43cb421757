"""Components that find the coteries: embed, cluster, and publish to Feast."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def embed(
    comparisons: dsl.Input[dsl.Dataset],
    vectors: dsl.Input[dsl.Dataset],
    embedded: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    components: int,
    style: bool,
    rank: str,
    max_rank: int,
    splits: int,
    seed: int,
    joint_enabled: bool,
    joint_backbone: str,
    joint_revision: str,
    joint_lora_rank: int,
    joint_lora_alpha: int,
    joint_learning_rate: float,
    joint_epochs: float,
    joint_max_steps: int,
    joint_batch_size: int,
    joint_accumulation: int,
    joint_max_tokens: int,
    joint_pull: float,
    joint_dtype: str,
    joint_device: str,
    joint_checkpoint_steps: int,
    joint_seed: int,
):
    """Worker embeddings, learned jointly with the reward: on frozen features, and then with `joint_enabled` on a backbone."""
    # One step for both: the local runner hands no artifact out of a branch (OneOf).
    from pathlib import Path

    from components import artifacts
    from coterie import stages
    from coterie.config import EmbedSettings, JointSettings

    settings = EmbedSettings.of(
        components=components, style=style, rank=rank, max_rank=max_rank, splits=splits, seed=seed
    )  # fmt: skip
    artifacts.run(
        stages.embed, out=embedded, metrics=metrics, comparisons=comparisons, vectors=vectors, settings=settings
    )
    if joint_enabled:
        frozen = Path(embedded.path).rename(Path(embedded.path).with_name("frozen"))
        training = JointSettings.of(
            enabled=True, backbone=joint_backbone, revision=joint_revision, lora_rank=joint_lora_rank,
            lora_alpha=joint_lora_alpha, learning_rate=joint_learning_rate, epochs=joint_epochs,
            max_steps=joint_max_steps, batch_size=joint_batch_size, accumulation=joint_accumulation,
            max_tokens=joint_max_tokens, pull=joint_pull, dtype=joint_dtype, device=joint_device,
            checkpoint_steps=joint_checkpoint_steps, seed=joint_seed,
        )  # fmt: skip
        artifacts.run(stages.joint, out=embedded, embedded=frozen, comparisons=comparisons, settings=training)


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def cluster(
    embedded: dsl.Input[dsl.Dataset],
    clustered: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    coteries: str,
    max_coteries: int,
    min_workers: int,
    method: str,
    ship: str,
    replicates: int,
    splits: int,
    seed: int,
) -> list:
    """The verdict, the number of coteries and every worker's posterior; returns whose rewards to train."""
    from components import artifacts
    from coterie import stages
    from coterie.config import ClusterSettings

    settings = ClusterSettings.of(
        coteries=coteries, max_coteries=max_coteries, min_workers=min_workers, method=method, ship=ship,
        replicates=replicates, splits=splits, seed=seed,
    )  # fmt: skip
    figures = artifacts.run(stages.cluster, out=clustered, metrics=metrics, embedded=embedded, settings=settings)
    return [str(audience) for audience in stages.audiences(figures)]


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def publish(
    clustered: dsl.Input[dsl.Dataset],
    profiles: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    project: str,
    online_store: str,
):
    """Worker profiles into Feast."""
    from components import artifacts
    from coterie import stages
    from coterie.config import PublishSettings

    settings = PublishSettings.of(project=project, online_store=online_store)
    artifacts.run(stages.publish, out=profiles, metrics=metrics, clustered=clustered, settings=settings)
