"""The refresh pipeline: feedback into posteriors, and into a new run where people have changed.

python -m pipelines.refresh                              # writes pipelines/refresh.yaml anew
"""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
import functools
from pathlib import Path

from kfp import dsl

from components import discovery, feedback, serving
from pipelines import compiling
from pipelines.coteries import use_secrets
from pipelines.placement import ANYWHERE, Placement, placing, put

COMPILED = Path(__file__).with_name("refresh.yaml")
DESCRIPTION = (
    "Folds the feedback database into a run: posteriors always; coteries and rewards, through the gate between versions, "
    "if what people want has changed. run: address of the folder of the run that serves, as s3://bucket/runs/first. "
    "deploy_namespace: where the chart is installed; what is published is deployed there. Empty: it is not. "
    "PGPASSWORD and COTERIE_PSEUDONYM_KEY come from the secret coterie-pipeline."
)


def define(
    run: str,
    database: str,
    always: bool = False,
    publish_project: str = "coterie",
    publish_online_store: str = "redis",
    deploy_namespace: str = "",
    deploy_release: str = "coterie",
    deploy_timeout: int = 900,
):
    """Fold feedback in, publish the profiles, and deploy them with the bundle that is to serve."""
    imported = dsl.importer(artifact_uri=run, artifact_class=dsl.Dataset, reimport=True)
    folded = feedback.refresh(run=imported.output, database=database, always=always)
    folded.set_caching_options(False)  # the database has changed since
    published = discovery.publish(
        clustered=folded.outputs["clustered"], project=publish_project, online_store=publish_online_store
    )
    published.set_caching_options(False)
    use_secrets(folded)
    use_secrets(published)
    with dsl.If(deploy_namespace != "", name="where a namespace is given: deploy"):
        deployed = serving.deploy(  # the bundle has passed the gate, or is the one that serves
            bundle=folded.outputs["model"],
            profiles=published.outputs["profiles"],
            namespace=deploy_namespace,
            release=deploy_release,
            timeout=deploy_timeout,
        )
    deployed.set_caching_options(False)
    use_secrets(deployed)

    put(folded, "refresh")
    put(published, "publish")
    put(deployed, "deploy")


def pipeline(placement: Placement) -> dsl.base_component.BaseComponent:
    """The pipeline whose steps run in these places."""
    with placing(placement):
        return dsl.pipeline(name="refresh", description=DESCRIPTION)(define)


refresh = pipeline(ANYWHERE)
compile_to = functools.partial(compiling.compile_to, pipeline)

if __name__ == "__main__":
    compiling.command(pipeline, COMPILED)()
