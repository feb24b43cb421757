"""What a pod serves, from where it is kept into the pod: a bundle, or profiles. Init containers run it.

    python -m serving.fetch bundle       COTERIE_BUNDLE, of version COTERIE_MODEL_VERSION, into /mnt/models
    python -m serving.fetch profiles     COTERIE_PROFILES, by commas, each into /mnt/profiles/<mixture_version>

An address is s3://bucket/key (AWS_ENDPOINT_URL says of which store; Kubeflow's minio:// means the same), pvc://claim/path, or
a folder. Failed requests are repeated with growing pauses by the S3 client itself.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import click
import fsspec

from coterie.contracts import PROFILE, Manifest
from coterie.errors import BadBundle, BadConfiguration, BadData, RunFailed
from coterie.ingest.sources import remote
from coterie.manifest import MANIFEST_FILE, check_sums, read_manifest
from coterie.options import Group, PathOption

log = logging.getLogger("coterie.serving")

BUNDLE, MODEL_VERSION, PROFILES = "COTERIE_BUNDLE", "COTERIE_MODEL_VERSION", "COTERIE_PROFILES"
CLAIMS = Path("/mnt/claims")
"""Where a pod's volume claims with profiles lie, each under its name."""

_PROFILES_FILE = "profiles.parquet"
_ARRIVING = ".arriving"  # below the target: a mounted volume cannot be replaced by its sibling


class Claim(NamedTuple):
    """A folder on a volume claim: pvc://name/path."""

    name: str
    path: str


def claim_of(uri: str) -> Claim | None:
    """The claim that an address means, None for another address. Raises BadConfiguration: pvc:// without a claim."""
    if not uri.startswith("pvc://"):
        return None
    name, _, path = uri.removeprefix("pvc://").partition("/")
    if not name or ".." in path.split("/"):
        raise BadConfiguration(f"{uri}: not an address of a volume claim. Write it as pvc://claim/path.")
    return Claim(name, path.strip("/"))


def fetch_bundle(uri: str, to: Path, version: str = "") -> Manifest:
    """Bring a bundle into the folder `to`, where it appears whole or not at all; on a claim it is there already.

    Args:
        uri: its address.
        to: folder, which may be the mount of a volume.
        version: model_version that it must have; empty: any.

    Returns:
        Its manifest, after every sum was checked.

    Raises:
        BadBundle: it is no bundle, incomplete or damaged, or of another version. BadData: nothing is there.
        BackendUnavailable: the store does not answer. RunFailed: no room for it.
    """
    if claim_of(uri) is not None:
        return _checked(to, uri, version)
    arriving = to / _ARRIVING
    try:
        _download(uri, arriving)
        manifest = _checked(arriving, uri, version)
        for old in to.iterdir():
            if old != arriving:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        # Without its manifest a folder is no bundle.
        for part in sorted(arriving.iterdir(), key=lambda part: part.name == MANIFEST_FILE):
            part.rename(to / part.name)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
    return manifest


def fetch_profiles(uris: Sequence[str], to: Path) -> list[str]:
    """Bring published folders into `to`, each under its mixture's version, where it appears whole or not at all.

    The first is what the newest bundle needs. The others are of bundles that served before: one of the same mixture as an
    earlier one is old, and one that is gone is missed by nobody but those.

    Returns:
        Their mixture versions.

    Raises:
        BadData: the first is not there, or is no published folder. BackendUnavailable: the store does not answer.
    """
    arriving = to / _ARRIVING
    found: list[str] = []
    for uri in uris:
        try:
            claim = claim_of(uri)
            _download(uri if claim is None else str(CLAIMS / claim.name / claim.path), arriving)
            version = _mixture(arriving, uri)
            if version not in found:
                shutil.rmtree(to / version, ignore_errors=True)
                arriving.rename(to / version)
                found.append(version)
        except BadData as error:
            if not found:
                raise
            log.warning("left out, and not needed once all routers are new: %s", error)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
    return found


def fetch_files(uri: str, names: Iterable[str], to: Path) -> None:
    """Bring single files of the folder at an address into the folder `to`. Raises as fetch_bundle."""
    to.mkdir(parents=True, exist_ok=True)
    with remote(uri):
        system, root = _system(uri)
        for name in names:
            system.get_file(f"{root}/{name}", str(to / name))


def _download(uri: str, to: Path) -> None:
    """Copy the folder at an address to the new folder `to`."""
    shutil.rmtree(to, ignore_errors=True)
    with remote(uri):
        system, root = _system(uri)
        names = [name.removeprefix(root).lstrip("/") for name in sorted(system.find(root))]
        names = [name for name in names if name]
        if not names:
            raise FileNotFoundError("a folder with files is expected")
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            system.get([f"{root}/{name}" for name in names], [str(to / name) for name in names])
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RunFailed(f"{to.parent}: no room for {uri}. Give this volume more room.") from error


def _system(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that an address means, and the folder there."""
    scheme, place = urlsplit(uri).scheme, uri
    if scheme == "minio":
        scheme, place = "s3", f"s3{uri.removeprefix('minio')}"
    # A listing that is remembered would hide what was written since.
    system, root = fsspec.core.url_to_fs(place, **({"use_listings_cache": False} if scheme == "s3" else {}))
    return system, root.rstrip("/")


def _checked(folder: Path, uri: str, version: str) -> Manifest:
    try:
        manifest = read_manifest(folder)
        check_sums(folder, manifest)
    except BadBundle as error:
        raise BadBundle(f"{uri}: {error}") from error
    if version and manifest.model_version != version:
        raise BadBundle(
            f"{uri}: holds the bundle {manifest.model_version}, not {version}, which was deployed from there. An address keeps "
            "its bundle: put a new one elsewhere, and deploy that."
        )
    return manifest


def _mixture(folder: Path, uri: str) -> str:
    """The mixture of a published folder, which its name here will be."""
    try:
        versions = PROFILE.read(folder / _PROFILES_FILE, ["mixture_version"])["mixture_version"]
    except BadData as error:
        raise BadData(f"{uri}: not a published folder: {error}") from error
    version = str(versions[0]) if len(versions) else ""
    if not version or Path(version).name != version or version.startswith("."):
        raise BadData(f"{uri}: its profiles are of mixture {version!r}, which is no version. Publish them again.")
    return version


@click.group(cls=Group)
def main() -> None:
    """Bring what a pod serves into the pod."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


@main.command()
@click.option("--uri", envvar=BUNDLE, show_envvar=True, required=True)
@click.option("--version", envvar=MODEL_VERSION, show_envvar=True, default="", help="that it must have; empty: any")
@click.option("--to", type=PathOption, default=Path("/mnt/models"), show_default=True)
def bundle(uri: str, version: str, to: Path) -> None:
    """A bundle; every sum is checked."""
    manifest = fetch_bundle(uri, to, version)
    click.echo(f"{uri}: bundle {manifest.model_version}, {len(manifest.files)} files, every sum is right")


@main.command()
@click.option("--uris", envvar=PROFILES, show_envvar=True, required=True, help="by commas, newest first")
@click.option("--to", type=PathOption, default=Path("/mnt/profiles"), show_default=True)
def profiles(uris: str, to: Path) -> None:
    """Published profiles, a folder a mixture."""
    found = fetch_profiles([uri for uri in uris.split(",") if uri], to)
    click.echo(f"profiles of {', '.join(found)}")


if __name__ == "__main__":
    main()
