"""The component that folds feedback into a run."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def refresh(
    run: dsl.Input[dsl.Dataset],
    refreshed: dsl.Output[dsl.Dataset],
    clustered: dsl.Output[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    database: str,
    always: bool,
):
    """Posteriors with feedback in them; a new run through the gate if people have changed; the bundle that is to serve."""
    import shutil
    from pathlib import Path

    from components import artifacts
    from coterie import stages

    figures = artifacts.run(
        stages.refresh, out=refreshed, metrics=metrics, run=run, database=database, always=always
    )  # fmt: skip
    shutil.copytree(Path(refreshed.path) / "clustered", clustered.path, dirs_exist_ok=True)
    shutil.copytree(Path(figures["serves"]) / "bundle", model.path, dirs_exist_ok=True)
    model.metadata.update(mixture_version=figures["mixture_version"], promoted=figures["promoted"])
