"""The only truth about shapes and columns: Arrow schemas, tensor names, the bundle's manifest, metrics.json.

Every Parquet file carries its table's name and schema version in its metadata. A reader refuses a name or a version
that it does not know and says what to do about it. Feast fields, KServe payloads and the stages' files derive from here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, field_validator

from coterie.errors import BadData

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
GLOBAL, EMBEDDING_REWARD = "global", "embedding"  # rewards that are no coterie's

_CONTENT_IDS = frozenset({"comparison_id", "chosen_id", "rejected_id", "pair_id", "response_id"})
_BUFFER = 1 << 20  # bytes of a column read at once; without it, all of the columns asked for come into memory
_META_NAME, _META_VERSION = b"coterie.table", b"coterie.schema_version"


# ---------------------------------------------------------------------------------------------------------------- files
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of the file `path`; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def content_id(*parts: str) -> str:
    """Return a 128-bit hex id of the given strings; the parts' borders count, so ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- tables
def vector_type(size: int) -> pa.DataType:
    """The Arrow type of a vector of `size` float32."""
    return pa.list_(pa.float32(), size)


@dataclass(frozen=True)
class Table:
    """A Parquet table with a name and a schema version.

    A field whose type is a list without a fixed size here is a vector of the file's own length: it is written as
    fixed-size list, and a reader accepts any length.
    """

    name: str
    version: int
    fields: tuple[pa.Field, ...]

    def schema(self, metadata: dict[str, str] | None = None, **sizes: int) -> pa.Schema:
        """The Arrow schema; `sizes` names the length of each vector column, `metadata` is added to the file's own."""
        fields = [
            pa.field(f.name, vector_type(sizes[f.name]), f.nullable) if pa.types.is_list(f.type) else f
            for f in self.fields
        ]
        meta = {_META_NAME: self.name.encode(), _META_VERSION: str(self.version).encode()}
        meta |= {k.encode(): v.encode() for k, v in (metadata or {}).items()}
        return pa.schema(fields, metadata=meta)

    def open(self, path: str | Path) -> pq.ParquetFile:
        """Open `path` for reading after checking that it is this table.

        Raises:
            BadData: no such file, not Parquet, another table, another schema version, or missing columns.
        """
        where = Path(path)
        if not where.is_file():
            raise BadData(f"{where}: no such file. Expected a {self.name} table; run the stage that writes it first.")
        try:
            # Not mapped: what was read of a mapped file counts as the process's memory until the file is closed.
            file = pq.ParquetFile(where, pre_buffer=False, buffer_size=_BUFFER)
        except (pa.ArrowInvalid, OSError) as error:
            raise BadData(
                f"{where}: not a readable Parquet file ({error}). Run the stage that writes it again."
            ) from error
        meta = file.schema_arrow.metadata or {}
        name, version = meta.get(_META_NAME, b"").decode(), meta.get(_META_VERSION, b"").decode()
        if name != self.name:
            raise BadData(
                f"{where}: this is {f'a {name} table' if name else 'no table of coterie'}, not a {self.name} table. "
                "Give the file that the stage asks for."
            )
        if version != str(self.version):
            newer = version.isdigit() and int(version) > self.version
            remedy = "Upgrade coterie." if newer else "Run the stage that writes it again with this version of coterie."
            raise BadData(f"{where}: {self.name} schema version {version}, this program reads {self.version}. {remedy}")
        missing = [f.name for f in self.fields if f.name not in file.schema_arrow.names]
        if missing:
            raise BadData(
                f"{where}: a {self.name} table without {', '.join(missing)}. Run the stage that writes it again."
            )
        return file

    def read(self, path: str | Path, columns: list[str] | None = None) -> pa.Table:
        """Read the table `path`, or some columns of it. Raises BadData as `open` does."""
        return self.open(path).read(columns=columns)

    def metadata(self, path: str | Path) -> dict[str, str]:
        """The file's own metadata (encoder name, mixture version and the like) as strings."""
        raw = self.open(path).schema_arrow.metadata or {}
        return {
            k.decode(): v.decode()
            for k, v in raw.items()
            if not k.startswith((b"coterie.table", b"coterie.schema", b"ARROW"))
        }

    @contextmanager
    def writer(self, path: Path, metadata: dict[str, str] | None = None, **sizes: int) -> Iterator[pq.ParquetWriter]:
        """A streaming writer of record batches or tables; the file appears under its name only when all is written."""
        # Content ids and vectors hardly repeat within a row group: a dictionary of them makes files larger and slower, and
        # compression or statistics of vectors only cost time.
        schema, flat = self.schema(metadata, **sizes), [f.name for f in self.fields if not pa.types.is_list(f.type)]
        compression = {f.name if f.name in flat else f"{f.name}.list.element": "zstd" for f in self.fields}
        compression |= {path: "none" for path in compression if path not in flat}
        with (
            replacing(path) as temporary,
            pq.ParquetWriter(
                temporary,
                schema,
                compression=compression,
                use_dictionary=[name for name in flat if name not in _CONTENT_IDS],
                write_statistics=flat,
            ) as writer,
        ):
            yield writer

    def write(self, path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, **sizes: int) -> None:
        """Write whole columns (lists, numpy arrays, Arrow arrays; vectors as 2-d arrays) as one file."""
        schema = self.schema(metadata, **sizes)
        with self.writer(path, metadata, **sizes) as writer:
            writer.write_table(table_of(columns, schema))


def table_of(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Make an Arrow table of `columns` under `schema`; a 2-d array [n, size] becomes a fixed-size-list column.

    Raises:
        BadData: a column is missing or does not fit its type.
    """
    arrays = []
    for field in schema:
        if field.name not in columns:
            raise BadData(f"column {field.name} is missing; expected {', '.join(schema.names)}")
        value = columns[field.name]
        try:
            if pa.types.is_fixed_size_list(field.type):
                flat = np.ascontiguousarray(value, dtype=np.float32).reshape(-1)
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size))
            elif isinstance(value, pa.Array | pa.ChunkedArray):
                arrays.append(value.cast(field.type))
            else:
                arrays.append(pa.array(value, type=field.type, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise BadData(f"column {field.name} does not fit {field.type}: {error}") from error
    return pa.Table.from_arrays(arrays, schema=schema)


def matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A fixed-size-list column as a float32 array [rows, size], without a copy where it lies in one piece."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty or several-chunk column
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=column.type)
    values = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values.reshape(len(array), array.type.list_size), dtype=np.float32)


def _field(name: str, kind: pa.DataType, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable)


_string, _float, _vector = pa.string(), pa.float32(), pa.list_(pa.float32())
_timestamp = pa.timestamp("us", tz="UTC")
_category = pa.dictionary(pa.int32(), pa.string())

COMPARISON = Table(
    "comparison",
    1,
    (
        _field("comparison_id", _string),
        _field("worker_id", _string),  # a pseudonym, unless the run was told otherwise
        _field("prompt", _string),
        _field("prompt_id", _string),  # the unit of splitting
        _field("chosen", _string),
        _field("rejected", _string),
        _field("chosen_id", _string),  # content_id(prompt, chosen)
        _field("rejected_id", _string),
        _field("pair_id", _string),  # the same for both orders of the two responses
        _field("label", _float),  # 1, or .5 for a tie
        _field("ranking_id", _string, True),  # rows that come from one ranking share it
        _field("shown_first", _string, True),  # "chosen" or "rejected"
        _field("split", _category),
        _field("confidence", _float, True),  # 0 (a guess) to 1 (certain)
        _field("source", _string),
        _field("created_at", _timestamp, True),
    ),
)
QUARANTINE = Table(
    "quarantine",
    1,
    (
        _field("source", _string),
        _field("line", pa.int64()),  # 1-based line, or row of a file without lines
        _field("reason", _string),
        _field("row", _string),  # the refused row as JSON, cut at 10,000 characters
    ),
)
VECTOR = Table(
    "vector",
    1,
    (
        _field("response_id", _string),  # chosen_id or rejected_id
        _field("vector", _vector),  # the encoder's
        _field("style", _vector),  # readable features; their names are in the file's metadata
    ),
)
DIFFERENCE = Table(  # ordered by split and worker; a row group holds whole workers of one split
    "difference",
    2,
    (
        _field("comparison_id", _string),
        _field("worker", pa.int32()),  # row of the worker in embeddings.parquet
        _field("prompt", pa.int64()),  # a hash of prompt_id
        _field("split", _category),
        _field("label", _float),
        _field("weight", _float),  # what it counts: 1; a pair of a ranking of m responses 2 / m
        _field("x", _vector),  # h(prompt, chosen) - h(prompt, rejected)
    ),
)
EMBEDDING = Table(
    "embedding",
    1,
    (
        _field("worker_id", _string),
        _field("embedding", _vector),  # a_i of the low-rank member, [rank]
        _field("reliability", _float),  # beta_i
        _field("comparisons", pa.int32()),  # training comparisons
    ),
)
ASSIGNMENT = Table(
    "assignment",
    1,
    (
        *EMBEDDING.fields,
        _field("coterie", pa.int32()),
        _field("posterior", _vector),  # [coteries]
        _field("mixture_version", _string),
    ),
)
SCORE = Table(  # of a reward adapter: every response of held-out comparisons and of the reference sample
    "score",
    1,
    (
        _field("response_id", _string),
        _field("score", _float),  # raw: before center and scale
    ),
)
STATE = Table(  # of every response, by the global reward adapter: what linear heads on the backbone read
    "state",
    1,
    (
        _field("response_id", _string),
        _field("state", _vector),  # the last hidden state at the last token
    ),
)
PROFILE = Table("profile", 1, (*ASSIGNMENT.fields, _field("event_timestamp", _timestamp)))


def iterate(file: pq.ParquetFile, columns: list[str] | None = None, rows: int = 65536) -> Iterator[pa.RecordBatch]:
    """The record batches of an opened table, at most `rows` rows each."""
    yield from file.iter_batches(batch_size=rows, columns=columns)


# -------------------------------------------------------------------------------------------------------------- tensors
# Names inside the safetensors files of an embed, cluster or reward stage, and so of a bundle. d: features, r: rank,
# e: the encoder's dimension, s: style features, K: coteries.
FEATURES_FILE, MODEL_FILE, MIXTURE_FILE, HEAD_FILE = (
    "features.safetensors",
    "lowrank.safetensors",
    "mixture.safetensors",
    "head.safetensors",
)
FEATURE_TENSORS = ("vector_mean", "vector_scale", "components", "style_mean", "style_scale")  # [e] [e] [p, e] [s] [s]
LOWRANK_TENSORS = ("theta", "basis", "reliability_variance")  # [d] [d, r] [1]
MIXTURE_TENSORS = ("theta", "weights", "reliability_variance")  # [K, d] [K] [1]
HEAD_TENSORS = ("weight", "center", "scale")  # [d] [1] [1]; score = scale * (h @ weight - center)
# Of a reward that is an adapter of a backbone; and of the global one, where other heads read its hidden state.
ADAPTER_FILE, SCORES_FILE, STATES_FILE = "adapter.json", "scores.parquet", "states.parquet"
JOINT_FILE = "joint.safetensors"  # what joint training starts from, beside its checkpoints
JOINT_TENSORS = ("heads", "embeddings", "prior")  # [1 + r, hidden] [n_workers, r] [1], a comparison's share of a prior
PERSONAL_FILE = "personal.safetensors"
PERSONAL_TENSORS = (
    *HEAD_TENSORS,
    "basis",
    "basis_center",
)  # [d, r] [r]; a person's weight is weight + basis @ embedding


# ------------------------------------------------------------------------------------------------------------- manifest
class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelReference(_Frozen):
    """A pretrained model that a bundle needs, with the revision that it was made with."""

    name: str
    revision: str
    role: Literal["encoder", "backbone", "policy"]


Verdict = Literal["one-taste", "continuous", "coteries"]
Ships = Literal["one-reward", "embedding", "coteries"]


class Gate(_Frozen):
    """Whether a coterie, or everybody by their embedding (no coterie), is served by a reward of their own, and why."""

    coterie: int | None
    serves: Literal["own", "global"]
    reason: str


class PolicyGate(_Frozen):
    """Which policy answers the people of a coterie, or everybody (no coterie), and why."""

    coterie: int | None
    serves: Literal["own", "global", "start"]
    reason: str


class Manifest(_Frozen):
    """manifest.json of a bundle."""

    schema_version: Literal[3] = 3
    name: str
    model_version: str  # content hash of the files
    mixture_version: str
    created_by: str
    seed: int
    base_models: list[BaseModelReference]
    coteries: int
    rank: int
    features: int
    style_names: list[str]
    verdict: Verdict
    ships: Ships
    reward: Literal["head", "adapter"] = "head"  # linear on the encoder's features, or LoRA on a backbone
    temperature: float = 1.0  # of the evidence in a new worker's comparisons
    key_fingerprint: str | None  # of the pseudonym key; None: worker ids are used as they came
    gates: list[Gate]
    policies: list[PolicyGate] = Field(default_factory=list)  # none: the bundle scores and writes nothing
    metrics: dict[str, float]
    files: dict[str, str]  # path -> sha256


# -------------------------------------------------------------------------------------------------------------- metrics
class Estimate(_Frozen):
    """A number with its interval; no interval where there are too few workers for one, no number where there are none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95

    @field_validator("value", mode="before")
    @classmethod
    def _number_or_none(cls, value: float | None) -> float | None:
        return None if value is None or np.isnan(value) else float(value)


class Quality(_Frozen):
    """Macro means over workers: accuracy as a fraction, log-loss in nats."""

    accuracy: Estimate
    log_loss: Estimate


class Heldout(_Frozen):
    """Quality on test prompts, and its difference to the pooled model."""

    accuracy: float | None
    log_loss: float | None
    difference_to_pooled: Quality


class Candidate(_Frozen):
    """One tried member of the family: its held-out log-loss and the paired difference to the simplest."""

    member: str
    size: int  # coteries of a mixture, rank of a low-rank member, 1 for pooled
    log_loss: float
    gain: float  # log-loss of pooled + reliability minus this one's, macro over workers
    standard_error: float
    chosen: bool = False


class Selection(_Frozen):
    """What was found, what it was chosen among, and what is shipped for it."""

    verdict: Verdict
    member: str  # of the family that the verdict rests on
    size: int  # its coteries or directions
    coteries: int
    ships: Ships  # embedding: a person's reward is (theta + U a_i) . h
    insisted: bool = False  # the recipe fixed what is shipped, or the number of coteries
    confidence: float | None = None  # share of resamples of the workers that give the same verdict
    gain: Estimate | None = None  # held-out log-loss of pooled + reliability minus that of the best taste member
    candidates: list[Candidate] = Field(default_factory=list)


class Heterogeneity(_Frozen):
    """A test of "everybody wants the same, some are careless"."""

    statistic: float  # held-out gain in nats a comparison
    p_value: float
    replicates: int
    null: str


class StyleWeight(_Frozen):
    """What a coterie weighs a readable feature more than everybody; `words` say what is liked by the weight's sign."""

    name: str
    words: str
    weight: Estimate


class CoterieSummary(_Frozen):
    """One coterie in numbers and in words."""

    id: int
    workers: int
    comparisons: int
    serves: Literal["own", "global"]
    own_vs_global: Quality
    likes: list[str] = Field(default_factory=list)
    style: list[StyleWeight] = Field(default_factory=list)


class Metrics(_Frozen):
    """metrics.json of a run; other programs read it."""

    schema_version: Literal[1] = 1
    seed: int
    versions: dict[str, str]
    data: dict[str, int]  # workers, comparisons, refused
    heterogeneity: Heterogeneity | None = None
    selection: Selection
    heldout: dict[str, Any]  # seen: Heldout, unseen_by_shots: {"0": Heldout, ...}
    stability: dict[str, float]
    worst: dict[str, float]
    calibration: dict[str, float]
    coteries: list[CoterieSummary]
    truth: dict[str, float] | None = None  # simulated annotators only: ari, oracle accuracy
    seconds: dict[str, float]
    peak_memory: dict[str, int]  # bytes


# -------------------------------------------------------------------------------------------------------------- serving
Text = Annotated[str, Field(max_length=200_000)]
Reason = Literal[
    "no-worker",  # the request names nobody
    "no-comparisons",  # of a person who was to be placed by some
    "unknown-worker",  # nobody of this name has a profile
    "stale-profile",  # older than the staleness limit
    "other-mixture",  # made with a mixture that the bundle does not serve
    "damaged-profile",  # values that cannot be a profile
    "profiles-unavailable",  # the profile store failed or missed its deadline
    "holdout",  # drawn to be answered by the global reward, for comparison's sake (coterie.uplift)
]


Source = Literal["profile", "comparisons", "global"]


class Example(_Frozen):
    """A comparison that a person made: evidence of what they like."""

    prompt: Text
    chosen: Text
    rejected: Text
    tie: bool = False  # they liked both alike


class Instance(BaseModel):
    """One question: which of these responses would this person prefer?"""

    model_config = ConfigDict(extra="forbid")
    worker_id: str | None = Field(default=None, min_length=1, max_length=512)
    prompt: Text
    responses: list[Text] = Field(min_length=1, max_length=64)
    comparisons: list[Example] = Field(default=[], max_length=64)  # of a person who has no profile yet


class PredictRequest(BaseModel):
    """Body of POST /v1/models/coterie:predict."""

    model_config = ConfigDict(extra="ignore")
    instances: list[Instance] = Field(min_length=1, max_length=256)
    explain: bool = False  # tell each coterie's scores, and why a route was not taken
    next_pair: bool = False  # tell which two of the responses it would be best to ask this person about


class Route(_Frozen):
    """Who answers one instance: the coteries of a person's profile, or of comparisons that came along, or the global reward
    for the reason given."""

    source: Source
    reason: Reason | None = None
    coterie: int | None = None
    posterior: list[float] | None = None  # [coteries]
    embedding: list[float] | None = None  # [rank]
    mixture_version: str | None = None


class RoutedInstance(BaseModel):
    """What the router makes of an instance and the predictor scores; who asked stays with the router.

    There is a route for every mixture of which a profile is online: the predictor takes its own mixture's.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    responses: list[Text] = Field(min_length=1, max_length=64)
    comparisons: list[Example] = Field(default=[], max_length=64)
    routes: list[Route] = Field(default=[Route(source="global", reason="no-worker")], min_length=1, max_length=16)


class RoutedRequest(BaseModel):
    """Body of a request from the router to the predictor."""

    model_config = ConfigDict(extra="ignore")
    instances: list[RoutedInstance] = Field(min_length=1, max_length=256)
    explain: bool = False
    next_pair: bool = False


class CoterieScores(_Frozen):
    """What one coterie would say: scores [responses], by its own reward or the global one, and why by that one."""

    coterie: int
    scores: list[float]
    serves: Literal["own", "global"]
    reason: str
    share: float | None  # of the served average; null where no posterior serves


class RefusedRoute(_Frozen):
    """A route that was not taken, and why."""

    mixture_version: str | None
    reason: Reason


class Explanation(_Frozen):
    """Where an answer comes from."""

    by_global: list[float]  # [responses]
    coteries: list[CoterieScores]
    refused: list[RefusedRoute]


class Prediction(_Frozen):
    """One answer. `source` says whose reward it is: the worker's profile's, that of their comparisons, or the global one,
    with `reason`. Explanation and next pair (two positions among the responses) are there when they were asked for."""

    scores: list[float]
    best: int
    coterie: int | None
    posterior: list[float] | None
    source: Source
    reason: str | None = None
    model_version: str
    mixture_version: str
    next_pair: tuple[int, int] | None = None
    explanation: Explanation | None = None


class PredictResponse(_Frozen):
    """Body of the answer to POST /v1/models/coterie:predict."""

    predictions: list[Prediction]


# The same in the Open Inference Protocol. n: instances; t: their responses one after another; K: coteries. JSON: one text
# an instance. The flags of a request are its parameters.
INPUT_TENSORS: dict[str, tuple[str, list[int]]] = {
    "prompt": ("BYTES", [-1]),  # [n]
    "response": ("BYTES", [-1]),  # [t]
    "response_count": ("INT32", [-1]),  # [n], how many of them are each instance's; may be left out of one instance
    "comparisons": ("BYTES", [-1]),  # [n] JSON of list[Example]; may be left out
}
WORKER_TENSORS = INPUT_TENSORS | {"worker_id": ("BYTES", [-1])}  # of the router: [n], empty: nobody; may be left out
ROUTE_TENSORS = INPUT_TENSORS | {
    "routes": ("BYTES", [-1])
}  # of the predictor: [n] JSON of list[Route]; may be left out
OUTPUT_TENSORS: dict[str, tuple[str, list[int]]] = {
    "score": ("FP64", [-1]),  # [t]
    "response_count": ("INT32", [-1]),  # [n]
    "best": ("INT32", [-1]),  # [n]
    "coterie": ("INT32", [-1]),  # [n], -1: none
    "posterior": ("FP64", [-1, -1]),  # [n, K], zeros: none
    "source": ("BYTES", [-1]),  # [n]
    "reason": ("BYTES", [-1]),  # [n], empty: none
    "model_version": ("BYTES", [-1]),  # [n]
    "mixture_version": ("BYTES", [-1]),  # [n]
    "next_pair": ("INT32", [-1, 2]),  # [n, 2], -1: none; when asked for
    "explanation": ("BYTES", [-1]),  # [n] JSON of Explanation; when asked for
}


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` consecutive items."""
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
