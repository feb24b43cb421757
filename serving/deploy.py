"""The deploy step: the one owner of a release's InferenceService.

    python -m serving.deploy --namespace N --release R --bundle URI --profiles URI [--comparisons FILE]
    python -m serving.deploy --namespace N --release R --incumbent       what serves, with the chart's new template
    python -m serving.deploy --namespace N --release R --remove

A bundle is deployed when all its pods are ready and give the golden scores through the Service. Until then the pods before
answer, and on any failure what served before is put back.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click
import yaml

from coterie.config import DeploySettings, EvaluateSettings
from coterie.contracts import Manifest, content_id
from coterie.errors import BadBundle, BadConfiguration, BadData, CoterieError, RunFailed
from coterie.manifest import GOLDEN_FILE, MANIFEST_FILE, check_sum, read_manifest
from coterie.options import InWords, PathOption, read_settings, settings_options
from serving.confirmation import confirm
from serving.fetch import BUNDLE, CLAIMS, MODEL_VERSION, PROFILES, claim_of, fetch_bundle, fetch_files
from serving.rollout import FETCH, PARTS, REVISION, Cluster, revision

log = logging.getLogger("coterie.serving")

ANNOTATIONS = {
    "bundle": "coterie.dev/bundle",
    "version": "coterie.dev/model-version",
    "profiles": "coterie.dev/profiles",
}
_VOLUME = "bundle"  # of the predictor's pod, mounted in both its containers
_ONLINE = 2  # published folders that are served: the bundle's, and those of the one before, which the switch needs
_LEAST = 60.0  # seconds that questions have, however long the rollout took


@dataclass(frozen=True)
class Served:
    """What an InferenceService serves: addresses, the bundle's version (empty: not known), profiles newest first."""

    bundle: str
    version: str
    profiles: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Mapping[str, Any] | None) -> Self | None:
        """As its annotations tell; None where nothing was deployed."""
        told = ((manifest or {}).get("metadata") or {}).get("annotations") or {}
        bundle = told.get(ANNOTATIONS["bundle"])
        if not bundle:
            return None
        profiles = tuple(uri for uri in told.get(ANNOTATIONS["profiles"], "").split(",") if uri)
        return cls(bundle, told.get(ANNOTATIONS["version"], ""), profiles)


@dataclass(frozen=True)
class _Candidate:
    """A bundle that is to be deployed; no manifest and golden scores of one on a claim, which only its pods see."""

    manifest: Manifest | None
    golden: list[dict[str, Any]]


def deploy(
    bundle: str,
    profiles: str | None,
    settings: DeploySettings,
    comparisons: Path | None = None,
    folder: Path | None = None,
    url: str | None = None,
) -> dict[str, Any]:
    """Let a bundle serve in place of the one that does.

    Args:
        bundle: its address, which keeps this bundle for ever.
        profiles: address of the published folder of its run; None: those that serve.
        settings: the release, and how long a rollout may take.
        comparisons: of the run that made the bundle; with them it must pass the gate between versions.
        folder: a copy of the bundle; None: it is fetched.
        url: where the Service answers, if not by its name in the cluster.

    Returns:
        deployed, reason, model_version and mixture_version of what serves. A bundle that is not promoted is no failure.

    Raises:
        BadConfiguration, BadBundle, BadData: what is asked for cannot be deployed; nothing was touched.
        RunFailed: it was, and did not come up; what served before serves again.
        BackendUnavailable: the cluster or the store does not answer.
    """
    cluster, before = _release(settings)
    serves = Served.of(before)
    with tempfile.TemporaryDirectory(prefix="coterie-") as scratch:
        candidate = _look_at(bundle, folder, Path(scratch))
        version = candidate.manifest.model_version if candidate.manifest else ""
        _immutable(serves, bundle, version)
        if comparisons is not None and serves is not None and serves.version != version:
            decision = _gate(bundle, folder, serves, comparisons, Path(scratch))
            if not decision["promote"]:
                log.info("not promoted: %s. %s serves on", decision["reason"], serves.version or serves.bundle)
                return _figures(False, f"not promoted: {decision['reason']}", serves.version, None)
    kept = [] if serves is None else list(serves.profiles)
    wanted = list(dict.fromkeys(([profiles] if profiles else []) + kept))[:_ONLINE]
    if not wanted:
        raise BadConfiguration(
            f"{bundle}: no profiles to serve it with: name the published folder of its run (--profiles)."
        )
    manifest = render(cluster.template(), settings.release, Served(bundle, version, tuple(wanted)))
    return _roll_out(cluster, manifest, before, candidate, settings, url)


def deploy_incumbent(settings: DeploySettings, url: str | None = None) -> dict[str, Any]:
    """Let what serves now serve by the chart's present template: new images, resources, settings.

    Returns, raises: as deploy.
    """
    cluster, before = _release(settings)
    serves = Served.of(before)
    if serves is None:
        log.info("nothing is deployed yet: run the pipeline with deploy_namespace, or name a bundle")
        return _figures(False, "nothing is deployed yet", "", None)
    with tempfile.TemporaryDirectory(prefix="coterie-") as scratch:
        candidate = _look_at(serves.bundle, None, Path(scratch))
    _immutable(serves, serves.bundle, candidate.manifest.model_version if candidate.manifest else "")
    manifest = render(cluster.template(), settings.release, serves)
    return _roll_out(cluster, manifest, before, candidate, settings, url)


def remove(settings: DeploySettings) -> bool:
    """Remove the InferenceService and wait until its pods' Deployments are gone; return whether there was one.

    Raises:
        RunFailed: they do not go. BadConfiguration, BackendUnavailable: as deploy.
    """
    cluster = Cluster(settings.namespace, settings.release)
    return cluster.remove(time.monotonic() + settings.timeout)


def render(template: str, release: str, served: Served) -> dict[str, Any]:
    """The InferenceService of the chart's template with what it serves filled in.

    Raises:
        BadConfiguration: the template is not the chart's.
    """
    try:
        manifest = yaml.safe_load(template)
        metadata, parts = manifest["metadata"], {part: manifest["spec"][part] for part in PARTS}
        fetches = {
            part: next(one for one in spec["initContainers"] if one["name"] == FETCH) for part, spec in parts.items()
        }
        if manifest["kind"] != "InferenceService" or metadata["name"] != release:
            raise ValueError(f"it is a {manifest['kind']} named {metadata['name']}")
    except (yaml.YAMLError, TypeError, KeyError, StopIteration, ValueError) as error:
        raise BadConfiguration(
            f"the template of release {release} is no InferenceService whose predictor and transformer have an init container "
            f"{FETCH} ({type(error).__name__}: {error}). Upgrade the chart to the version of this image."
        ) from error
    told = {"bundle": served.bundle, "version": served.version, "profiles": ",".join(served.profiles)}
    metadata.setdefault("annotations", {}).update({ANNOTATIONS[name]: value for name, value in told.items()})
    predictor, transformer = PARTS
    _set(fetches[predictor], {BUNDLE: served.bundle, MODEL_VERSION: served.version})
    _set(fetches[transformer], {PROFILES: told["profiles"]})
    if (claim := claim_of(served.bundle)) is not None:
        _replace_volume(parts[predictor], claim.name, claim.path)
    for name in dict.fromkeys(claim.name for uri in served.profiles if (claim := claim_of(uri)) is not None):
        _add_claim(parts[transformer], fetches[transformer], name)
    mark = content_id(json.dumps(manifest, sort_keys=True))
    for fetch in fetches.values():
        _set(fetch, {REVISION: mark})
    return dict(manifest)


def _release(settings: DeploySettings) -> tuple[Cluster, dict[str, Any] | None]:
    if not settings.namespace:
        raise BadConfiguration("deploy: no namespace; name the one that the chart is installed in (--namespace)")
    cluster = Cluster(settings.namespace, settings.release)
    return cluster, cluster.read()


def _look_at(bundle: str, folder: Path | None, scratch: Path) -> _Candidate:
    """Manifest and golden scores of a bundle, of which its pods will check the rest.

    Raises:
        BadBundle: there is none, or these are damaged. BadData, BackendUnavailable: as serving.fetch.
    """
    if folder is None:
        if claim_of(bundle) is not None:
            return _Candidate(None, [])
        folder = scratch / "looked-at"
        fetch_files(bundle, [MANIFEST_FILE, GOLDEN_FILE], folder)
    manifest = read_manifest(folder)
    check_sum(folder, GOLDEN_FILE, manifest)
    return _Candidate(manifest, json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8")))


def _immutable(serves: Served | None, bundle: str, version: str) -> None:
    """Raises BadConfiguration: the address serves, and holds another bundle now."""
    if serves is not None and serves.bundle == bundle and serves.version and version and serves.version != version:
        raise BadConfiguration(
            f"{bundle}: holds the bundle {version} now, and serves as {serves.version}. Bundle addresses are immutable, since a "
            "pod that starts again reads the address again: put the new bundle elsewhere, and the old one back."
        )


def _gate(bundle: str, folder: Path | None, serves: Served, comparisons: Path, scratch: Path) -> dict[str, Any]:
    """The decision of coterie.promotion; needs torch where rewards are adapters, or the encoder is a model."""
    from coterie import stages

    try:
        fetch_bundle(serves.bundle, _made(scratch / "incumbent"), serves.version)
    except (BadBundle, BadData) as error:
        raise BadData(
            f"the bundle that serves cannot be compared with: {error} Deploy without comparisons to replace it unseen."
        ) from error
    if folder is None:
        folder = _made(scratch / "candidate")
        fetch_bundle(bundle, folder)
    return stages.promote(folder, scratch / "incumbent", comparisons, scratch / "promote", EvaluateSettings())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _set(container: dict[str, Any], values: Mapping[str, str]) -> None:
    """Set environment variables of a container."""
    others = [variable for variable in container.get("env") or [] if variable["name"] not in values]
    container["env"] = [*others, *({"name": name, "value": value} for name, value in values.items())]


def _replace_volume(spec: dict[str, Any], claim: str, path: str) -> None:
    """Let the claim take the place of the predictor's volume, read-only, in every container that mounts it."""
    others = [volume for volume in spec.get("volumes") or [] if volume["name"] != _VOLUME]
    source = {"claimName": claim, "readOnly": True}
    spec["volumes"] = [*others, {"name": _VOLUME, "persistentVolumeClaim": source}]
    for container in [*spec["initContainers"], *spec["containers"]]:
        for mount in container.get("volumeMounts") or []:
            if mount["name"] == _VOLUME:
                mount |= {"readOnly": True} | ({"subPath": path} if path else {})


def _add_claim(spec: dict[str, Any], fetch: dict[str, Any], claim: str) -> None:
    """Mount a claim where serving.fetch looks for it."""
    volume, source = f"claim-{claim}", {"claimName": claim, "readOnly": True}
    spec.setdefault("volumes", []).append({"name": volume, "persistentVolumeClaim": source})
    mount = {"name": volume, "mountPath": str(CLAIMS / claim), "readOnly": True}
    fetch.setdefault("volumeMounts", []).append(mount)


def _roll_out(
    cluster: Cluster,
    manifest: dict[str, Any],
    before: dict[str, Any] | None,
    candidate: _Candidate,
    settings: DeploySettings,
    url: str | None,
) -> dict[str, Any]:
    """Write the InferenceService, follow the rollout, ask golden scores; else put back what was there."""
    deadline = time.monotonic() + settings.timeout
    with _put_back(cluster, manifest, before, settings.timeout):
        cluster.write(manifest, before)
        cluster.follow(manifest, deadline)
        service = url or f"http://{settings.release}-transformer.{settings.namespace}"
        until = max(deadline, time.monotonic() + _LEAST)
        version, mixture = confirm(service, candidate.manifest, candidate.golden, until)
    log.info("bundle %s serves in %s as %s", version, settings.namespace, settings.release)
    return _figures(True, "every replica is new and gives the golden scores", version, mixture)


@contextmanager
def _put_back(
    cluster: Cluster, manifest: dict[str, Any], before: dict[str, Any] | None, seconds: float
) -> Iterator[None]:
    """Within, an InferenceService is changed; whatever ends the block early, SIGTERM included, undoes that."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        if revision(before) == revision(manifest):  # nothing was changed
            raise
        deadline = time.monotonic() + seconds
        try:
            if revision(cluster.read()) != revision(manifest):  # it was not written, or somebody else's is
                raise
            log.warning("%s\nPutting back what served before", error)
            if before is None:
                cluster.remove(deadline)
            else:
                cluster.write(before, manifest)
            if before is not None and isinstance(error, Exception):  # who is told to stop has no time to wait
                cluster.follow(before, deadline)
        except CoterieError as second:
            if second is error:
                raise
            raise RunFailed(f"{error}\nAnd what served before could not be put back: {second}") from error
        if not isinstance(error, CoterieError):
            raise
        state = "nothing serves, as before" if before is None else "what served before serves again"
        raise RunFailed(f"{error}\nWith this {state}.") from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _figures(deployed: bool, reason: str, version: str, mixture: str | None) -> dict[str, Any]:
    return {"deployed": deployed, "reason": reason, "model_version": version, "mixture_version": mixture}


@click.command(cls=InWords)
@settings_options(DeploySettings)
@click.option("--bundle", help="its address: s3://bucket/key, pvc://claim/path, or a folder")
@click.option("--profiles", help="address of the published folder of its run")
@click.option(
    "--comparisons", type=PathOption, help="of its run; with them the bundle must pass the gate between versions"
)
@click.option("--incumbent", is_flag=True, help="deploy what serves now, by the chart's present template")
@click.option("--remove", "removing", is_flag=True, help="remove what serves")
@click.option("--url", help="where the Service answers; default: by its name in the cluster")
def main(
    bundle: str | None,
    profiles: str | None,
    comparisons: Path | None,
    incumbent: bool,
    removing: bool,
    url: str | None,
    **values: Any,
) -> None:
    """Let a bundle serve; the one before serves on until the new one does."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("coterie").setLevel(logging.INFO)
    settings = read_settings(DeploySettings, values)
    if [bundle is not None, incumbent, removing].count(True) != 1:
        raise BadConfiguration("give one of --bundle, --incumbent and --remove")
    if removing:
        there = remove(settings)
        click.echo("removed" if there else "nothing was deployed")
    elif bundle is None:
        click.echo(json.dumps(deploy_incumbent(settings, url)))
    else:
        click.echo(json.dumps(deploy(bundle, profiles, settings, comparisons, url=url)))


if __name__ == "__main__":
    main()
