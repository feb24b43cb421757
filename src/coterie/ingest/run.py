"""The ingest stage: sources in, comparisons.parquet, quarantine.parquet and the data report out."""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from coterie.config import IngestSettings
from coterie.contracts import QUARANTINE, replacing, write_text
from coterie.errors import BadConfiguration, BadData, RunFailed
from coterie.ingest import pseudonyms
from coterie.ingest.draft import Draft, drafting
from coterie.ingest.formats import reader_for
from coterie.ingest.quarantine import Quarantine, kept_of
from coterie.ingest.readers import Naming
from coterie.ingest.simulated import SCHEME, open_simulated
from coterie.ingest.sources import Source, open_sources
from coterie.ingest.validation import Refused, Votes
from coterie.progress import progress

COMPARISONS_FILE, QUARANTINE_FILE, METRICS_FILE, TRUTH_FILE = (
    "comparisons.parquet",
    "quarantine.parquet",
    "metrics.json",
    "truth.json",
)


def ingest(
    settings: IngestSettings, out: Path, key: bytes | None = None, quarantine: Path | None = None
) -> dict[str, Any]:
    """Read the sources into `out`/comparisons.parquet, quarantine.parquet, metrics.json (and truth.json if
    simulated).

    In bounded memory: about 100 bytes a row, some hundred a worker, and some MB of texts. The same sources, settings and
    key make the same files.

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
    metadata = {pseudonyms.KEY_METADATA: pseudonyms.fingerprint(key) if key else ""}
    with _writing(out), _without_collector(), drafting(out / ".comparisons.draft", settings, metadata) as draft:
        refused, sources = _read(settings, out, key, draft)
        total, dropped = sum(source["rows"] for source in sources), refused.total
        if dropped > settings.max_refused * total or not draft.rows:
            raise _refusal(settings, out, quarantine, refused, total)
        metrics = draft.finish(out / COMPARISONS_FILE)
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
                f"{out.parent}: no space left to write the comparisons ({error}). Free some, or give another --out; "
                "for a time the run may need twice the size of the result."
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


def _read(
    settings: IngestSettings, out: Path, key: bytes | None, draft: Draft
) -> tuple[Quarantine, list[dict[str, Any]]]:
    """Read every source into the draft and the quarantine table."""
    sources: list[dict[str, Any]] = []
    with (
        draft.opened(),
        QUARANTINE.writer(out / QUARANTINE_FILE) as writer,
        progress(desc="ingest", unit="rows") as bar,
    ):
        refused = Quarantine(writer)
        for source in _sources(settings, out, key):
            name_worker = _naming(key, source)
            form, reader = reader_for(source, settings.format, settings.columns, name_worker)
            before, earlier = refused.total, sum(other["rows"] for other in sources)
            for item in reader.read(source.blocks):
                if isinstance(item, Votes):
                    draft.write(item, source.name)
                    bar.update(earlier + source.count - bar.n)
                else:
                    worker = _name_or_none(item.record, reader.worker_column, name_worker)
                    row = kept_of(item.record, reader.columns, reader.worker_column, worker)
                    refused.add(item, source.name, row)
            sources.append(
                {
                    "source": source.name,
                    "format": form,
                    "rows": source.count,
                    "refused": refused.total - before,
                }
            )
        refused.flush()
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
    made_with = source.metadata.get(pseudonyms.KEY_METADATA)
    ours = pseudonyms.fingerprint(key) if key else "none"
    if made_with and made_with != ours:
        raise BadData(
            f"{source.name}: its worker ids are pseudonyms of another key (fingerprint {made_with}, this run's "
            f"is {ours}). Use the key it was made with, or ingest the original file again."
        )
    return Naming(None if made_with else key)


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
