"""The main pipeline: from raw preferences to a bundle that serves, worker profiles in Feast, and a report.

python -m pipelines.coteries                              # writes pipelines/coteries.yaml anew
"""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
import functools
from pathlib import Path
from typing import Any

from kfp import dsl, kubernetes

from components import closing, data, discovery, policies, rewards, serving
from components.artifacts import SECRETS_FOLDER
from pipelines import compiling
from pipelines.placement import ANYWHERE, Placement, placing, put

COMPILED = Path(__file__).with_name("coteries.yaml")

SECRET = "coterie-pipeline"


def use_secrets(task: dsl.PipelineTask) -> None:
    """Give a task the environment variables that the secret coterie-pipeline holds, if there is one.

    As a volume, which components.artifacts reads: the backend (seen with 2.14) honours `optional` there, and not for
    environment variables.
    """
    kubernetes.use_secret_as_volume(task, SECRET, mount_path=SECRETS_FOLDER, optional=True)


DESCRIPTION = (
    "Finds the groups of annotators who agree with each other and gives each group its own reward. "
    "ingest_source: files, globs, s3:// or hf:// addresses of preferences with worker ids; simulated://groups runs it on "
    "made-up annotators. cluster_coteries and embed_rank: auto lets held-out likelihood choose. The worker ids become "
    "keyed pseudonyms (key COTERIE_PSEUDONYM_KEY of the secret coterie-pipeline) unless ingest_pseudonyms is none. "
    "deploy_namespace: where the chart is installed; the bundle serves there if it passes the gate. Empty: it does not."
)


def define(
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
    joint_enabled: bool = False,
    joint_backbone: str = "smollm2",
    joint_revision: str = "main",
    joint_lora_rank: int = 16,
    joint_lora_alpha: int = 32,
    joint_learning_rate: float = 0.0001,
    joint_epochs: float = 1.0,
    joint_max_steps: int = 0,
    joint_batch_size: int = 8,
    joint_accumulation: int = 1,
    joint_max_tokens: int = 512,
    joint_pull: float = 1.0,
    joint_dtype: str = "auto",
    joint_device: str = "auto",
    joint_checkpoint_steps: int = 100,
    joint_seed: int = 0,
    cluster_coteries: str = "auto",
    cluster_max_coteries: int = 8,
    cluster_min_workers: int = 5,
    cluster_method: str = "mixture",
    cluster_ship: str = "auto",
    cluster_replicates: int = 59,
    cluster_splits: int = 3,
    cluster_seed: int = 0,
    reward_kind: str = "head",
    reward_precision: str = "auto",
    reward_backbone: str = "smollm2",
    reward_revision: str = "main",
    reward_lora_rank: int = 16,
    reward_lora_alpha: int = 32,
    reward_learning_rate: float = 1e-4,
    reward_epochs: float = 1.0,
    reward_max_steps: int = 0,
    reward_batch_size: int = 8,
    reward_accumulation: int = 1,
    reward_max_tokens: int = 512,
    reward_pull: float = 1.0,
    reward_dtype: str = "auto",
    reward_device: str = "auto",
    reward_nodes: int = 1,
    reward_checkpoint_steps: int = 100,
    reward_seed: int = 0,
    evaluate_replicates: int = 1000,
    evaluate_level: float = 0.95,
    evaluate_seed: int = 0,
    bundle_name: str = "coterie",
    bundle_reference: int = 512,
    align_method: str = "none",
    align_backbone: str = "smollm2",
    align_revision: str = "main",
    align_sft_steps: int = 0,
    align_steps: int = 60,
    align_batch_size: int = 16,
    align_group: int = 4,
    align_response_tokens: int = 48,
    align_prompt_tokens: int = 256,
    align_temperature: float = 0.9,
    align_learning_rate: float = 3e-05,
    align_kl_coefficient: float = 0.05,
    align_kl_limit: float = 10.0,
    align_lora_rank: int = 16,
    align_lora_alpha: int = 32,
    align_dtype: str = "auto",
    align_device: str = "auto",
    align_seed: int = 0,
    judge_prompts: int = 200,
    judge_best_of: int = 16,
    judge_length_tolerance: float = 0.1,
    judge_replicates: int = 1000,
    judge_level: float = 0.95,
    judge_seed: int = 0,
    publish_project: str = "coterie",
    publish_online_store: str = "sqlite",
    deploy_namespace: str = "",
    deploy_release: str = "coterie",
    deploy_timeout: int = 900,
):
    """All stages; `coterie run` calls this very function in-process."""
    looked = data.look(source=ingest_source, pseudonyms=ingest_pseudonyms)
    looked.set_caching_options(False)
    use_secrets(looked)
    comparisons = data.ingest(
        source=ingest_source,
        format=ingest_format,
        columns=ingest_columns,
        pseudonyms=ingest_pseudonyms,
        max_refused=ingest_max_refused,
        validation_share=ingest_validation_share,
        test_share=ingest_test_share,
        seed=ingest_seed,
        state=looked.output,
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
        joint_enabled=joint_enabled,
        joint_backbone=joint_backbone,
        joint_revision=joint_revision,
        joint_lora_rank=joint_lora_rank,
        joint_lora_alpha=joint_lora_alpha,
        joint_learning_rate=joint_learning_rate,
        joint_epochs=joint_epochs,
        joint_max_steps=joint_max_steps,
        joint_batch_size=joint_batch_size,
        joint_accumulation=joint_accumulation,
        joint_max_tokens=joint_max_tokens,
        joint_pull=joint_pull,
        joint_dtype=joint_dtype,
        joint_device=joint_device,
        joint_checkpoint_steps=joint_checkpoint_steps,
        joint_seed=joint_seed,
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

    of_reward = {
        "kind": reward_kind,
        "precision": reward_precision,
        "backbone": reward_backbone,
        "revision": reward_revision,
        "lora_rank": reward_lora_rank,
        "lora_alpha": reward_lora_alpha,
        "learning_rate": reward_learning_rate,
        "epochs": reward_epochs,
        "max_steps": reward_max_steps,
        "batch_size": reward_batch_size,
        "accumulation": reward_accumulation,
        "max_tokens": reward_max_tokens,
        "pull": reward_pull,
        "dtype": reward_dtype,
        "device": reward_device,
        "nodes": reward_nodes,
        "checkpoint_steps": reward_checkpoint_steps,
        "seed": reward_seed,
    }
    learned = {
        "comparisons": comparisons.outputs["comparisons"],
        "embedded": embedded.outputs["embedded"],
        "clustered": clustered.outputs["clustered"],
    }
    common = rewards.global_reward(**learned, **of_reward)
    # A loop has no name of its own: Kubeflow's driver would not find what is collected of it (seen in 2.14).
    with dsl.ParallelFor(clustered.outputs["Output"]) as coterie:
        own = rewards.coterie_reward(coterie=coterie, **learned, global_reward=common.outputs["reward"], **of_reward)

    def collected() -> dsl.Collected:
        # One for each consumer: the compiler changes the object it is given.
        return dsl.Collected(own.outputs["reward"])

    evaluated = rewards.evaluate(
        **learned,
        global_reward=common.outputs["reward"],
        coterie_rewards=collected(),
        replicates=evaluate_replicates,
        level=evaluate_level,
        seed=evaluate_seed,
    )
    everything = {
        **learned,
        "vectors": vectors.outputs["vectors"],
        "global_reward": common.outputs["reward"],
        "evaluated": evaluated.outputs["evaluated"],
    }
    bundled = rewards.bundle(**everything, coterie_rewards=collected(), name=bundle_name, reference=bundle_reference)
    told = rewards.report(**everything, coterie_rewards=collected(), title=title)

    of_align = {
        "method": align_method,
        "backbone": align_backbone,
        "revision": align_revision,
        "sft_steps": align_sft_steps,
        "steps": align_steps,
        "batch_size": align_batch_size,
        "group": align_group,
        "response_tokens": align_response_tokens,
        "prompt_tokens": align_prompt_tokens,
        "temperature": align_temperature,
        "learning_rate": align_learning_rate,
        "kl_coefficient": align_kl_coefficient,
        "kl_limit": align_kl_limit,
        "lora_rank": align_lora_rank,
        "lora_alpha": align_lora_alpha,
        "dtype": align_dtype,
        "device": align_device,
        "seed": align_seed,
    }

    def deploy(bundle: Any) -> None:
        with dsl.If(deploy_namespace != "", name="where a namespace is given: deploy"):
            deployed = serving.deploy(
                bundle=bundle,
                profiles=published.outputs["profiles"],
                comparisons=comparisons.outputs["comparisons"],
                namespace=deploy_namespace,
                release=deploy_release,
                timeout=deploy_timeout,
            )
        deployed.set_caching_options(False)  # what serves there has changed since
        use_secrets(deployed)
        put(deployed, "deploy")

    texts = {"bundle": bundled.outputs["model"], "comparisons": comparisons.outputs["comparisons"]}
    with dsl.If(align_method == "none", name="without policies"):
        deploy(bundled.outputs["model"])
    with dsl.If(align_method != "none", name="with policies"):
        started = policies.start(**texts, **of_align)
        with dsl.ParallelFor(started.outputs["Output"]) as audience:
            tuned = policies.align(audience=audience, **texts, start=started.outputs["policy"], **of_align)
        judged = policies.judge(
            **texts,
            embedded=embedded.outputs["embedded"],
            clustered=clustered.outputs["clustered"],
            start=started.outputs["policy"],
            policies=dsl.Collected(tuned.outputs["policy"]),
            title=title,
            prompts=judge_prompts,
            best_of=judge_best_of,
            length_tolerance=judge_length_tolerance,
            replicates=judge_replicates,
            level=judge_level,
            seed=judge_seed,
        )
        released = policies.release(
            bundle=bundled.outputs["model"],
            start=started.outputs["policy"],
            policies=dsl.Collected(tuned.outputs["policy"]),
            judged=judged.outputs["judged"],
        )
        deploy(released.outputs["model"])

    put(looked, "ingest")
    put(comparisons, "ingest")
    put(vectors, "encode")
    put(embedded, "embed")
    put(clustered, "cluster")
    put(published, "publish")
    put(common, "reward")
    put(own, "reward")
    put(evaluated, "evaluate")
    put(bundled, "bundle")
    put(told, "report")
    put(started, "align")
    put(tuned, "align")
    put(judged, "judge")
    put(released, "bundle")


def pipeline(placement: Placement) -> dsl.base_component.BaseComponent:
    """The pipeline whose steps run in these places; however it ends, a last step says so."""

    @functools.wraps(define)
    def closed(title: Any, *settings: Any) -> None:
        with dsl.ExitHandler(closing.close(title=title), name="stages"):
            define(title, *settings)

    with placing(placement):  # Kubeflow learns what a pipeline is by calling its function
        return dsl.pipeline(name="coteries", description=DESCRIPTION)(closed)


coteries = pipeline(ANYWHERE)


compile_to = functools.partial(compiling.compile_to, pipeline)

if __name__ == "__main__":
    compiling.command(pipeline, COMPILED)()
