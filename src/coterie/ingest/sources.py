"""Opening sources: which files a pattern means, what kind each is, and its rows as they come, in bounded
memory.

Local paths and globs, and every URL that fsspec opens (s3://, https://, gs:// with its package ...); files
gzipped or not, told by their first bytes. `hf://owner/name?config=..&split=..&revision=..` is read with
`datasets`, streaming; `hf://datasets/owner/name/path/to/file` is one file of a hub repository, through
fsspec. sqlite:// and postgresql:// URLs are the platform's feedback databases.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from coterie.contracts import batched
from coterie.errors import BackendUnavailable, BadData, CoterieError
from coterie.ingest.pseudonyms import KEY_METADATA
from coterie.ingest.validation import MAX_TEXT, Unreadable

ROWS, _BYTES = 256, 1 << 20  # of a block: rows of what comes row by row, or lines of at least so many bytes
_BUFFER = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BREAKS = (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, OSError, UnicodeDecodeError)
_SUFFIXES = {
    ".jsonl": "line JSON",
    ".json": "line JSON",
    ".ndjson": "line JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}


class Block(NamedTuple):
    """Consecutive rows of a source."""

    lines: Sequence[int]  # line or row numbers from 1
    records: list[Any]  # a record each, or Unreadable


Blocks = Iterator[Block]


@dataclass
class Source:
    """One file or data set. `blocks` can be walked through once; `count` says how many rows came out so far."""

    name: str
    blocks: Blocks
    metadata: dict[str, str] = field(default_factory=dict)  # a Parquet file's own
    count: int = 0

    def __post_init__(self) -> None:
        self.blocks = self._guarded(self.blocks)

    def _guarded(self, blocks: Blocks) -> Blocks:
        """Count the rows; make a break in the middle of the file an error that says where."""
        line = 0
        try:
            for block in blocks:
                if block.records:
                    self.count += len(block.records)
                    yield block
                    line = block.lines[-1]
        except _BREAKS as error:
            raise _broken(self.name, line, error) from error

    def look(self, rows: int = 100) -> list[Any]:
        """The first records, which stay in `blocks`."""
        taken: list[Block] = []
        records: list[Any] = []
        while len(records) < rows and (block := next(self.blocks, None)):
            taken.append(block)
            records += block.records
        self.blocks = chain(taken, self.blocks)
        return records[:rows]


def in_blocks(rows: Iterable[tuple[int, Any]]) -> Blocks:
    """Blocks of rows that come one by one, as (number, record)."""
    for batch in batched(rows, ROWS):
        lines, records = zip(*batch, strict=True)
        yield Block(lines, list(records))


def open_sources(patterns: list[str]) -> Iterator[Source]:
    """Open what the patterns name, one after the other; a glob's files in the order of their names.

    Every pattern is looked up before the first row is read.

    Raises:
        BadData: nothing matches a pattern, an empty file, a file of no known kind. While rows are read
        also: a
            broken gzip or Parquet file, with the row reached.
        BackendUnavailable: an object store or hub that does not answer.
    """
    names = [name for pattern in patterns for name in _expand(pattern)]
    for name in dict.fromkeys(names):
        if _is_dataset(name):
            yield from _open_dataset(name)
        elif _is_database(name):
            yield _open_database(name)
        else:
            yield _open_file(name)


# ------------------------------------------------------------------------------------------------------ files
def _expand(pattern: str) -> list[str]:
    """The names of the files that a pattern means."""
    if _is_dataset(pattern) or _is_database(pattern):
        return [pattern]
    if "://" not in pattern:
        path = str(Path(pattern).expanduser())
        found = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        folder = any(Path(name).is_dir() for name in found)
    else:
        with remote(pattern):  # info, not isfile or exists: these take a store that does not answer for a "no"
            system, path = fsspec.core.url_to_fs(pattern)
            found = sorted(system.glob(path)) if glob.has_magic(path) else [path]
            folder = any(system.info(name)["type"] == "directory" for name in found)
            found = [system.unstrip_protocol(name) for name in found]
    if folder:
        raise BadData(f"{pattern}: a folder. Name its files, for example {pattern.rstrip('/')}/*.jsonl.gz")
    if not found:
        raise BadData(f"{pattern}: no such file, and none matches it. Check the spelling; quote a glob in a shell.")
    return found


@contextmanager
def remote(name: str) -> Iterator[None]:
    """Turn what file systems raise into errors in words: BadData, or BackendUnavailable where trying again may help."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadData(f"{name}: no such file ({error}). Check the spelling.") from error
    except PermissionError as error:
        raise BadData(f"{name}: may not be read ({error}). Check the rights or the credentials.") from error
    except ImportError as error:
        raise BadData(f"{name}: {error}. Install coterie[sources].") from error
    except ValueError as error:  # fsspec: protocol not known
        raise BadData(f"{name}: cannot be opened: {error}. Check the address.") from error
    except (OSError, TimeoutError) as error:
        raise BackendUnavailable(f"{name}: {error}. Check that the store can be reached, and try again.") from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp", "httpx")):
            raise BackendUnavailable(f"{name}: {error}. Check endpoint and credentials, and try again.") from error
        raise


def _open_file(name: str) -> Source:
    with remote(name):
        if "://" in name:
            system, path = fsspec.core.url_to_fs(name)
            raw: IO[bytes] = system.open(path, "rb")
        else:
            raw = Path(name).open("rb")  # noqa: SIM115 - closed by who reads its rows
    with remote(name):
        start = raw.read(4)
        raw.seek(0)
    if not start:
        raise BadData(f"{name}: the file is empty. Give a file with rows.")
    if start == b"PAR1":
        return _open_parquet(name, raw)
    if start == b"SQLi":
        raise BadData(f"{name}: a SQLite database. If it is a feedback database, give it as sqlite:///{name}.")
    zipped = start.startswith(b"\x1f\x8b")
    handle: io.BufferedReader[Any] = io.BufferedReader(_Unzipped(raw) if zipped else raw, _BUFFER)
    try:
        start = handle.peek(4096)
    except (EOFError, OSError, zlib.error) as error:
        raise _broken(name, 0, error) from error
    kind = _kind(name, start)
    return Source(name, _lines(handle) if kind == "line JSON" else in_blocks(_cells(handle, name)))


class _Unzipped(io.RawIOBase):
    """A gzipped stream, unzipped step by step: where it breaks, the lines before the break have been read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._file = raw, gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._file.read1(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _kind(name: str, start: bytes) -> str:
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        raise BadData(f"{name}: one JSON array. Give one object a line: jq -c '.[]' FILE > FILE.jsonl")
    suffix = next((s for s in reversed(PurePosixPath(name).suffixes) if s.lower() not in (".gz", ".gzip")), "").lower()
    kind = _SUFFIXES.get(suffix)
    if kind == "Parquet":
        raise BadData(f"{name}: named Parquet, but it is not: the file does not start with PAR1. Write it again.")
    if kind:
        return kind
    if text.startswith(b"{"):
        return "line JSON"
    if _looks_like_header(text.split(b"\n", 1)[0]):
        return "CSV"
    raise BadData(f"{name}: neither line JSON, CSV, TSV nor Parquet (gzipped or not). Convert it to one of these.")


def _looks_like_header(line: bytes) -> bool:
    try:
        text = line.rstrip(b"\r").decode()
    except UnicodeDecodeError:
        return False
    return any(mark in text for mark in ",;\t") and text.replace("\t", " ").isprintable()


def _broken(name: str, line: int, error: Exception) -> CoterieError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return BadData(f"{name}: broken gzip after line {line:,} ({error}). Copy or download the file again.")
    if "://" in name and isinstance(error, OSError):
        return BackendUnavailable(f"{name}: reading stopped after line {line:,} ({error}). Try again.")
    return BadData(f"{name}: cannot be read after line {line:,} ({error}). Copy or download the file again.")


def _lines(handle: io.BufferedReader[Any]) -> Blocks:
    with handle:
        if handle.peek(3).startswith(_BYTE_ORDER_MARK):
            handle.read(3)
        first, texts, size = 1, [], 0
        try:
            for text in handle:
                texts.append(text)
                size += len(text)
                if size >= _BYTES:
                    yield _parsed(first, texts)
                    first, texts, size = first + len(texts), [], 0
        except _BREAKS:
            yield _parsed(first, texts)
            raise
        yield _parsed(first, texts)


def _parsed(first: int, texts: list[bytes]) -> Block:
    """The block of JSON lines that begins at line `first`; blank lines are no rows."""
    try:
        return Block(range(first, first + len(texts)), list(map(orjson.loads, texts)))
    except orjson.JSONDecodeError:
        pass
    rows: list[tuple[int, Any]] = []
    for line, text in enumerate(texts, first):
        try:
            rows.append((line, orjson.loads(text)))
        except orjson.JSONDecodeError as error:
            if text.strip():
                rows.append((line, Unreadable(f"not JSON ({error.msg})")))
    return Block([line for line, _ in rows], [record for _, record in rows])


def _cells(handle: io.BufferedReader[Any], name: str) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV file; bytes that are not UTF-8 become lone surrogates, which validation refuses."""
    csv.field_size_limit(min(sys.maxsize, 16 * MAX_TEXT))
    with io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        first = text.readline()
        delimiter = max(",\t;", key=first.count)
        header = next(csv.reader([first], delimiter=delimiter))
        if len(set(header)) < len(header):
            raise BadData(f"{name}: two columns of one name in the header ({', '.join(header)}). Rename one.")
        cells = csv.reader(text, delimiter=delimiter)
        row = 0
        while True:
            row += 1
            try:
                values = next(cells)
            except StopIteration:
                return
            except csv.Error as error:
                yield row, Unreadable(f"not CSV ({error})")
                continue
            if len(values) == len(header):
                yield row, dict(zip(header, values, strict=True))
            elif values:
                yield row, Unreadable(f"{len(values)} cells, the header has {len(header)}")


def _open_parquet(name: str, raw: IO[bytes]) -> Source:
    try:
        file = pq.ParquetFile(raw)
    except (pa.ArrowException, OSError) as error:
        raise BadData(f"{name}: not a readable Parquet file ({error}). Copy or download it again.") from error
    metadata = {k.decode(): v.decode("utf-8", "replace") for k, v in (file.schema_arrow.metadata or {}).items()}
    if not file.metadata.num_rows:
        raise BadData(f"{name}: a Parquet file without rows. Give a file with rows.")

    def blocks() -> Blocks:
        first = 1
        for batch in file.iter_batches(batch_size=ROWS):
            yield Block(range(first, first + len(batch)), batch.to_pylist())
            first += len(batch)

    return Source(name, blocks(), metadata)


# -------------------------------------------------------------------------------------------- feedback database
def _is_database(name: str) -> bool:
    return re.match(r"(sqlite|postgresql)(\+\w+)?://", name) is not None


def _open_database(name: str) -> Source:
    with remote(name):
        from coterie.feedback import reader
    metadata = {"coterie.table": "comparison", KEY_METADATA: reader.key_fingerprint(name)}
    return Source(name, in_blocks(enumerate(reader.votes(name), start=1)), metadata)


# -------------------------------------------------------------------------------------------------------- hub
def _is_dataset(name: str) -> bool:
    return (
        name.startswith("hf://") and PurePosixPath(name.partition("?")[0].removesuffix(".gz")).suffix not in _SUFFIXES
    )


def _open_dataset(name: str) -> Iterator[Source]:
    try:
        import datasets
    except ImportError as error:
        raise BadData(f"{name}: the package datasets is not installed. Install coterie[sources].") from error
    path, _, query = name.removeprefix("hf://").removeprefix("datasets/").partition("?")
    options = dict(parse_qsl(query))
    unknown = set(options) - {"config", "split", "revision"}
    if unknown:
        raise BadData(
            f"{name}: {', '.join(sorted(unknown))} not known. After the ? come config=, split= and revision=."
        )
    with remote(name):
        try:
            loaded = datasets.load_dataset(
                path,
                name=options.get("config"),
                split=options.get("split"),
                revision=options.get("revision"),
                streaming=True,
            )
        except ConnectionError as error:
            raise BackendUnavailable(f"{name}: {error}. Check that the hub can be reached, and try again.") from error
    parts = loaded if isinstance(loaded, dict) else {options.get("split", ""): loaded}
    for split, rows in parts.items():
        label = name if "split" in options else f"{name}{'&' if query else '?'}split={split}"
        yield Source(label, in_blocks(enumerate(rows, start=1)))
