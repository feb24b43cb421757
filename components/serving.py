"""The component that deploys what a run has made."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def deploy(
    bundle: dsl.Input[dsl.Model],
    profiles: dsl.Input[dsl.Dataset],
    deployed: dsl.Output[dsl.Dataset],
    said: dsl.Output[dsl.Markdown],
    namespace: str,
    release: str,
    timeout: int,
    comparisons: dsl.Input[dsl.Dataset] = None,
):
    """Serve the bundle in a release of the chart; with comparisons, if it passes the gate between versions."""
    from components import artifacts
    from coterie import stages
    from coterie.config import DeploySettings

    settings = DeploySettings.of(namespace=namespace, release=release, timeout=timeout)
    figures = artifacts.run(
        stages.deploy, out=deployed, bundle=bundle, address=bundle.uri, profiles=profiles.uri, settings=settings,
        comparisons=comparisons,
    )  # fmt: skip
    what = f"Bundle `{figures['model_version']}` serves" if figures["deployed"] else "Not deployed"
    artifacts.show(said, f"**{what}** in `{namespace}` as `{release}`: {figures['reason']}.\n")
