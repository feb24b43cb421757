"""manifest.json of a bundle and the sums in it, for whoever fetches a bundle or deploys it and needs nothing that scores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from coterie.contracts import Manifest
from coterie.errors import BadBundle

MANIFEST_FILE, GOLDEN_FILE = "manifest.json", "golden.json"
RECORDS = {"stage.json", "metrics.json"}  # a stage's own, beside what it made


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle in folder `path`. Raises BadBundle: not a bundle, or of a schema that is not known."""
    file = path / MANIFEST_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadBundle(
            f"{path}: no {MANIFEST_FILE}, so no bundle. Give the folder that `coterie bundle` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise BadBundle(f"{file}: not readable ({error}). Fetch or make the bundle again.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    known = Manifest.model_fields["schema_version"].default
    if version != known:
        newer = isinstance(version, int) and version > known
        remedy = "Upgrade coterie." if newer else "Make the bundle again with this version of coterie."
        raise BadBundle(f"{file}: manifest schema version {version}, this program reads {known}. {remedy}")
    try:
        return Manifest(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadBundle(f"{file}: {place}: {first['msg']}. Fetch or make the bundle again.") from error


def check_sums(path: Path, manifest: Manifest) -> None:
    """Check the sum of every file of a bundle. Raises BadBundle: one is missing, changed, or not in the manifest."""
    found = set(files_of(path))
    for name in manifest.files:
        if name not in found:
            raise BadBundle(f"{path}: {name} is missing. Fetch or make the bundle again.")
        check_sum(path, name, manifest)
    if foreign := sorted(found - manifest.files.keys()):
        raise BadBundle(f"{path}: {', '.join(foreign)} is not in the manifest. Remove it, or fetch the bundle again.")


def check_sum(path: Path, name: str, manifest: Manifest) -> None:
    """Check the sum of one file that is there. Raises BadBundle: it is not the manifest's."""
    if sha256(path / name) != manifest.files.get(name):
        raise BadBundle(f"{path}: {name} is not the file that the manifest names (SHA-256). Fetch the bundle again.")


def files_of(path: Path) -> list[str]:
    """A bundle's files; not the stage's own records, nor hidden ones, which a hub or a volume adds and nothing reads."""
    own = {MANIFEST_FILE, *RECORDS}
    names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    visible = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return sorted(name for name in visible if name not in own)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
