"""Which format a source has, told by looking at its first rows, and the reader for it."""

from __future__ import annotations

from coterie.config import Format
from coterie.errors import BadData
from coterie.ingest import openai, prism
from coterie.ingest.readers import Naming, Reader
from coterie.ingest.sources import Source
from coterie.ingest.table import TableReader, resolve_columns


def reader_for(source: Source, wanted: Format, columns: dict[str, str], name_worker: Naming) -> tuple[str, Reader]:
    """Return the format's name and a reader for `source`.

    Raises:
        BadData: no rows, no format that we know, or columns that the format needs are missing.
    """
    sample = source.look()
    if not sample:
        raise BadData(f"{source.name}: no rows. Give a file with rows.")
    records = [record for record in sample if isinstance(record, dict)]
    if not records:
        reason = getattr(sample[0], "reason", "not a JSON object")
        raise BadData(
            f"{source.name}: none of the first {len(sample)} rows can be read; row 1: {reason}. Give one JSON object a "
            "line, CSV or Parquet; text in UTF-8."
        )
    found = {name for record in records for name in record}
    name = _recognise(found, source) if wanted == "auto" and not columns else wanted
    if name in ("openai", "prism"):
        required = openai.REQUIRED if name == "openai" else prism.REQUIRED
        missing = sorted(required - found)
        if missing:
            raise BadData(
                f"{source.name}: not in the {name} format: no {', '.join(missing)}. Columns found: "
                f"{', '.join(sorted(found))}. Say --format table and map the columns with --columns, "
                "or --format auto."
            )
        reader: Reader = openai.OpenAIReader(name_worker) if name == "openai" else prism.PrismReader(name_worker)
        return name, reader
    resolved = resolve_columns(
        found,
        columns,
        source.name,
        implicit_prompt=name == "trl",
        own_split="coterie.table" in source.metadata,
    )
    return "table" if name == "auto" else name, TableReader(resolved, name_worker)


def _recognise(found: set[str], source: Source) -> Format:
    if source.metadata.get("coterie.table") == "comparison":
        return "coterie"
    if found >= openai.REQUIRED:
        return "openai"
    if found >= prism.REQUIRED:
        return "prism"
    if found >= {"prompt", "chosen", "rejected"} and found & {"worker", "worker_id"}:
        return "coterie"
    return "trl" if found >= {"chosen", "rejected"} else "table"
