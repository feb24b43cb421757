"""The stages: path in, path out. A command, a component and a library call all end here.

A stage writes into a temporary folder that takes the place of its result only when everything is there, beside a
stage.json with the key of what made it: settings, the content of the inputs, the source that ran. A stage whose result
already has that key does no work; with COTERIE_STAGE_CACHE set, neither does one that any run has done before.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from coterie import contracts
from coterie.config import (
    BundleSettings,
    ClusterSettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    PublishSettings,
    RewardSettings,
    Settings,
)
from coterie.errors import BadConfiguration, BadData, CoterieError, RunFailed

log = logging.getLogger("coterie")

STAGE_FILE, METRICS_FILE = "stage.json", "metrics.json"
COMPARISONS, QUARANTINE, VECTORS = "comparisons.parquet", "quarantine.parquet", "vectors.parquet"
DIFFERENCES, EMBEDDINGS, ASSIGNMENTS = "differences.parquet", "embeddings.parquet", "assignments.parquet"

Work = Callable[[Path], dict[str, Any]]


# -------------------------------------------------------------------------------------------------------------- stages
def ingest(out: Path, settings: IngestSettings) -> dict[str, Any]:
    """Read preferences into `out`/comparisons.parquet; refused rows into quarantine.parquet.

    Raises:
        BadData: nothing usable, or more refused rows than `settings.max_refused`; quarantine.parquet is then left
            beside `out`, and the message names it.
        BadConfiguration: pseudonyms are asked for and there is no key.
    """
    from coterie.ingest import ingest
    from coterie.ingest.pseudonyms import fingerprint, load_key
    from coterie.ingest.state import source_state

    run_folder = os.environ.get("COTERIE_RUN_FOLDER")
    quarantine = (Path(run_folder) if run_folder else out.parent) / QUARANTINE

    def identity() -> dict[str, Any]:
        key = fingerprint(load_key()) if settings.pseudonyms == "keyed" else ""
        return {"sources": source_state(settings.source), "key": key}

    return _stage("ingest", settings, {}, out, lambda folder: ingest(settings, folder, quarantine=quarantine), identity)


def encode(comparisons: Path, out: Path, settings: EncodeSettings) -> dict[str, Any]:
    """One vector a unique (prompt, response) of `comparisons` into `out`/vectors.parquet."""
    from coterie.encoding import encode

    source = _inside(comparisons, COMPARISONS)
    return _stage("encode", settings, {"comparisons": source}, out, lambda folder: encode(source, folder, settings))


def embed(comparisons: Path, vectors: Path, out: Path, settings: EmbedSettings) -> dict[str, Any]:
    """Worker embeddings learned jointly with the reward, and the features they were learned on."""
    from coterie.discovery import embed

    inputs = {"comparisons": _inside(comparisons, COMPARISONS), "vectors": _inside(vectors, VECTORS)}
    work: Work = lambda folder: embed(inputs["comparisons"], inputs["vectors"], folder, settings)  # noqa: E731
    return _stage("embed", settings, inputs, out, work)


def cluster(embedded: Path, out: Path, settings: ClusterSettings, previous: Path | None = None) -> dict[str, Any]:
    """The verdict, the coteries, every worker's posterior; ids of a `previous` clustering are kept by the same people."""
    from coterie.discovery import cluster

    inputs = {"embedded": embedded} | ({} if previous is None else {"previous": previous})
    return _stage("cluster", settings, inputs, out, lambda folder: cluster(embedded, folder, settings, previous))


def drift(embedded: Path, clustered: Path, comparisons: Path, vectors: Path, out: Path) -> dict[str, Any]:
    """Whether what people want has changed since an earlier run, by newer comparisons of the same workers."""
    from coterie.discovery.run import drift_since

    inputs = {
        "embedded": embedded,
        "clustered": clustered,
        "comparisons": _inside(comparisons, COMPARISONS),
        "vectors": _inside(vectors, VECTORS),
    }
    work: Work = lambda folder: drift_since(embedded, clustered, inputs["comparisons"], inputs["vectors"], folder)  # noqa: E731
    return _stage("drift", Settings(), inputs, out, work)


def reward(
    embedded: Path,
    clustered: Path,
    out: Path,
    settings: RewardSettings,
    coterie: int | Literal["embedding"] | None = None,
    global_reward: Path | None = None,
    comparisons: Path | None = None,
) -> dict[str, Any]:
    """The global reward, or with `coterie` and `global_reward` that coterie's; "embedding": of every person their own.

    Adapters are trained on texts, and need the `comparisons` of ingest.
    """
    from coterie.rewards import train_reward

    if (coterie is None) != (global_reward is None):
        raise BadConfiguration("a coterie's reward starts from the global one: give both coterie and global_reward")
    texts = _texts(comparisons) if settings.kind == "adapter" else {}  # linear heads do not depend on them
    inputs = {"embedded": embedded, "clustered": clustered, **texts}
    if global_reward is not None:
        inputs["global_reward"] = global_reward
    name = f"rewards/{reward_name(coterie)}"
    which: Any = contracts.GLOBAL if coterie is None else coterie

    def work(folder: Path) -> dict[str, Any]:
        return train_reward(embedded, clustered, folder, which, settings, global_reward, texts.get("comparisons"))

    return _stage(name, settings, inputs, out, work)


def evaluate(
    embedded: Path,
    clustered: Path,
    rewards: Sequence[Path],
    out: Path,
    settings: EvaluateSettings,
    comparisons: Path | None = None,
) -> dict[str, Any]:
    """The coterie-by-model matrix on test prompts, and the gate on validation prompts.

    Rewards that are adapters are judged by text, and need the `comparisons` of ingest.
    """
    from coterie.evaluation import evaluate

    named, texts = _named_rewards(rewards), _texts(comparisons)
    inputs = {"embedded": embedded, "clustered": clustered, **texts, **named}
    work: Work = lambda folder: evaluate(embedded, clustered, named, settings, texts.get("comparisons"))  # noqa: E731
    return _stage("evaluate", settings, inputs, out, work)


def bundle(
    ingested: Path,
    encoded: Path,
    embedded: Path,
    clustered: Path,
    rewards: Sequence[Path],
    evaluated: Path,
    out: Path,
    settings: BundleSettings,
) -> dict[str, Any]:
    """Everything that serves, as one checksummed artifact."""
    from coterie.bundle import build_bundle

    named = _named_rewards(rewards)
    inputs = {
        "ingested": ingested,
        "encoded": encoded,
        "embedded": embedded,
        "clustered": clustered,
        "evaluated": evaluated,
        **named,
    }

    def work(folder: Path) -> dict[str, Any]:
        return build_bundle(
            ingested=ingested,
            encoded=encoded,
            embedded=embedded,
            clustered=clustered,
            rewards=named,
            evaluated=evaluated,
            out=folder,
            settings=settings,
        )

    return _stage("bundle", settings, inputs, out, work)


def promote(
    candidate: Path, incumbent: Path, comparisons: Path, out: Path, settings: EvaluateSettings
) -> dict[str, Any]:
    """Whether the bundle `candidate` may take the place of `incumbent`, by validation prompts of the candidate's run."""
    from coterie.promotion import compare_versions

    inputs = {"candidate": candidate, "incumbent": incumbent, **_texts(comparisons)}
    work: Work = lambda _: compare_versions(candidate, incumbent, inputs["comparisons"], settings)  # noqa: E731
    return _stage("promote", settings, inputs, out, work)


def publish(clustered: Path, out: Path, settings: PublishSettings) -> dict[str, Any]:
    """Worker profiles into Feast: the offline Parquet, and the online store.

    Always done anew: a profile carries the time of its publication, and the online store may have been emptied.
    """
    publish = adapter("feature_repo.publish").publish
    inputs = {"clustered": clustered, "definitions": repository() / "feature_repo"}
    return _stage("publish", settings, inputs, out, lambda folder: publish(clustered, folder, settings), reuse=False)


def report(
    ingested: Path,
    encoded: Path,
    embedded: Path,
    clustered: Path,
    rewards: Sequence[Path],
    evaluated: Path,
    out: Path,
    title: str = "coterie",
) -> dict[str, Any]:
    """metrics.json of the whole run, and report.html."""
    from coterie.report import assemble_metrics, write_report

    named = _named_rewards(rewards)
    stages = {
        "ingest": ingested,
        "encode": encoded,
        "embed": embedded,
        "cluster": clustered,
        "evaluate": evaluated,
        **named,
    }

    def work(folder: Path) -> dict[str, Any]:
        records = {name: json.loads((path / STAGE_FILE).read_text(encoding="utf-8")) for name, path in stages.items()}
        metrics = assemble_metrics(stages, records, versions())
        write_report(stages, metrics, folder / "report.html", title)
        return metrics

    return _stage("report", Settings(), stages, out, work, lambda: {"title": title})


def assess(out: Path, ingest_settings: IngestSettings, encode_settings: EncodeSettings, worthwhile: float) -> str:
    """The stages up to cluster, each in its folder below `out`, and what they say before a GPU is used.

    Writes `out`/assessment.json (assess.Assessment) and `out`/assessment.md, and returns the latter.
    """
    from coterie.assess import assess, assessment_markdown

    ingested = ingest(out / "ingest", ingest_settings)
    encode(out / "ingest", out / "encode", encode_settings)
    embed(out / "ingest", out / "encode", out / "embed", EmbedSettings())
    clustered = cluster(out / "embed", out / "cluster", ClusterSettings())
    assessment = assess(ingested, clustered, out / "embed" / DIFFERENCES, worthwhile)
    text = assessment_markdown(assessment)
    contracts.write_text(out / "assessment.json", assessment.model_dump_json(indent=1))
    contracts.write_text(out / "assessment.md", text)
    return text


# ------------------------------------------------------------------------------------------------------- what they share
def _stage(
    name: str,
    settings: Settings,
    inputs: Mapping[str, Path],
    out: Path,
    work: Work,
    identity: Callable[[], Mapping[str, Any]] = dict,
    reuse: bool = True,
) -> dict[str, Any]:
    """Do `work` into a temporary folder that becomes `out`, unless `out` or the cache holds the result already."""
    try:
        for label, path in inputs.items():
            if not path.exists():
                raise BadData(f"{name}: {label} {path} does not exist; run the stage that writes it first")
        key = _key(name, settings, inputs, identity())
        if reuse and _record(out).get("key") == key:
            log.info("%s: up to date", name)
            return read_metrics(out)
        kept = _cached(name, key) if reuse else None
        if kept is not None and _record(kept).get("key") == key:
            log.info("%s: done before, taken from the cache", name)
            _place(out, lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True))
            return read_metrics(out)
        log.info("%s: started", name)
        _place(out, lambda folder: _perform(name, key, settings, work, folder))
        if kept is not None:
            _place(kept, lambda folder: shutil.copytree(out, folder, dirs_exist_ok=True))
        log.info("%s: done in %.1f s", name, _record(out)["seconds"])
        return read_metrics(out)
    except CoterieError as error:
        _leave_word(name, error)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        failure = RunFailed(
            f"{name}: the disk below {out.parent} is full. Free some space; nothing half-written was left."
            if full
            else f"{name}: {out} cannot be written: {error}. Check the folder and its rights."
        )
        _leave_word(name, failure)
        raise failure from error


def _perform(name: str, key: str, settings: Settings, work: Work, folder: Path) -> None:
    started = time.monotonic()
    metrics = work(folder)
    record = {
        "schema_version": 1,
        "stage": name,
        "key": key,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "volatile": metrics.pop("volatile", {}),
    }
    contracts.write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False))
    contracts.write_text(folder / STAGE_FILE, json.dumps(record, indent=1, sort_keys=True))


def _place(out: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a temporary folder beside `out`, then put it in the place of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_away_killed(out)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{part}") for part in ("part", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_away_killed(out: Path) -> None:
    """Remove what processes that were killed left beside `out`."""
    for folder in (*out.parent.glob(f".{out.name}.*.part"), *out.parent.glob(f".{out.name}.*.old")):
        try:
            os.kill(int(folder.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError, IndexError):
            continue  # somebody else's, who may be at work


def _key(name: str, settings: Settings, inputs: Mapping[str, Path], identity: Mapping[str, Any]) -> str:
    parts = {
        "stage": name,
        "settings": settings.model_dump(mode="json"),
        "source": source_digest(),
        "inputs": {label: content_digest(path) for label, path in inputs.items()},
        "identity": identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names; stage.json, which holds times, does not count."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        if part.name != STAGE_FILE and part.suffix != ".pyc":
            digest.update(f"{part.relative_to(path)}\0{content_digest(part)}\0".encode())
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """SHA-256 of the library's own source: another version of the code is another result."""
    return content_digest(Path(__file__).parent)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what shapes a result, for stage.json and metrics.json."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        "coterie",
        "numpy",
        "scipy",
        "scikit-learn",
        "pyarrow",
        "torch",
        "transformers",
        "sentence-transformers",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def reward_name(coterie: int | str | None) -> str:
    """Folder name of a reward: `global`, `coterie-<k>` or `embedding`."""
    if coterie is None or coterie == contracts.EMBEDDING_REWARD:
        return coterie or contracts.GLOBAL
    return f"coterie-{coterie}"


def audiences(clustered: Mapping[str, Any]) -> list[int | Literal["embedding"]]:
    """Whose rewards there are beside the global one, by cluster's metrics: the coteries', and by embedding if that ships."""
    selection = clustered["selection"]
    personal: list[Literal["embedding"]] = ["embedding"] if selection["ships"] == contracts.EMBEDDING_REWARD else []
    return [*range(selection["coteries"]), *personal]


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a stage's folder. Raises BadData where it is missing or damaged."""
    try:
        metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadData(f"{folder}: no readable {METRICS_FILE}; it is not the folder of a finished stage") from error
    return metrics


def _named_rewards(rewards: Sequence[Path]) -> dict[str, Path]:
    """Name the folders of rewards by what their own stage.json says they are, whatever they are called on the disk."""
    named = {}
    for path in rewards:
        record = _record(path)
        if not str(record.get("stage", "")).startswith("rewards/"):
            raise BadData(f"{path}: not the folder of a reward; give those that `coterie reward` wrote")
        named[record["stage"].removeprefix("rewards/")] = path
    if contracts.GLOBAL not in named:
        raise BadData("the global reward is not among the rewards; run `coterie reward` without --coterie first")
    return dict(sorted(named.items()))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


def _cached(name: str, key: str) -> Path | None:
    root = os.environ.get("COTERIE_STAGE_CACHE")
    return Path(root) / name / key if root else None


def _texts(comparisons: Path | None) -> dict[str, Path]:
    return {} if comparisons is None else {"comparisons": _inside(comparisons, COMPARISONS)}


def _inside(path: Path, name: str) -> Path:
    """The file itself, or the file of that name in the folder."""
    return path / name if path.is_dir() else path


def _leave_word(name: str, error: CoterieError) -> None:
    """Tell a waiting `coterie run`, which sees the exit of a component's process only, what went wrong."""
    folder = os.environ.get("COTERIE_RUN_FOLDER")
    if folder:
        word = {"stage": name, "type": type(error).__name__, "message": str(error)}
        contracts.write_text(Path(folder) / "failure.json", json.dumps(word, indent=1))


def repository() -> Path:
    """The folder that holds components/, pipelines/, serving/ and feature_repo/, which stay out of the wheel.

    Raises:
        BadConfiguration: neither COTERIE_HOME nor the checkout that the package lies in holds them.
    """
    home = Path(os.environ.get("COTERIE_HOME") or Path(__file__).parents[2])
    if not (home / "feature_repo").is_dir():
        raise BadConfiguration(
            f"{home} holds no pipelines/, serving/ and feature_repo/. Set COTERIE_HOME to a checkout of coterie; "
            "the wheel carries the library alone."
        )
    return home


def adapter(module: str) -> Any:
    """Import a module of the repository's top level, such as `pipelines.local`."""
    import importlib

    home = str(repository())
    if home not in sys.path:
        sys.path.insert(0, home)
    return importlib.import_module(module)
