"""The ingest stage: sources in, comparisons.parquet, quarantine.parquet and the data report out."""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from coterie.config import IngestSettings
from coterie.contracts import COMPARISON, QUARANTINE, SPLITS, replacing, write_text
from coterie.errors import BadConfiguration, BadData, RunFailed
from coterie.ingest import pseudonyms, splits
from coterie.ingest.data_report import DataReport
from coterie.ingest.formats import reader_for
from coterie.ingest.readers import Naming
from coterie.ingest.simulated import SCHEME, open_simulated
from coterie.ingest.sources import Source, open_sources
from coterie.ingest.spool import BATCH_ROWS, Quarantine, Spool, kept_of, spooling
from coterie.ingest.validation import Refused, Vote, check_worker
from coterie.progress import progress

COMPARISONS_FILE, QUARANTINE_FILE, METRICS_FILE, TRUTH_FILE = (
    "comparisons.parquet",
    "quarantine.parquet",
    "metrics.json",
    "truth.json",
)
KEY_METADATA = "key_fingerprint"  # of comparisons.parquet; empty: the worker ids are as they came
_CHUNK = 256


def ingest(
    settings: IngestSettings, out: Path, key: bytes | None = None, quarantine: Path | None = None
) -> dict[str, Any]:
    """Read the sources into `out`/comparisons.parquet, quarantine.parquet, metrics.json (and truth.json if
    simulated).

    Two passes in bounded memory: about 100 bytes a row, and one batch of texts. The same sources, settings
    and key make the same files.

    Args:
        settings: what to read and how.
        out: an existing folder.
        key: of the pseudonyms; without one it is read from the environment. Not used with pseudonyms "none".
        quarantine: where to leave the refused rows if the run fails because of them.

    Returns:
        The data report, as in metrics.json.

    Raises:
        BadData: a source that cannot be read, no usable row, or more refused rows than settings.max_refused.
        BadConfiguration: no key, or a column mapping or simulation that cannot be.
        BackendUnavailable: an object store or hub that does not answer.
        RunFailed: the result cannot be written.
    """
    key = None if settings.pseudonyms == "none" else key or pseudonyms.load_key()
    with _writing(out), _without_collector(), spooling(out / ".spool.arrow", settings.seed) as spool:
        refused, sources = _read(settings, out, key, spool)
        total, dropped = sum(source["rows"] for source in sources), refused.total
        if dropped > settings.max_refused * total or not len(spool.votes):
            raise _refusal(settings, out, quarantine, refused, total)
        metrics = _write(settings, out, key, spool)
        metrics = {
            "schema_version": 1,
            "sources": sources,
            "rows": total,
            "refused": dropped,
            "refused_by_reason": dict(sorted(refused.reasons.items(), key=lambda item: (-item[1], item[0]))),
            **metrics,
            "pseudonyms": settings.pseudonyms,
            "key_fingerprint": pseudonyms.fingerprint(key) if key else None,
            "seed": settings.seed,
        }
        write_text(out / METRICS_FILE, orjson.dumps(metrics, option=orjson.OPT_INDENT_2).decode() + "\n")
    return metrics


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say in words why the result cannot be written; what goes wrong in reading has errors of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailed(
                f"{out}: no space left to write the comparisons ({error}). Free some, or give another --out; "
                "for a time the run needs several times the size of the result."
            ) from error
        raise RunFailed(f"{out}: the result cannot be written: {error}. Check the folder and its rights.") from error


@contextmanager
def _without_collector() -> Iterator[None]:
    """No search for cycles meanwhile: rows have none, and looking through them took half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ------------------------------------------------------------------------------------------------- first pass
def _read(
    settings: IngestSettings, out: Path, key: bytes | None, spool: Spool
) -> tuple[Quarantine, list[dict[str, Any]]]:
    """Read every source into the spool and the quarantine table."""
    sources: list[dict[str, Any]] = []
    with (
        QUARANTINE.writer(out / QUARANTINE_FILE) as writer,
        progress(desc="ingest", unit="rows") as bar,
    ):
        refused = Quarantine(writer)
        for source in _sources(settings, out, key):
            name_worker = _naming(key, source)
            form, reader = reader_for(source, settings.format, settings.columns, name_worker)
            before, earlier = refused.total, sum(other["rows"] for other in sources)
            votes: list[Vote] = []
            for item in reader.read(source.rows):
                if isinstance(item, Vote):
                    votes.append(item)
                    if len(votes) == _CHUNK:
                        spool.extend(votes, source.name)
                        votes = []
                        bar.update(earlier + source.count - bar.n)
                else:
                    worker = _name_or_none(item.record, reader.worker_column, name_worker)
                    row = kept_of(item.record, reader.columns, reader.worker_column, worker)
                    refused.add(item, source.name, row)
            spool.extend(votes, source.name)
            sources.append(
                {
                    "source": source.name,
                    "format": form,
                    "rows": source.count,
                    "refused": refused.total - before,
                }
            )
        refused.flush()
    spool.close()
    return refused, sources


def _sources(settings: IngestSettings, out: Path, key: bytes | None) -> Iterator[Source]:
    simulated = [name for name in settings.source if name.startswith(SCHEME)]
    if not simulated:
        yield from open_sources(settings.source)
        return
    if len(settings.source) > 1:
        raise BadConfiguration(
            f"{simulated[0]}: a simulated source stands alone, because its truth does. Remove the others."
        )
    source, truth = open_simulated(simulated[0])
    workers = {pseudonyms.pseudonym(key, worker): known for worker, known in truth["workers"].items()}
    write_text(
        out / TRUTH_FILE,
        orjson.dumps(truth | {"workers": workers}, option=orjson.OPT_SERIALIZE_NUMPY).decode(),
    )
    yield source


def _naming(key: bytes | None, source: Source) -> Naming:
    """From a raw worker id to the name in the result; what ingest made with this key stays as it is."""
    made_with = source.metadata.get(KEY_METADATA)
    ours = pseudonyms.fingerprint(key) if key else "none"
    if made_with and made_with != ours:
        raise BadData(
            f"{source.name}: its worker ids are pseudonyms of another key (fingerprint {made_with}, this run's "
            f"is {ours}). Use the key it was made with, or ingest the original file again."
        )
    own = None if made_with else key

    @lru_cache(maxsize=1 << 17)
    def name(worker: str) -> str:
        return pseudonyms.pseudonym(own, check_worker(worker))

    return lambda value: name(value if type(value) is str else check_worker(value))


def _name_or_none(record: object, column: str, name_worker: Naming) -> str | None:
    try:
        return name_worker(record.get(column)) if isinstance(record, dict) else None
    except Refused:
        return None


def _refusal(settings: IngestSettings, out: Path, place: Path | None, refused: Quarantine, total: int) -> BadData:
    """The error for a run with too many refused rows, or nothing else; leaves the refused rows at `place`."""
    dropped = refused.total
    worst = sorted(refused.reasons.items(), key=lambda item: -item[1])[:3]
    reasons = "; ".join(f"{reason}: {number:,} (first: {refused.places[reason]})" for reason, number in worst)
    where = ""
    if place:
        with replacing(place) as temporary:
            shutil.copyfile(out / QUARANTINE_FILE, temporary)
        where = f" Every refused row with its reason: {place}."
    share = dropped / total if total else 1.0
    remedy = "Correct the rows" + (f", or allow them with --max-refused {share + 0.005:.2f}." if share < 0.99 else ".")
    return BadData(
        f"{', '.join(settings.source)}: {dropped:,} of {total:,} rows refused ({share:.1%}, at most "
        f"{settings.max_refused:.1%} are allowed). {reasons}.{where} {remedy}"
    )


# ------------------------------------------------------------------------------------------------ second pass
def _write(settings: IngestSettings, out: Path, key: bytes | None, spool: Spool) -> dict[str, Any]:
    """Copy the spool into comparisons.parquet without duplicates and with splits; return the report on it."""
    rows = len(spool.votes)
    first = np.zeros(rows, dtype=bool)
    first[np.unique(spool.votes, return_index=True)[1]] = True
    prompts, position = np.unique(spool.prompts, return_inverse=True)
    codes = splits.assign_splits(prompts, settings.validation_share, settings.test_share)
    in_several = splits.honour_given(codes, position, spool.given)
    split_of = codes[position]
    del position

    report, metadata = DataReport(), {KEY_METADATA: pseudonyms.fingerprint(key) if key else ""}
    with (
        COMPARISON.writer(out / COMPARISONS_FILE, metadata) as writer,
        progress(total=rows, desc="write", unit="rows") as bar,
    ):
        for table in _row_groups(_finished(spool, first, split_of, COMPARISON.schema(metadata), bar.update)):
            writer.write_table(table)
            report.update(table)
    metrics = report.result(prompts=np.bincount(codes, minlength=len(SPLITS)))
    metrics["duplicates"] = rows - int(first.sum())
    if in_several:
        metrics["warnings"].append(
            f"{in_several} prompts stood in several of the source's splits; each is now in the most held-out"
        )
    return metrics


def _finished(
    spool: Spool,
    first: np.ndarray[Any, np.dtype[np.bool_]],
    split_of: splits.Codes,
    schema: pa.Schema,
    done: Callable[[int], object],
) -> Iterator[pa.Table]:
    """The spool's batches with their splits and without duplicates; `first` and `split_of` say it of each row."""
    names, start = pa.array(SPLITS), 0
    for batch in spool.batches():
        here = slice(start, start + len(batch))
        split = pa.DictionaryArray.from_arrays(pa.array(split_of[here], pa.int32()), names)
        table = pa.Table.from_batches([batch]).append_column("split", split).select(schema.names).cast(schema)
        yield table if first[here].all() else table.filter(pa.array(first[here]))
        start = here.stop
        done(len(batch))


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables of about 20,000 rows or 32 MB, whichever comes first."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(len, pending)) >= BATCH_ROWS or sum(part.nbytes for part in pending) >= 32e6:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []
    if sum(map(len, pending)):
        yield pa.concat_tables(pending).combine_chunks()
