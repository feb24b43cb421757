"""Publish worker profiles: the offline Parquet file, Feast's registry, the online store that the router asks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from coterie import contracts
from coterie.config import PublishSettings
from coterie.errors import BackendUnavailable, BadData, CoterieError, RunFailed
from feature_repo.store import connect, lookup, project_of, stored_at, write_store_file

if TYPE_CHECKING:
    from feast import FeatureStore

ASSIGNMENTS_FILE = "assignments.parquet"
_BATCH = 5_000  # rows a write to the online store
_CHECKED = 20  # profiles read back after publication


def publish(clustered: Path, out: Path, settings: PublishSettings) -> dict[str, Any]:
    """Publish the assignments of a cluster stage as the worker profiles that the router reads.

    Args:
        clustered: folder with assignments.parquet (contracts.ASSIGNMENT).
        out: folder for profiles.parquet (contracts.PROFILE), Feast's registry and, with SQLite, the online store.
            It may be moved afterwards.
        settings: the Feast project and which online store; Redis is found through COTERIE_REDIS. There a mixture has a
            project of its own, so that the profiles of the one that serves stay online until the next one does.

    Returns:
        profiles, coteries, mixture_version, online_store.

    Raises:
        BadData: no assignments, none in them, a worker twice, or several mixtures in one file.
        BadConfiguration: Redis without an address.
        BackendUnavailable: the online store does not answer.
        RunFailed: what was read back is not what was written.
    """
    source = clustered / ASSIGNMENTS_FILE
    assignments = contracts.ASSIGNMENT.read(source)
    version = _mixture_version(assignments, source)
    out.mkdir(parents=True, exist_ok=True)
    write_store_file(out, project_of(settings, version), settings.online_store)
    store = connect(out)
    try:
        from feature_repo.definitions import profiles, worker, worker_profile

        store.apply([worker, profiles, worker_profile])
        table = _stamp(store, assignments)
        _write_offline(out, table, contracts.ASSIGNMENT.metadata(source))
        _write_online(store, table)
        _check(store, table)
    except (CoterieError, OSError):
        raise
    except Exception as error:  # Feast hands on whatever its backend raises
        raise BackendUnavailable(
            f"the online store ({settings.online_store}) did not take the profiles: {type(error).__name__}: "
            f"{error}. Some may be there already; repair the store and publish again."
        ) from error
    return {
        "profiles": table.num_rows,
        "coteries": int(assignments.schema.field("posterior").type.list_size),
        "mixture_version": version,
        "online_store": settings.online_store,
    }


def _mixture_version(assignments: pa.Table, source: Path) -> str:
    versions = pc.unique(assignments["mixture_version"]).to_pylist()
    if not versions:
        raise BadData(f"{source}: no worker in it. See the data report of ingest, then cluster again.")
    if len(versions) > 1:
        raise BadData(f"{source}: {len(versions)} mixture versions in one file. Run the cluster stage again.")
    if len(pc.unique(assignments["worker_id"])) != assignments.num_rows:
        raise BadData(f"{source}: a worker is there more than once. Run the cluster stage again.")
    return str(versions[0])


def _stamp(store: FeatureStore, assignments: pa.Table) -> pa.Table:
    """Add event timestamps: now, or just after what is stored: Redis silently drops a row that is not newer."""
    now = datetime.now(UTC)
    workers = assignments["worker_id"].to_pylist()
    stamps: list[datetime] = []
    for batch in contracts.batched(workers, _BATCH):
        stamps += [
            now if stored is None else max(now, stored + timedelta(microseconds=1))
            for stored in stored_at(store, batch)
        ]
    field = next(field for field in contracts.PROFILE.fields if field.name == "event_timestamp")
    return assignments.append_column(field, pa.array(stamps, type=field.type))


def _write_offline(out: Path, table: pa.Table, metadata: dict[str, str]) -> None:
    from feature_repo.definitions import PROFILES_FILE

    sizes = {name: table.schema.field(name).type.list_size for name in ("embedding", "posterior")}
    with contracts.PROFILE.writer(out / PROFILES_FILE, metadata, **sizes) as writer:
        writer.write_table(table.select(writer.schema.names).cast(writer.schema))


def _write_online(store: FeatureStore, table: pa.Table) -> None:
    from feature_repo.definitions import worker_profile

    with tqdm(total=table.num_rows, desc="publish", unit="profile", disable=None) as progress:
        for batch in table.to_batches(max_chunksize=_BATCH):
            store.write_to_online_store(worker_profile.name, df=batch.to_pandas())
            progress.update(batch.num_rows)


def _check(store: FeatureStore, table: pa.Table) -> None:
    """Read some profiles back, spread over the table."""
    rows = np.unique(np.linspace(0, table.num_rows - 1, _CHECKED).astype(int))
    written = table.take(rows).to_pylist()
    for row, profile in zip(written, lookup(store, [row["worker_id"] for row in written]), strict=True):
        same = (
            profile is not None
            and profile.coterie == row["coterie"]
            and profile.mixture_version == row["mixture_version"]
            and np.allclose(profile.posterior, row["posterior"], atol=1e-6)
            and np.allclose(profile.embedding, row["embedding"], atol=1e-6)
        )
        if not same:
            raise RunFailed(
                f"worker {row['worker_id']}: the online store gives back another profile than was just written. "
                "Another publication may have run at the same time; publish again."
            )
