"""Fold feedback into a run: posteriors always; coteries and rewards where what people want has changed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from coterie.bundle import Bundle
from coterie.contracts import ASSIGNMENT, COMPARISON, DIFFERENCE, MIXTURE_FILE, TRAIN, batched
from coterie.discovery.differences import differences
from coterie.discovery.votes import VoteFile, Votes, joined, load_votes
from coterie.feedback.database import Database
from coterie.feedback.evidence import Place, Prior
from coterie.feedback.posteriors import Mixed
from coterie.feedback.tables import FEEDBACK, FOLDED, FOLDING
from coterie.placing import Placing

_ASSIGNMENTS, _COMPARISONS = "assignments.parquet", "comparisons.parquet"
_AT_ONCE = 1000  # ids a statement


class _Person(NamedTuple):
    """Somebody with new feedback: their row among the run's assignments, and how many comparisons."""

    worker: str
    row: int | None
    comparisons: int


def fold_posteriors(run: Path, ingested: Path, encoded: Path, out: Path, database: Database) -> dict[str, Any]:
    """The assignments of a run moved by feedback, as the serving router moves the profiles, into the folder `out`.

    The mixture stays, and `out` is published in place of the run's clustering. What the run was trained on is not counted
    again; the database is told what these assignments are made of (`FOLDING`), so that the router does not either.

    Args:
        run: folder of the run, with its bundle.
        ingested, encoded: of the feedback.
        out: for assignments.parquet and mixture.safetensors.
        database: that was ingested.

    Returns:
        comparisons that were folded in, known_workers and new_workers who made them, mixture_version.
    """
    bundle = Bundle.load(run / "bundle")
    old = ASSIGNMENT.read(run / "cluster" / _ASSIGNMENTS)
    used, path = _training_ids(run / "ingest"), out / "differences.parquet"
    workers = differences(ingested / _COMPARISONS, encoded / "vectors.parquet", bundle.features, path)
    ids = DIFFERENCE.read(path, ["comparison_id"])["comparison_id"].to_pylist()
    votes = joined([load_votes(path, split) for split in VoteFile.splits(path)], len(workers))
    path.unlink()
    votes = votes.subset(np.array([name not in used for name in ids]))
    voting, worker, counts = np.unique(votes.worker, return_inverse=True, return_counts=True)
    known = {name: row for row, name in enumerate(old["worker_id"].to_pylist())}
    people = [_Person(workers[i], known.get(workers[i]), int(n)) for i, n in zip(voting, counts, strict=True)]
    places: list[Place] = []
    if people:
        of_people = Votes.of(votes.x, votes.y, worker, votes.prompt, weight=votes.weight)
        places = Mixed(Placing.of(bundle)).places(of_people, [_prior(old, person.row) for person in people])
    name = _note(database, sorted(used.union(ids)), bundle.manifest.mixture_version)
    _write(out, run, old, list(zip(people, places, strict=True)), name)
    return {
        "comparisons": len(votes),
        "known_workers": sum(person.row is not None for person in people),
        "new_workers": sum(person.row is None for person in people),
        "mixture_version": bundle.manifest.mixture_version,
    }


def newer(run: Path, ingested: Path, out: Path) -> int:
    """Write the comparisons of `ingested` that a run does not know, of workers whom it knows; return how many there are."""
    known = COMPARISON.read(run / "ingest" / _COMPARISONS, ["comparison_id", "worker_id"])
    table = COMPARISON.read(ingested / _COMPARISONS)
    new = pc.invert(pc.is_in(table["comparison_id"], known["comparison_id"].combine_chunks()))
    table = table.filter(pc.and_(new, pc.is_in(table["worker_id"], known["worker_id"].combine_chunks())))
    with COMPARISON.writer(out / _COMPARISONS, COMPARISON.metadata(ingested / _COMPARISONS)) as writer:
        writer.write_table(table)
    return len(table)


def note_trained(run: Path, out: Path, database: Database) -> dict[str, Any]:
    """As `fold_posteriors`, of a run that was made with the feedback: its own assignments."""
    table = ASSIGNMENT.read(run / "cluster" / _ASSIGNMENTS)
    version = str(table["mixture_version"][0])
    _write(out, run, table, [], _note(database, sorted(_training_ids(run / "ingest")), version))
    return {"comparisons": 0, "known_workers": 0, "new_workers": 0, "mixture_version": version}


def _training_ids(ingested: Path) -> set[str]:
    table = COMPARISON.read(ingested / _COMPARISONS, ["comparison_id", "split"])
    return set(table.filter(pc.equal(table["split"].cast(pa.string()), TRAIN))["comparison_id"].to_pylist())


def _prior(table: pa.Table, row: int | None) -> Prior | None:
    if row is None:
        return None
    [values] = table.slice(row, 1).to_pylist()
    return Prior(**{name: values[name] for name in Prior.model_fields})


def _note(database: Database, ids: list[str], version: str) -> str:
    """Keep which of these ids are feedback that profiles are made of; return the name under which."""
    digest = hashlib.blake2b("\n".join([version, *ids]).encode(), digest_size=16).hexdigest()
    with database.writing() as connection:
        connection.execute(FOLDED.delete().where(FOLDED.c.folding == digest))
        for some in batched(ids, _AT_ONCE):
            there = sa.select(sa.literal(digest), FEEDBACK.c.comparison_id).where(FEEDBACK.c.comparison_id.in_(some))
            connection.execute(FOLDED.insert().from_select(["folding", "comparison_id"], there))
    return digest


def _write(out: Path, run: Path, old: pa.Table, moved: list[tuple[_Person, Place]], name: str) -> None:
    """assignments.parquet: `old`, with the new places of who has moved or come."""
    rows = old.to_pylist()
    version = rows[0]["mixture_version"]
    for person, place in moved:
        if person.row is None:
            rows.append({"worker_id": person.worker, "comparisons": 0, "mixture_version": version})
        row = rows[-1 if person.row is None else person.row]
        row |= place.model_dump() | {"coterie": int(np.argmax(place.posterior))}
        row["comparisons"] += person.comparisons
    columns = {field.name: [row[field.name] for row in rows] for field in ASSIGNMENT.fields}
    sizes = {field: old.schema.field(field).type.list_size for field in ("embedding", "posterior")}
    ASSIGNMENT.write(out / _ASSIGNMENTS, columns, {"mixture_version": version, FOLDING: name}, **sizes)
    shutil.copyfile(run / "cluster" / MIXTURE_FILE, out / MIXTURE_FILE)
