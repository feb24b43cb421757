"""Components up to the vectors: ingest and encode."""

# No `from __future__ import annotations` here: Kubeflow reads the annotations themselves.
from kfp import dsl

from components.image import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def look(source: list, pseudonyms: str) -> str:
    """A word for what the sources hold now, and for the key of the pseudonyms: Kubeflow's cache sees neither."""
    from components import artifacts
    from coterie import stages
    from coterie.config import IngestSettings

    settings = IngestSettings.of(source=source, pseudonyms=pseudonyms)
    return artifacts.run(stages.look, settings=settings)["state"]


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def ingest(
    comparisons: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    data_report: dsl.Output[dsl.Markdown],
    source: list,
    format: str,
    columns: dict,
    pseudonyms: str,
    max_refused: float,
    validation_share: float,
    test_share: float,
    seed: int,
    state: str,
):
    """Preferences with worker ids in, validated comparisons out; every refused row in quarantine.parquet.

    `state` is what `look` said: where it is another one, Kubeflow's cache does not serve.
    """
    from components import artifacts
    from coterie import stages
    from coterie.config import IngestSettings
    from coterie.ingest import data_report_markdown

    settings = IngestSettings.of(
        source=source, format=format, columns=columns, pseudonyms=pseudonyms, max_refused=max_refused,
        validation_share=validation_share, test_share=test_share, seed=seed,
    )  # fmt: skip
    figures = artifacts.run(stages.ingest, out=comparisons, metrics=metrics, settings=settings)
    artifacts.show(data_report, data_report_markdown(figures))


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def encode(
    comparisons: dsl.Input[dsl.Dataset],
    vectors: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    encoder: str,
    revision: str,
    max_tokens: int,
    batch_size: int,
    device: str,
    precision: str,
):
    """One vector and one row of readable style features for each unique response."""
    from components import artifacts
    from coterie import stages
    from coterie.config import EncodeSettings

    settings = EncodeSettings.of(
        encoder=encoder, revision=revision, max_tokens=max_tokens, batch_size=batch_size, device=device,
        precision=precision,
    )  # fmt: skip
    artifacts.run(stages.encode, out=vectors, metrics=metrics, comparisons=comparisons, settings=settings)
