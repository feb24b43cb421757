"""From a pipeline to the YAML that Kubeflow takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from kfp import compiler, dsl

from components.image import TRAIN_IMAGE
from pipelines.placement import ANYWHERE, Placement, load_placement

Pipeline = Callable[[Placement], dsl.base_component.BaseComponent]
"""What makes the pipeline whose steps run in the places of a placement."""


def compile_to(pipeline: Pipeline, path: Path, image: str = TRAIN_IMAGE, placement: Placement = ANYWHERE) -> None:
    """Write the pipeline's YAML with `image` in every component."""
    compiler.Compiler().compile(pipeline(placement), str(path))
    if image != TRAIN_IMAGE:
        path.write_text(path.read_text(encoding="utf-8").replace(TRAIN_IMAGE, image), encoding="utf-8")


def command(pipeline: Pipeline, compiled: Path) -> click.Command:
    """The command that compiles a pipeline, without options into `compiled`."""

    @click.command()
    @click.option("--image", default=TRAIN_IMAGE, help="by digest: Kubeflow's cache key is the image's name")
    @click.option(
        "--placement", type=click.Path(path_type=Path), help="processors, memory, GPUs and nodes of every stage"
    )
    @click.option("--out", type=click.Path(path_type=Path), default=compiled)
    def main(image: str, placement: Path | None, out: Path) -> None:
        """Compile the pipeline; without options, the committed YAML anew."""
        compile_to(pipeline, out, image, load_placement(placement) if placement else ANYWHERE)

    return main
