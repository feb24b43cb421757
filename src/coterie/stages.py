"""The stages: path in, path out. A command, a component and a library call all end here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from coterie import contracts
from coterie.config import (
    AlignSettings,
    BundleSettings,
    ClusterSettings,
    DeploySettings,
    EmbedSettings,
    EncodeSettings,
    EvaluateSettings,
    IngestSettings,
    JointSettings,
    JudgeSettings,
    PublishSettings,
    RewardSettings,
    Settings,
)
from coterie.errors import BackendUnavailable, BadConfiguration, BadData, CoterieError
from coterie.staging import STAGE_FILE, Work, leaving_word, read_metrics, record_of, stage, versions

COMPARISONS, QUARANTINE, VECTORS = "comparisons.parquet", "quarantine.parquet", "vectors.parquet"
DIFFERENCES, EMBEDDINGS, ASSIGNMENTS = "differences.parquet", "embeddings.parquet", "assignments.parquet"


# -------------------------------------------------------------------------------------------------------------- stages
def ingest(out: Path, settings: IngestSettings) -> dict[str, Any]:
    """Read preferences into `out`/comparisons.parquet; refused rows into quarantine.parquet.

    Raises:
        BadData: nothing usable, or more refused rows than `settings.max_refused`; quarantine.parquet is then left
            beside `out`, and the message names it.
        BadConfiguration: pseudonyms are asked for and there is no key.
    """
    from coterie.ingest import ingest

    run_folder = os.environ.get("COTERIE_RUN_FOLDER")
    quarantine = (Path(run_folder) if run_folder else out.parent) / QUARANTINE

    def work(folder: Path) -> dict[str, Any]:
        return ingest(settings, folder, quarantine=quarantine)

    return stage("ingest", settings, {}, out, work, lambda: _seen(settings))


def look(settings: IngestSettings) -> dict[str, Any]:
    """`state`: a word for what the sources hold now, and for the key that people are named with.

    Raises:
        BadData, BackendUnavailable: a source is not there. BadConfiguration: there is no key.
    """
    with leaving_word("ingest"):
        return {"state": contracts.content_id(json.dumps(_seen(settings), sort_keys=True))}


def _seen(settings: IngestSettings) -> dict[str, Any]:
    from coterie.ingest.pseudonyms import fingerprint, load_key
    from coterie.ingest.state import source_state

    key = fingerprint(load_key()) if settings.pseudonyms == "keyed" else ""
    return {"sources": source_state(settings.source), "key": key}


def encode(comparisons: Path, out: Path, settings: EncodeSettings) -> dict[str, Any]:
    """One vector a unique (prompt, response) of `comparisons` into `out`/vectors.parquet."""
    from coterie.encoding import encode

    source = _inside(comparisons, COMPARISONS)
    return stage("encode", settings, {"comparisons": source}, out, lambda folder: encode(source, folder, settings))


def embed(comparisons: Path, vectors: Path, out: Path, settings: EmbedSettings) -> dict[str, Any]:
    """Worker embeddings learned jointly with the reward, and the features they were learned on."""
    from coterie.discovery import embed

    inputs = {"comparisons": _inside(comparisons, COMPARISONS), "vectors": _inside(vectors, VECTORS)}
    work: Work = lambda folder: embed(inputs["comparisons"], inputs["vectors"], folder, settings)  # noqa: E731
    return stage("embed", settings, inputs, out, work)


def joint(embedded: Path, comparisons: Path, out: Path, settings: JointSettings) -> dict[str, Any]:
    """Worker embeddings learned together with the reward on a trained backbone, in place of those of `embedded`."""
    from coterie.rewards.joint import joint

    inputs = {"embedded": embedded, "comparisons": _inside(comparisons, COMPARISONS)}
    work: Work = lambda folder: joint(embedded, inputs["comparisons"], folder, settings)  # noqa: E731
    return stage("joint", settings, inputs, out, work)


def cluster(embedded: Path, out: Path, settings: ClusterSettings, previous: Path | None = None) -> dict[str, Any]:
    """The verdict, the coteries, every worker's posterior; ids of a `previous` clustering are kept by the same people."""
    from coterie.discovery import cluster

    inputs = {"embedded": embedded} | ({} if previous is None else {"previous": previous})
    return stage("cluster", settings, inputs, out, lambda folder: cluster(embedded, folder, settings, previous))


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
    return stage("drift", Settings(), inputs, out, work)


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
    texts = {} if settings.kind == "head" else _texts(comparisons)  # linear heads do not depend on them
    inputs = {"embedded": embedded, "clustered": clustered, **texts}
    if global_reward is not None:
        inputs["global_reward"] = global_reward
    name = f"rewards/{reward_name(coterie)}"
    which: Any = contracts.GLOBAL if coterie is None else coterie

    def work(folder: Path) -> dict[str, Any]:
        return train_reward(embedded, clustered, folder, which, settings, global_reward, texts.get("comparisons"))

    return stage(name, settings, inputs, out, work)


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
    return stage("evaluate", settings, inputs, out, work)


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

    return stage("bundle", settings, inputs, out, work)


def promote(
    candidate: Path, incumbent: Path, comparisons: Path, out: Path, settings: EvaluateSettings
) -> dict[str, Any]:
    """Whether the bundle `candidate` may take the place of `incumbent`, by validation prompts of the candidate's run."""
    from coterie.promotion import compare_versions

    inputs = {"candidate": candidate, "incumbent": incumbent, **_texts(comparisons)}
    work: Work = lambda _: compare_versions(candidate, incumbent, inputs["comparisons"], settings)  # noqa: E731
    return stage("promote", settings, inputs, out, work)


def start(comparisons: Path, out: Path, settings: AlignSettings) -> dict[str, Any]:
    """The policy that all policies start from, and are held near."""
    from coterie.policies import make_start

    inputs = _texts(comparisons)
    return stage(
        "policies/start", settings, inputs, out, lambda folder: make_start(inputs["comparisons"], folder, settings)
    )


def align(
    bundle: Path, comparisons: Path, start: Path, out: Path, settings: AlignSettings, coterie: int | None = None
) -> dict[str, Any]:
    """The policy of everybody, or with `coterie` that coterie's, tuned against the reward of the bundle."""
    from coterie.policies import align

    inputs = {"bundle": bundle, "start": start, **_texts(comparisons)}
    which: Any = contracts.GLOBAL if coterie is None else coterie

    def work(folder: Path) -> dict[str, Any]:
        return align(bundle, inputs["comparisons"], start, folder, which, settings)

    return stage(f"policies/{reward_name(coterie)}", settings, inputs, out, work)


def judge(
    policies: Sequence[Path],
    bundle: Path,
    comparisons: Path,
    embedded: Path,
    clustered: Path,
    out: Path,
    settings: JudgeSettings,
    title: str = "coterie",
) -> dict[str, Any]:
    """Whose policy people prefer, by rewards that no policy was tuned on, and the gate of each; policies.html shows it."""
    from coterie.policies.judging import judge
    from coterie.report.policies import write_policies_page

    named = _named(policies, "policies", "coterie align")
    inputs = {"bundle": bundle, "embedded": embedded, "clustered": clustered, **_texts(comparisons)}

    def work(folder: Path) -> dict[str, Any]:
        judged = judge(named, bundle, inputs["comparisons"], embedded, clustered, settings)
        tuned = {name: read_metrics(path) for name, path in named.items()}
        write_policies_page(judged, tuned, folder / "policies.html", title)
        return judged

    return stage("judge", settings, inputs | named, out, work, lambda: {"title": title})


def release(bundle: Path, policies: Sequence[Path], judged: Path, out: Path) -> dict[str, Any]:
    """The bundle with the policies that serve."""
    from coterie.policies.release import bundle_policies

    named = _named(policies, "policies", "coterie align")
    inputs = {"bundle": bundle, "judged": judged, **named}
    return stage("release", Settings(), inputs, out, lambda folder: bundle_policies(bundle, named, judged, folder))


def publish(clustered: Path, out: Path, settings: PublishSettings) -> dict[str, Any]:
    """Worker profiles into Feast: the offline Parquet, and the online store.

    Always done anew: a profile carries the time of its publication, and the online store may have been emptied.
    """
    publish = adapter("feature_repo.publish").publish
    inputs = {"clustered": clustered, "definitions": repository() / "feature_repo"}
    return stage("publish", settings, inputs, out, lambda folder: publish(clustered, folder, settings), reuse=False)


def deploy(
    bundle: Path, address: str, profiles: str, out: Path, settings: DeploySettings, comparisons: Path | None = None
) -> dict[str, Any]:
    """Let a bundle serve in the release that the settings name; with the `comparisons` of its run, if it passes the gate.

    Always done: what serves there is not known before it is asked. A bundle that is not promoted is no failure.

    Args:
        bundle: folder of the bundle.
        address, profiles: where pods of the cluster find the bundle, and the published folder of its run.
    """
    deploy = adapter("serving.deploy").deploy
    texts = _texts(comparisons)

    def work(folder: Path) -> dict[str, Any]:
        made: dict[str, Any] = deploy(address, profiles, settings, texts.get("comparisons"), bundle)
        return made

    return stage("deploy", settings, {"bundle": bundle, **texts}, out, work, reuse=False)


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

    return stage("report", Settings(), stages, out, work, lambda: {"title": title})


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


def refresh(run: Path, database: str, out: Path, always: bool = False) -> dict[str, Any]:
    """Fold the feedback database into a run: posteriors always; coteries and rewards if what people want has changed.

    Has it changed, a new run is made in `out`/run, with the settings of the old one, of its sources and the feedback; it
    is taken if it passes the gate between versions. `out`/clustered is then what to publish, `serves` whose bundle to serve.

    Args:
        run: folder of the run whose bundle serves.
        database: URL of the feedback database.
        always: make the new run whether or not anything has changed.

    Raises:
        BadData: no feedback yet, or `run` is not a finished run.
    """
    from coterie.feedback.database import Database
    from coterie.feedback.refresh import fold_posteriors, newer, note_trained

    def as_in(name: str, kind: Any, **changes: Any) -> Any:
        if not (record := record_of(run / name)):
            raise BadData(f"{run / name}: not the folder of a finished stage. Give the folder of a whole run.")
        return kind.of(**record["settings"] | changes)

    ingest(out / "ingest", as_in("ingest", IngestSettings, source=[database], format="auto", columns={}))
    encode(out / "ingest", out / "encode", as_in("encode", EncodeSettings))
    changed: dict[str, Any] = {"drifted": False, "reason": "not told: no new votes of workers whom the run knows"}
    if newer(run, out / "ingest", out / "newer"):
        changed = drift(embedded_in(run), run / "cluster", out / "newer", out / "encode", out / "drift")
    decision: dict[str, Any] = {"promote": False, "reason": "no new run was made"}
    if changed["drifted"] or always:
        made, sources = out / "run", as_in("ingest", IngestSettings).source
        texts = made / "ingest"
        ingest(texts, as_in("ingest", IngestSettings, source=[*sources, database]))
        encode(texts, made / "encode", as_in("encode", EncodeSettings))
        embed(texts, made / "encode", made / "embed", as_in("embed", EmbedSettings))
        if record_of(run / "joint"):
            joint(made / "embed", texts, made / "joint", as_in("joint", JointSettings))
        embedded = embedded_in(made)
        clustered = cluster(embedded, made / "cluster", as_in("cluster", ClusterSettings), run / "cluster")
        of_reward, common = as_in("rewards/global", RewardSettings), made / "rewards" / contracts.GLOBAL
        reward(embedded, made / "cluster", common, of_reward, comparisons=texts)
        rewards = [common]
        for k in audiences(clustered):
            rewards.append(made / "rewards" / reward_name(k))
            reward(embedded, made / "cluster", rewards[-1], of_reward, k, common, texts)
        judging = as_in("evaluate", EvaluateSettings)
        evaluate(embedded, made / "cluster", rewards, made / "evaluate", judging, texts)
        folders = (texts, made / "encode", embedded, made / "cluster", rewards, made / "evaluate")
        bundle(*folders, made / "bundle", as_in("bundle", BundleSettings))
        report(*folders, made / "report")
        decision = promote(made / "bundle", run / "bundle", texts, out / "promote", judging)
    serves = out / "run" if decision["promote"] else run
    opened = Database(database)

    def work(folder: Path) -> dict[str, Any]:
        if decision["promote"]:
            return note_trained(serves, folder, opened)
        return fold_posteriors(run, out / "ingest", out / "encode", folder, opened)

    inputs = {"run": serves / "cluster", "ingested": out / "ingest", "encoded": out / "encode"}
    try:
        folded = stage("clustered", Settings(), inputs, out / "clustered", work, reuse=False)
    finally:
        opened.close()
    result = {
        **folded,
        "drifted": changed["drifted"],
        "drift": changed["reason"],
        "promoted": decision["promote"],
        "promotion": decision["reason"],
        "serves": str(serves),
    }
    contracts.write_text(out / "refresh.json", json.dumps(result, indent=1))
    return result


def forget(worker: str, database: str | None, runs: Sequence[Path]) -> dict[str, Any]:
    """Remove a worker, by the id that tables hold, from the feedback database, runs, the online store and the cache."""
    from coterie.forget import forget

    def take_offline(folder: Path, worker: str) -> bool:
        store = adapter("feature_repo.store")
        try:
            return bool(store.remove(store.open_store(folder), worker))
        except CoterieError:
            raise
        except Exception as error:  # whatever the store's backend raises
            raise BackendUnavailable(f"{folder}: the online store did not remove the profile: {error}") from error

    return forget(worker, database, runs, take_offline)


def embedded_in(run: Path) -> Path:
    """The worker embeddings of a run that cluster and the stages behind it read: joint's, where it has those."""
    return run / ("joint" if record_of(run / "joint") else "embed")


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


def policies_of(bundle: Path) -> list[int | None]:
    """Whom policies are tuned for: everybody (None), and the coteries that have a reward of their own."""
    from coterie.bundle import Bundle

    return [
        None,
        *(
            gate.coterie
            for gate in Bundle.load(bundle).manifest.gates
            if gate.serves == "own" and gate.coterie is not None
        ),
    ]


def _named_rewards(rewards: Sequence[Path]) -> dict[str, Path]:
    named = _named(rewards, "rewards", "coterie reward")
    if contracts.GLOBAL not in named:
        raise BadData("the global reward is not among the rewards; run `coterie reward` without --coterie first")
    return named


def _named(folders: Sequence[Path], kind: str, command: str) -> dict[str, Path]:
    """Name folders by what their own stage.json says they are, whatever they are called on the disk."""
    named = {}
    for path in folders:
        made_by = str(record_of(path).get("stage", ""))
        if not made_by.startswith(f"{kind}/"):
            raise BadData(f"{path}: not one of the {kind}; give the folders that `{command}` wrote")
        named[made_by.removeprefix(f"{kind}/")] = path
    return dict(sorted(named.items()))


def _texts(comparisons: Path | None) -> dict[str, Path]:
    return {} if comparisons is None else {"comparisons": _inside(comparisons, COMPARISONS)}


def _inside(path: Path, name: str) -> Path:
    """The file itself, or the file of that name in the folder."""
    return path / name if path.is_dir() else path


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
