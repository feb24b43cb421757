"""Open a published folder as a Feast feature store, and look profiles up in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from coterie.config import PublishSettings
from coterie.contracts import write_text
from coterie.errors import BadConfiguration, BadData
from coterie.routing import Profile

if TYPE_CHECKING:
    from feast import FeatureStore

REDIS = "COTERIE_REDIS"
"""Environment variable with Feast's connection string of Redis: host:port[,password=...][,ssl=true]."""

_STORE_FILE, _REGISTRY_FILE, _ONLINE_FILE = "feature_store.yaml", "registry.db", "online.db"
# Without these a Redis that hangs would hold a lookup's thread for ever, and one that is gone for seconds.
_REDIS_OPTIONS = {"socket_timeout": "2", "socket_connect_timeout": "2", "retry": "null"}
# Mixtures that are published no more leave Redis after a year; a profile that old would be stale long since.
_KEPT_SECONDS = 365 * 24 * 3600
_VERSION_CHARACTERS = 8  # of a mixture's version, in the name of its project


def project_of(settings: PublishSettings, mixture_version: str) -> str:
    """The Feast project that profiles of a mixture are published in."""
    if settings.online_store == "sqlite":  # a file of each published folder's own
        return settings.project
    return f"{settings.project}_{mixture_version[:_VERSION_CHARACTERS]}"


def write_store_file(folder: Path, project: str, online_store: str) -> None:
    """Write feature_store.yaml, with which Feast's own tools read the folder too (`feast -c FOLDER ...`)."""
    online = (
        {"type": "redis", "connection_string": f"${{{REDIS}}}", "key_ttl_seconds": _KEPT_SECONDS}
        if online_store == "redis"
        else {"type": "sqlite", "path": _ONLINE_FILE}
    )
    settings = {
        "project": project,
        "provider": "local",
        "registry": _REGISTRY_FILE,
        "online_store": online,
        "offline_store": {"type": "file"},
        "entity_key_serialization_version": 3,
    }
    write_text(folder / _STORE_FILE, yaml.safe_dump(settings, sort_keys=False))


def connect(folder: Path, environ: Mapping[str, str] | None = None) -> FeatureStore:
    """A Feast store over `folder`, whether or not anything was published there yet.

    Paths are made of `folder` at every opening and never stored, so a published folder can be moved.

    Raises:
        BadConfiguration: the folder's profiles are in Redis and COTERIE_REDIS does not say where.
    """
    folder = folder.resolve()
    settings = yaml.safe_load((folder / _STORE_FILE).read_text(encoding="utf-8"))
    if settings["online_store"]["type"] == "redis":
        address = (os.environ if environ is None else environ).get(REDIS, "")
        if not address:
            raise BadConfiguration(
                f"{folder}: the profiles are in Redis, and {REDIS} does not say where. "
                f"Set it to host:port[,password=...], as in {REDIS}=redis:6379."
            )
        for option, value in _REDIS_OPTIONS.items():
            if f"{option}=" not in address:
                address += f",{option}={value}"
        settings["online_store"]["connection_string"] = address
    # Feast resolves the registry's path against the working directory, the others against repo_path.
    # A published registry does not change: it is read once, not every ten minutes by some request.
    settings["registry"] = {"path": str(folder / settings["registry"]), "cache_ttl_seconds": 0}

    from feast import FeatureStore, RepoConfig

    return FeatureStore(config=RepoConfig(**settings, repo_path=folder))


def open_store(folder: Path, environ: Mapping[str, str] | None = None) -> FeatureStore:
    """Open a folder that `publish` wrote.

    Raises:
        BadData: no such folder, or one that publish did not write or did not finish.
        BadConfiguration: as `connect`.
    """
    expected = [_STORE_FILE, _REGISTRY_FILE]
    missing = [name for name in expected if not (folder / name).is_file()]
    if not missing:
        kind = yaml.safe_load((folder / _STORE_FILE).read_text(encoding="utf-8"))["online_store"]["type"]
        # SQLite would make an empty database of a missing one, and everybody would be unknown.
        missing = [_ONLINE_FILE] if kind == "sqlite" and not (folder / _ONLINE_FILE).is_file() else []
    if missing:
        raise BadData(
            f"{folder}: no published worker profiles here ({', '.join(missing)} missing). "
            "Give the publish folder of a run, or run `coterie publish`."
        )
    return connect(folder, environ)


def lookup(store: FeatureStore, worker_ids: Sequence[str]) -> list[Profile | None]:
    """The online profile of each worker, None for one without. Raises whatever the store's backend raises."""
    if not worker_ids:
        return []
    values, stamps = _read(store, worker_ids)
    return [
        _profile(worker_id, {name: column[i] for name, column in values.items()}, stamps[i])
        for i, worker_id in enumerate(worker_ids)
    ]


def stored_at(store: FeatureStore, worker_ids: Sequence[str]) -> list[datetime | None]:
    """When each worker's online profile dates from, None for a worker without one."""
    values, stamps = _read(store, worker_ids, ["mixture_version"])
    return [
        stamp if version is not None else None for version, stamp in zip(values["mixture_version"], stamps, strict=True)
    ]


def _read(
    store: FeatureStore, worker_ids: Sequence[str], features: list[str] | None = None
) -> tuple[dict[str, list[Any]], list[datetime]]:
    from feature_repo.definitions import FEATURES, JOIN_KEY, worker_profile

    names = features or FEATURES
    response = store.get_online_features(
        features=[f"{worker_profile.name}:{name}" for name in names],
        entity_rows=[{JOIN_KEY: worker_id} for worker_id in worker_ids],
    )
    values = response.to_dict()
    # to_dict rounds the timestamps to seconds; the message has them whole.
    column = list(response.proto.metadata.feature_names.val).index(names[0])
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    stamps = [
        epoch + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
        for stamp in response.proto.results[column].event_timestamps
    ]
    return {name: values[name] for name in names}, stamps


def _profile(worker_id: str, values: dict[str, Any], stamp: datetime) -> Profile | None:
    # Every value of an unknown worker is None; one alone may be after a change of the definitions.
    if any(value is None for value in values.values()):
        return None
    return Profile(
        worker_id=worker_id,
        embedding=tuple(values["embedding"]),
        reliability=float(values["reliability"]),
        comparisons=int(values["comparisons"]),
        coterie=int(values["coterie"]),
        posterior=tuple(values["posterior"]),
        mixture_version=str(values["mixture_version"]),
        event_timestamp=stamp,
    )


def push(store: FeatureStore, profiles: Sequence[Profile]) -> None:
    """Put single profiles online, with the times that they carry. Raises whatever the store's backend raises.

    Redis silently drops a profile whose time is not later than that of the one it holds.
    """
    import pandas as pd

    from feature_repo.definitions import worker_profile

    rows = [
        asdict(profile) | {"embedding": list(profile.embedding), "posterior": list(profile.posterior)}
        for profile in profiles
    ]
    frame = pd.DataFrame(rows).astype({"coterie": "int32", "comparisons": "int32", "reliability": "float32"})
    store.write_to_online_store(worker_profile.name, df=frame)


def remove(store: FeatureStore, worker_id: str) -> bool:
    """Take a worker's profile out of the online store; return whether there was one.

    Feast has no call for it: this deletes what its own stores would write for the worker's key.
    """
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from feature_repo.definitions import JOIN_KEY, worker_profile

    config, online = store.config, store._get_provider().online_store
    key = EntityKey(join_keys=[JOIN_KEY], entity_values=[Value(string_val=worker_id)])
    version = config.entity_key_serialization_version
    if config.online_store.type == "redis":
        from feast.infra.online_stores.helpers import _redis_key

        name = _redis_key(store.project, key, entity_key_serialization_version=version)
        return bool(online._get_client(config.online_store).delete(name))
    from feast.infra.online_stores.sqlite import _table_id

    table, connection = _table_id(store.project, store.get_feature_view(worker_profile.name)), online._get_conn(config)
    raw = serialize_entity_key(key, entity_key_serialization_version=version)
    with connection:
        return bool(connection.execute(f'DELETE FROM "{table}" WHERE entity_key = ?', (raw,)).rowcount)
