"""Remove a person: from the feedback database, the online store, the tables of runs and the cache of stages.

What was learned from many people, a mixture, a reward, a bundle, stays until it is made again; what still names the person
is told.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa

from coterie import contracts
from coterie.backbones import cache_folder
from coterie.contracts import COMPARISON, DIFFERENCE, EMBEDDING, QUARANTINE, Table
from coterie.errors import BadData
from coterie.feedback.database import Database
from coterie.feedback.tables import FEEDBACK, FOLDED, OUTBOX, STAMP

_TABLES = {table.name: table for table in vars(contracts).values() if isinstance(table, Table)}
_TEXTS = {".json", ".jsonl", ".html", ".md", ".log", ".txt", ".yaml"}
_EMBEDDINGS = "embeddings.parquet"

Keep = Callable[[pa.Table], pa.Table]


def forget(
    worker: str, database: str | None, runs: Sequence[Path], take_offline: Callable[[Path, str], bool]
) -> dict[str, Any]:
    """Remove a worker, by the id that tables hold.

    Args:
        database: URL of the feedback database.
        runs: folders of runs, or of single stages.
        take_offline: takes a worker's profile out of the online store of a published folder; tells whether there was one.

    Returns:
        feedback: rows that were removed, by table; online: published folders whose store held the profile; files: rows
        that were removed, by file; cached: stages that were removed from the cache; named_in: files that name the worker
        still, and that only a new run can make again.

    Raises:
        BadData: a folder that is not there. BackendUnavailable: a store that does not answer; do it again when it does.
    """
    if missing := [str(run) for run in runs if not run.is_dir()]:
        raise BadData(f"{', '.join(missing)}: no such folder. Nothing was removed.")
    published = sorted(file.parent for run in runs for file in run.rglob("feature_store.yaml"))

    def offline() -> list[str]:
        return [str(folder) for folder in published if take_offline(folder, worker)]

    removed, online = _from_database(database, worker, offline) if database else ({}, offline())
    files: dict[str, int] = {}
    for run in runs:
        files |= _from_folder(run, worker)
    texts = (file for run in runs for file in sorted(run.rglob("*")) if file.suffix in _TEXTS and file.is_file())
    named = [str(file) for file in texts if worker.encode() in file.read_bytes()]
    return {"feedback": removed, "online": online, "files": files, "cached": _from_cache(worker), "named_in": named}


def _from_database(url: str, worker: str, offline: Callable[[], list[str]]) -> tuple[dict[str, int], list[str]]:
    """Remove the rows, and meanwhile the online profile: no router makes another in between."""
    database = Database(url)
    try:
        with database.writing() as connection:
            database.lock(connection, [worker], "profiles")
            theirs = sa.select(FEEDBACK.c.comparison_id).where(FEEDBACK.c.worker_id == worker)
            statements = {
                "folded": FOLDED.delete().where(FOLDED.c.comparison_id.in_(theirs)),
                "outbox": OUTBOX.delete().where(OUTBOX.c.worker_id == worker),
                "stamp": STAMP.delete().where(STAMP.c.worker_id == worker),
                "feedback": FEEDBACK.delete().where(FEEDBACK.c.worker_id == worker),
            }
            removed = {name: int(connection.execute(statement).rowcount) for name, statement in statements.items()}
            online = offline()
        database.compact()
    finally:
        database.close()
    return removed, online


def _from_folder(folder: Path, worker: str) -> dict[str, int]:
    """Rewrite the tables below `folder` that hold the worker, each whole or not at all; rows removed by file."""
    found = {path: kind for path in sorted(folder.rglob("*.parquet")) if (kind := _kind(path)) is not None}
    places = {path.parent: _place(path, worker) for path, kind in found.items() if path.name == _EMBEDDINGS}
    removed: dict[str, int] = {}
    for path, kind in found.items():
        if _has(kind, "worker_id"):
            keep: Keep = lambda table: table.filter(pc.not_equal(table["worker_id"], worker))  # noqa: E731
        elif kind is QUARANTINE:
            keep = lambda table: table.filter(pc.invert(pc.match_substring(table["row"], worker)))  # noqa: E731
        elif kind is DIFFERENCE and (place := places.get(path.parent)) is not None:
            keep = _without(place)
        else:
            continue
        if number := _rewrite(path, kind, keep):
            removed[str(path)] = number
    named = _responses(found) if removed else None
    if named is not None:
        keep = lambda table: table.filter(pc.is_in(table["response_id"], named))  # noqa: E731
        for path in (path for path, kind in found.items() if _has(kind, "response_id")):
            if number := _rewrite(path, found[path], keep):
                removed[str(path)] = number
    return removed


def _kind(path: Path) -> Table | None:
    return _TABLES.get((pq.read_schema(path).metadata or {}).get(b"coterie.table", b"").decode())


def _has(kind: Table, column: str) -> bool:
    return any(field.name == column for field in kind.fields)


def _place(path: Path, worker: str) -> int | None:
    """The number of the worker, of their row among the embeddings."""
    index = pc.index(EMBEDDING.read(path, ["worker_id"])["worker_id"], worker).as_py()
    return None if index < 0 else int(index)


def _without(place: int) -> Keep:
    """Drop a worker's differences, and close the gap in the numbers."""

    def keep(table: pa.Table) -> pa.Table:
        table = table.filter(pc.not_equal(table["worker"], place))
        number = table["worker"].to_numpy()
        at = table.schema.get_field_index("worker")
        return table.set_column(
            at, table.schema.field(at), pa.array(np.where(number > place, number - 1, number), pa.int32())
        )

    return keep


def _responses(found: dict[Path, Table]) -> pa.Array | None:
    """The responses that comparisons still name; None where there are no comparisons to tell."""
    tables = [COMPARISON.read(path, ["chosen_id", "rejected_id"]) for path, kind in found.items() if kind is COMPARISON]
    columns = [column.combine_chunks() for table in tables for column in table.columns]
    return pc.unique(pa.concat_arrays(columns)) if columns else None


def _rewrite(path: Path, kind: Table, keep: Keep) -> int:
    """Filter a table, row group by row group; return how many rows it lost. An untouched file is left alone."""
    file = kind.open(path)
    schema, before = file.schema_arrow, file.metadata.num_rows
    sizes = {field.name: field.type.list_size for field in schema if pa.types.is_fixed_size_list(field.type)}
    metadata = kind.metadata(path)
    if kind is DIFFERENCE:
        metadata |= {"workers": str(int(metadata["workers"]) - 1)}
    elif all(len(keep(group)) == len(group) for group in _groups(file)):
        return 0
    after = 0
    with kind.writer(path, metadata, **sizes) as writer:
        for group in _groups(file):
            kept = keep(group)
            after += len(kept)
            if len(kept):
                writer.write_table(kept.select(writer.schema.names).cast(writer.schema))
    return int(before - after)


def _groups(file: pq.ParquetFile) -> Any:
    return (file.read_row_group(group) for group in range(file.num_row_groups))


def _from_cache(worker: str) -> list[str]:
    """Remove finished stages that other runs could take over, where they hold the worker."""
    root = Path(os.environ.get("COTERIE_STAGE_CACHE") or cache_folder() / "stages")
    removed = []
    for folder in sorted({file.parent for file in root.rglob("stage.json")}):
        tables = [(path, kind) for path in folder.rglob("*.parquet") if (kind := _kind(path)) is not None]
        if any(_holds(path, kind, worker) for path, kind in tables):
            shutil.rmtree(folder)
            removed.append(str(folder))
    return removed


def _holds(path: Path, kind: Table, worker: str) -> bool:
    """Whether a table names a worker; differences have numbers alone, and lie beside the embeddings that say whose."""
    file = kind.open(path)
    if _has(kind, "worker_id"):
        return any(pc.index(group["worker_id"], worker).as_py() >= 0 for group in _groups(file))
    if kind is QUARANTINE:
        return any(pc.any(pc.match_substring(group["row"], worker)).as_py() for group in _groups(file))
    return False
