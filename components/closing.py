"""The component that ends a run, however it ended."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def close(said: dsl.Output[dsl.Markdown], status: dsl.PipelineTaskFinalStatus, title: str):
    """Say how the run has ended, and where to look."""
    from components import artifacts

    artifacts.show(said, artifacts.ending(title, status.state, status.error_message))
