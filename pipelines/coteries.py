"""The main pipeline: from raw preferences to a bundle that serves, worker profiles in Feast, and a report.

python -m pipelines.coteries                              # writes pipelines/coteries.yaml anew
python -m pipelines.coteries --image NAME@sha256:... --out FILE.yaml      # to upload
"""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from pathlib import Path

import click
from kfp import compiler, dsl, kubernetes

from components import data, discovery, rewards
from components.artifacts import SECRETS_FOLDER
from components.image import TRAIN_IMAGE

COMPILED = Path(__file__).with_name("coteries.yaml")

SECRET = "coterie-pipeline"


def use_secrets(task: dsl.PipelineTask) -> None:
    """Give a task the environment variables that the secret coterie-pipeline holds, if there is one.

    As a volume, which components.artifacts reads: the backend (seen with 2.14) honours `optional` there, and not for
    environment variables.
    """
    kubernetes.use_secret_as_volume(task, SECRET, mount_path=SECRETS_FOLDER, optional=True)


@dsl.pipeline(
    name="coteries",
    description="Finds the groups of annotators who agree with each other and gives each group its own reward. "
    "ingest_source: files, globs, s3:// or hf:// addresses of preferences with worker ids; simulated://groups runs it on "
    "made-up annotators. cluster_coteries and embed_rank: auto lets held-out likelihood choose. The worker ids become "
    "keyed pseudonyms (key COTERIE_PSEUDONYM_KEY of the secret coterie-pipeline) unless ingest_pseudonyms is none.",
)
def coteries(
    title: str = "coterie",
    ingest_source: list = ["simulated://groups"],  # noqa: B006 - Kubeflow serialises the default
    ingest_format: str = "auto",
    ingest_columns: dict = {},  # noqa: B006
    ingest_pseudonyms: str = "keyed",
    ingest_max_refused: float = 0.05,
    ingest_validation_share: float = 0.15,
    ingest_test_share: float = 0.2,
    ingest_seed: int = 0,
    encode_encoder: str = "minilm",
    encode_revision: str = "main",
    encode_max_tokens: int = 256,
    encode_batch_size: int = 32,
    encode_device: str = "auto",
    encode_precision: str = "auto",
    embed_components: int = 32,
    embed_style: bool = True,
    embed_rank: str = "auto",
    embed_max_rank: int = 4,
    embed_splits: int = 3,
    embed_seed: int = 0,
    cluster_coteries: str = "auto",
    cluster_max_coteries: int = 8,
    cluster_min_workers: int = 5,
    cluster_method: str = "mixture",
    cluster_ship: str = "auto",
    cluster_replicates: int = 59,
    cluster_splits: int = 3,
    cluster_seed: int = 0,
    reward_precision: str = "auto",
    reward_seed: int = 0,
    evaluate_replicates: int = 1000,
    evaluate_level: float = 0.95,
    evaluate_seed: int = 0,
    bundle_name: str = "coterie",
    bundle_reference: int = 512,
    publish_project: str = "coterie",
    publish_online_store: str = "sqlite",
):
    """All stages; `coterie run` calls this very function in-process."""
    comparisons = data.ingest(
        source=ingest_source,
        format=ingest_format,
        columns=ingest_columns,
        pseudonyms=ingest_pseudonyms,
        max_refused=ingest_max_refused,
        validation_share=ingest_validation_share,
        test_share=ingest_test_share,
        seed=ingest_seed,
    )
    use_secrets(comparisons)
    vectors = data.encode(
        comparisons=comparisons.outputs["comparisons"],
        encoder=encode_encoder,
        revision=encode_revision,
        max_tokens=encode_max_tokens,
        batch_size=encode_batch_size,
        device=encode_device,
        precision=encode_precision,
    )
    embedded = discovery.embed(
        comparisons=comparisons.outputs["comparisons"],
        vectors=vectors.outputs["vectors"],
        components=embed_components,
        style=embed_style,
        rank=embed_rank,
        max_rank=embed_max_rank,
        splits=embed_splits,
        seed=embed_seed,
    )
    clustered = discovery.cluster(
        embedded=embedded.outputs["embedded"],
        coteries=cluster_coteries,
        max_coteries=cluster_max_coteries,
        min_workers=cluster_min_workers,
        method=cluster_method,
        ship=cluster_ship,
        replicates=cluster_replicates,
        splits=cluster_splits,
        seed=cluster_seed,
    )
    published = discovery.publish(
        clustered=clustered.outputs["clustered"], project=publish_project, online_store=publish_online_store
    )
    published.set_caching_options(False)  # a profile carries the time of its publication
    use_secrets(published)

    common = rewards.global_reward(
        embedded=embedded.outputs["embedded"],
        clustered=clustered.outputs["clustered"],
        precision=reward_precision,
        seed=reward_seed,
    )
    with dsl.ParallelFor(clustered.outputs["Output"]) as coterie:
        own = rewards.coterie_reward(
            coterie=coterie,
            embedded=embedded.outputs["embedded"],
            clustered=clustered.outputs["clustered"],
            global_reward=common.outputs["reward"],
            precision=reward_precision,
            seed=reward_seed,
        )

    def collected() -> dsl.Collected:
        # One for each consumer: the compiler changes the object it is given.
        return dsl.Collected(own.outputs["reward"])

    evaluated = rewards.evaluate(
        embedded=embedded.outputs["embedded"],
        clustered=clustered.outputs["clustered"],
        global_reward=common.outputs["reward"],
        coterie_rewards=collected(),
        replicates=evaluate_replicates,
        level=evaluate_level,
        seed=evaluate_seed,
    )
    everything = {
        "comparisons": comparisons.outputs["comparisons"],
        "vectors": vectors.outputs["vectors"],
        "embedded": embedded.outputs["embedded"],
        "clustered": clustered.outputs["clustered"],
        "global_reward": common.outputs["reward"],
        "evaluated": evaluated.outputs["evaluated"],
    }
    rewards.bundle(**everything, coterie_rewards=collected(), name=bundle_name, reference=bundle_reference)
    rewards.report(**everything, coterie_rewards=collected(), title=title)


def compile_to(path: Path, image: str = TRAIN_IMAGE) -> None:
    """Write the pipeline's YAML with `image` in every component."""
    compiler.Compiler().compile(coteries, str(path))
    if image != TRAIN_IMAGE:
        path.write_text(path.read_text(encoding="utf-8").replace(TRAIN_IMAGE, image), encoding="utf-8")


@click.command()
@click.option("--image", default=TRAIN_IMAGE, help="by digest: Kubeflow's cache key is the image's name")
@click.option("--out", type=click.Path(path_type=Path), default=COMPILED)
def main(image: str, out: Path) -> None:
    """Compile the pipeline; without options, pipelines/coteries.yaml anew."""
    compile_to(out, image)


if __name__ == "__main__":
    main()
