"""Upload the pipelines to Kubeflow, and start them.

    python -m pipelines.upload --host http://ml-pipeline.kubeflow:8888 --image NAME@sha256:... [--placement FILE]
        [--default publish_online_store=redis ...]
    python -m pipelines.upload --host http://ml-pipeline.kubeflow:8888 --run refresh --set run=s3://runs/first ... [--wait 3600]

A pipeline's version is the hash of what is uploaded: the same again uploads nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import yaml
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType
from tenacity import retry, retry_if_exception, stop_after_delay, wait_fixed

from coterie.errors import BackendUnavailable, BadConfiguration, RunFailed
from coterie.options import InWords
from pipelines import coteries, refresh
from pipelines.placement import ANYWHERE, Placement, load_placement

PIPELINES = {"coteries": (coteries.coteries, coteries.compile_to), "refresh": (refresh.refresh, refresh.compile_to)}
"""Each pipeline, and what compiles it."""

_DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}$")
_ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_EVERY, _AWAY = 5.0, 120.0  # seconds between two looks at a run, and that Kubeflow may be away
TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"  # of kfp: where a projected service account token lies


def write(name: str, path: Path, image: str, placement: Placement, defaults: Mapping[str, str]) -> str:
    """Compile a pipeline for its upload.

    Args:
        name: coteries or refresh.
        path: of the file.
        image: that every component runs in.
        placement: of its steps.
        defaults: of parameters, in place of those of the code; those that another pipeline has are passed over.

    Returns:
        Its version: what of the file's sum tells it from others.

    Raises:
        BadConfiguration: a default of another type than the parameter's.
    """
    _, compile_to = PIPELINES[name]
    compile_to(path, image, placement)
    specification, *platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    known = specification["root"].get("inputDefinitions", {}).get("parameters", {})
    for parameter, value in defaults.items():
        if parameter in known:
            known[parameter]["defaultValue"] = _value(parameter, value, known[parameter]["parameterType"])
    text = yaml.safe_dump_all([specification, *platform], sort_keys=True)
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parameters(name: str) -> dict[str, str]:
    """The pipeline's parameters and their types, as Kubeflow names them."""
    known = PIPELINES[name][0].pipeline_spec.root.input_definitions.parameters
    return {parameter: ParameterType.ParameterTypeEnum.Name(of.parameter_type) for parameter, of in known.items()}


def upload(client: Any, name: str, file: Path, version: str, namespace: str | None = None) -> bool:
    """Make `file` a version of a pipeline, and the pipeline where there is none yet.

    Args:
        client: kfp.Client.
        name: of the pipeline.
        file: compiled.
        version: its name; where there is one of that name nothing is uploaded.
        namespace: of a multi-user Kubeflow.

    Returns:
        Whether there was none.

    Raises:
        BackendUnavailable: Kubeflow does not answer, or refuses.
    """
    with _said_in_words(name):
        import kfp_server_api

        identity = client.get_pipeline_id(name)
        if identity is None:
            made = kfp_server_api.V2beta1Pipeline(
                name=name, display_name=name, description=PIPELINES[name][0].description, namespace=namespace
            )
            identity = client._pipelines_api.pipeline_service_create_pipeline(made).pipeline_id
        if version in _versions(client, identity):
            return False
        client.upload_pipeline_version(str(file), version, pipeline_id=identity)
        return True


def start(
    client: Any, name: str, arguments: Mapping[str, Any], experiment: str, namespace: str | None, account: str | None
) -> str:
    """Start a run of the pipeline's newest version.

    Returns:
        The id of the run.

    Raises:
        BadConfiguration: the pipeline was not uploaded yet.
        BackendUnavailable: Kubeflow does not answer, or refuses.
    """
    with _said_in_words(name):
        identity = client.get_pipeline_id(name)
        versions = _versions(client, identity) if identity else {}
        if not versions:
            raise BadConfiguration(f"Kubeflow has no pipeline {name}: upload it first (python -m pipelines.upload)")
        client.create_experiment(experiment, namespace=namespace)
        of = client.get_experiment(experiment_name=experiment, namespace=namespace)
        title = f"{name} {datetime.now(UTC):%Y-%m-%d %H:%M}"
        newest = next(iter(versions.values()))
        run = client.run_pipeline(
            of.experiment_id,
            title,
            params=dict(arguments),
            pipeline_id=identity,
            version_id=newest,
            service_account=account,
        )
        return str(run.run_id)


def await_run(client: Any, run: str, seconds: int) -> None:
    """Wait for a run to end well; Kubeflow may be away for two minutes meanwhile.

    Raises:
        RunFailed: it ended otherwise, or not within `seconds`; the message says which step failed and what it said.
        BackendUnavailable: Kubeflow does not answer, or refuses.
    """
    until = time.monotonic() + seconds

    @retry(retry=retry_if_exception(_passes), stop=stop_after_delay(_AWAY), wait=wait_fixed(_EVERY), reraise=True)
    def look() -> Any:
        with _said_in_words(run):
            return client.get_run(run)

    while (seen := look()).state not in _ENDED:
        if time.monotonic() > until:
            raise RunFailed(f"the run {run} has not ended in {seconds} s; it goes on, see the Kubeflow UI")
        time.sleep(_EVERY)
    if seen.state != "SUCCEEDED":
        raise RunFailed(f"the run {run} has {str(seen.state).lower()}: {_failures(seen)}")


def _passes(error: BaseException) -> bool:
    """Whether to ask again helps."""
    status = getattr(error.__cause__, "status", None)
    return isinstance(error, BackendUnavailable) and (status is None or status >= 500)


def _versions(client: Any, identity: str) -> dict[str, str]:
    """The versions of a pipeline, newest first: id by name."""
    found: dict[str, str] = {}
    token = ""
    while True:
        page = client.list_pipeline_versions(identity, page_token=token, page_size=100, sort_by="created_at desc")
        found |= {version.display_name: version.pipeline_version_id for version in page.pipeline_versions or ()}
        token = page.next_page_token or ""
        if not token:
            return found


def _failures(run: Any) -> str:
    details = getattr(run.run_details, "task_details", None) or []
    told = [
        f"{task.display_name}{': ' + task.error.message if task.error and task.error.message else ''}"
        for task in details
        if task.state == "FAILED"
    ]
    return "; ".join(told) or (run.error.message if run.error and run.error.message else "the Kubeflow UI says why")


@contextmanager
def _said_in_words(subject: str) -> Iterator[None]:
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        yield
    except kfp_server_api.ApiException as error:
        body = re.sub(r"\s+", " ", str(error.body or error.reason))[:500]
        raise BackendUnavailable(f"{subject}: Kubeflow Pipelines answers {error.status}: {body}") from error
    except (HTTPError, OSError) as error:
        raise BackendUnavailable(
            f"{subject}: Kubeflow Pipelines does not answer ({error}). Is --host right, and is it up?"
        ) from error


def _value(parameter: str, text: str, kind: str) -> Any:
    """What `text` says, as a parameter of the type `kind` takes it."""
    if kind == "STRING":
        return text
    try:
        value = yaml.safe_load(text)
        fits = {
            "BOOLEAN": lambda: isinstance(value, bool),
            "LIST": lambda: isinstance(value, list),
            "NUMBER_DOUBLE": lambda: isinstance(value, int | float) and not isinstance(value, bool),
            "NUMBER_INTEGER": lambda: isinstance(value, int) and not isinstance(value, bool),
            "STRUCT": lambda: isinstance(value, dict),
        }[kind]()
    except yaml.YAMLError:
        fits = False
    if not fits:
        raise BadConfiguration(f"{parameter}={text}: is a {kind.lower().replace('_', ' ')}")
    return value


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    wrong = [name for name, sign, _ in pairs if not sign]
    if wrong:
        raise click.BadParameter(f"{wrong[0]}: write name=value")
    return {name: value for name, _, value in pairs}


@click.command(cls=InWords)
@click.option("--host", required=True, help="the API of Kubeflow Pipelines")
@click.option("--image", help="of the components, by digest")
@click.option("--placement", type=click.Path(path_type=Path), help="processors, memory, GPUs and nodes of every stage")
@click.option(
    "--set",
    "--default",
    "values",
    multiple=True,
    callback=_pairs,
    help="name=value: default of a parameter in the form; with --run a parameter of the run",
)
@click.option("--run", type=click.Choice(list(PIPELINES)), help="start this one in place of uploading")
@click.option("--experiment", default="coterie", show_default=True, help="of the run")
@click.option("--account", help="service account of the run; default: Kubeflow's")
@click.option("--wait", type=int, help="seconds to wait for the end of the run")
@click.option("--namespace", help="of a multi-user Kubeflow")
def main(
    host: str,
    image: str | None,
    placement: Path | None,
    values: dict[str, str],
    run: str | None,
    experiment: str,
    account: str | None,
    wait: int | None,
    namespace: str | None,
) -> None:
    """Upload the pipelines, or start one of them."""
    client = _client(host, namespace)
    if run is not None:
        types = parameters(run)
        unknown = sorted(values.keys() - types.keys())
        if unknown:
            raise BadConfiguration(f"{run} has no parameter {unknown[0]}; it has {', '.join(sorted(types))}")
        typed = {name: _value(name, text, types[name]) for name, text in values.items()}
        identity = start(client, run, typed, experiment, namespace, account)
        click.echo(f"{run}: run {identity} started")
        if wait is not None:
            await_run(client, identity, wait)
            click.echo(f"{run}: run {identity} succeeded")
        return
    if image is None:
        raise BadConfiguration("give the --image that the components run in")
    if not _DIGEST.match(image):
        click.echo(f"warning: {image} is no digest; Kubeflow's cache would serve what an older image made", err=True)
    unknown = sorted(values.keys() - parameters("coteries").keys() - parameters("refresh").keys())
    if unknown:
        raise BadConfiguration(f"no pipeline has a parameter {unknown[0]}")
    with tempfile.TemporaryDirectory() as folder:
        for name in PIPELINES:
            file = Path(folder) / f"{name}.yaml"
            version = write(name, file, image, load_placement(placement) if placement else ANYWHERE, values)
            new = upload(client, name, file, version, namespace)
            click.echo(f"{name}: version {version} {'uploaded' if new else 'is there already'}")


def _client(host: str, namespace: str | None) -> Any:
    """A client of Kubeflow Pipelines. Raises BackendUnavailable: it does not answer."""
    import kfp
    from kfp.client import ServiceAccountTokenVolumeCredentials

    credentials = ServiceAccountTokenVolumeCredentials(path=None) if os.environ.get(TOKEN_PATH) else None
    with _said_in_words(host):
        return kfp.Client(host=host, namespace=namespace or "kubeflow", credentials=credentials)


if __name__ == "__main__":
    main()
