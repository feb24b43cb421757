"""The `coterie` command. Every stage is a command, with the options that its settings name.

Exit codes: 0 done, 2 bad input or settings, 3 a failed run, 130 interrupted.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from coterie import __version__, config, stages
from coterie.contracts import RoutedInstance
from coterie.errors import BadConfiguration
from coterie.options import Group, PathOption, read_settings, settings_options
from coterie.simulation.settings import SimulationSettings
from coterie.staging import STAGE_FILE, read_metrics

if TYPE_CHECKING:
    from coterie.person import Person


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--verbose", "-v", is_flag=True, help="say more")
def main(verbose: bool) -> None:
    """Find the groups of annotators who agree with each other, and give each group its own reward."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    logging.getLogger("coterie").setLevel(logging.DEBUG if verbose else logging.INFO)


# ----------------------------------------------------------------------------------------------------------- the whole
@main.command()
@click.argument("recipe", type=PathOption)
@click.option("--set", "overrides", multiple=True, metavar="STAGE.FIELD=VALUE", help="override a setting of the recipe")
@click.option("--out", type=PathOption, required=True, help="folder of the run")
def run(recipe: Path, overrides: tuple[str, ...], out: Path) -> None:
    """All stages of RECIPE, as a Kubeflow pipeline in this process; results in OUT, a folder a stage."""
    settings = config.load_recipe(recipe, overrides)
    stages.adapter("pipelines.local").run(settings, out)
    from coterie.summary import closing_words

    click.echo(closing_words(out))


@main.command()
@click.option("--out", type=PathOption, required=True)
@settings_options(SimulationSettings)
def simulate(out: Path, **values: Any) -> None:
    """Annotators with known tastes over made-up texts: OUT/preferences.jsonl and OUT/truth.json."""
    from coterie.simulation import write_simulation

    written = write_simulation(read_settings(SimulationSettings, values), out)
    click.echo(
        f"{written['comparisons']:,} comparisons of {written['workers']:,} annotators in {out}/preferences.jsonl"
    )


# ------------------------------------------------------------------------------------------------------------ the stages
@main.command()
@click.argument("source", nargs=-1, required=True)
@click.option("--out", type=PathOption, required=True)
@settings_options(config.IngestSettings, "source")
def ingest(source: tuple[str, ...], out: Path, **values: Any) -> None:
    """Preferences with worker ids from SOURCE... into OUT/comparisons.parquet; refused rows into quarantine.parquet."""
    from coterie.ingest import data_report_markdown

    settings = read_settings(config.IngestSettings, values).model_copy(update={"source": list(source)})
    click.echo(data_report_markdown(stages.ingest(out, settings)))


@main.command()
@click.option("--comparisons", type=PathOption, required=True, help="comparisons.parquet, or the folder of ingest")
@click.option("--out", type=PathOption, required=True)
@settings_options(config.EncodeSettings)
def encode(comparisons: Path, out: Path, **values: Any) -> None:
    """One vector a unique response of the comparisons."""
    _echo(stages.encode(comparisons, out, read_settings(config.EncodeSettings, values)))


@main.command()
@click.option("--comparisons", type=PathOption, required=True, help="comparisons.parquet, or the folder of ingest")
@click.option("--vectors", type=PathOption, required=True, help="folder of encode")
@click.option("--out", type=PathOption, required=True)
@settings_options(config.EmbedSettings)
def embed(comparisons: Path, vectors: Path, out: Path, **values: Any) -> None:
    """Worker embeddings, learned jointly with the reward."""
    _echo(stages.embed(comparisons, vectors, out, read_settings(config.EmbedSettings, values)))


@main.command()
@click.option("--embedded", type=PathOption, required=True, help="folder of embed, whose solution it starts from")
@click.option("--comparisons", type=PathOption, required=True, help="comparisons.parquet, or the folder of ingest")
@click.option("--out", type=PathOption, required=True, help="is to the stages behind what the folder of embed is")
@settings_options(config.JointSettings, "enabled")
def joint(embedded: Path, comparisons: Path, out: Path, **values: Any) -> None:
    """Worker embeddings learned with the reward on a trained backbone."""
    _echo(stages.joint(embedded, comparisons, out, read_settings(config.JointSettings, values)))


@main.command()
@click.option("--embedded", type=PathOption, required=True, help="folder of embed")
@click.option(
    "--previous", type=PathOption, help="folder of an earlier cluster; the same people keep their coterie's id"
)
@click.option("--out", type=PathOption, required=True)
@settings_options(config.ClusterSettings)
def cluster(embedded: Path, previous: Path | None, out: Path, **values: Any) -> None:
    """The verdict, the coteries, and every worker's posterior."""
    _echo(stages.cluster(embedded, out, read_settings(config.ClusterSettings, values), previous))


@main.command()
@click.option("--embedded", type=PathOption, required=True, help="folder of embed of the earlier run")
@click.option("--clustered", type=PathOption, required=True, help="folder of cluster of the earlier run")
@click.option(
    "--comparisons", type=PathOption, required=True, help="newer comparisons.parquet, or the folder of ingest"
)
@click.option("--vectors", type=PathOption, required=True, help="folder of encode of the newer comparisons")
@click.option("--out", type=PathOption, required=True)
def drift(embedded: Path, clustered: Path, comparisons: Path, vectors: Path, out: Path) -> None:
    """Whether what people want has changed, by newer comparisons of the same workers."""
    _echo(stages.drift(embedded, clustered, comparisons, vectors, out))


@main.command()
@click.option("--clustered", type=PathOption, required=True, help="folder of cluster")
@click.option("--out", type=PathOption, required=True)
@settings_options(config.PublishSettings)
def publish(clustered: Path, out: Path, **values: Any) -> None:
    """Worker profiles into Feast."""
    _echo(stages.publish(clustered, out, read_settings(config.PublishSettings, values)))


@main.command()
@click.option("--embedded", type=PathOption, required=True, help="folder of embed")
@click.option("--clustered", type=PathOption, required=True, help="folder of cluster")
@click.option("--comparisons", type=PathOption, help="for adapters: comparisons.parquet, or the folder of ingest")
@click.option("--coterie", type=int, help="only this coterie; the global reward must be in OUT/global already")
@click.option("--out", type=PathOption, required=True, help="a folder a reward is made in it")
@settings_options(config.RewardSettings)
def reward(
    embedded: Path, clustered: Path, comparisons: Path | None, coterie: int | None, out: Path, **values: Any
) -> None:
    """The global reward and one a coterie, into OUT/global, OUT/coterie-0 ..."""
    settings = read_settings(config.RewardSettings, values)
    common = out / stages.reward_name(None)
    if coterie is None:
        _echo(stages.reward(embedded, clustered, common, settings, comparisons=comparisons))
    wanted = stages.audiences(read_metrics(clustered)) if coterie is None else [coterie]
    for k in wanted:
        folder = out / stages.reward_name(k)
        _echo(stages.reward(embedded, clustered, folder, settings, k, common, comparisons))


@main.command()
@click.option("--embedded", type=PathOption, required=True, help="folder of embed")
@click.option("--clustered", type=PathOption, required=True, help="folder of cluster")
@click.option("--rewards", type=PathOption, required=True, help="folder of the rewards")
@click.option("--comparisons", type=PathOption, help="for adapters: comparisons.parquet, or the folder of ingest")
@click.option("--out", type=PathOption, required=True)
@settings_options(config.EvaluateSettings)
def evaluate(
    embedded: Path, clustered: Path, rewards: Path, comparisons: Path | None, out: Path, **values: Any
) -> None:
    """Own against global against wrong coterie on test prompts; the gate on validation prompts."""
    settings = read_settings(config.EvaluateSettings, values)
    _echo(stages.evaluate(embedded, clustered, _made_in(rewards), out, settings, comparisons))


@main.command()
@click.argument("folder", type=PathOption)
@click.option("--out", type=PathOption, help="default: FOLDER/bundle")
@settings_options(config.BundleSettings)
def bundle(folder: Path, out: Path | None, **values: Any) -> None:
    """One checksummed artifact of everything that serves, from the stage folders in FOLDER."""
    settings = read_settings(config.BundleSettings, values)
    _echo(stages.bundle(**_stage_folders(folder), out=out or folder / "bundle", settings=settings))


@main.command()
@click.argument("bundle", type=PathOption)
@click.option("--comparisons", type=PathOption, required=True, help="comparisons.parquet, or the folder of ingest")
@click.option("--coterie", type=int, help="only this coterie; OUT/start must be there already")
@click.option("--out", type=PathOption, required=True, help="a folder a policy is made in it")
@settings_options(config.AlignSettings)
def align(bundle: Path, comparisons: Path, coterie: int | None, out: Path, **values: Any) -> None:
    """The shared start, a policy for everybody and one a coterie of BUNDLE, into OUT/start, OUT/global, OUT/coterie-0 ..."""
    settings = read_settings(config.AlignSettings, values)
    start = out / "start"
    if coterie is None:
        _echo(stages.start(comparisons, start, settings))
    for k in stages.policies_of(bundle) if coterie is None else [coterie]:
        _echo(stages.align(bundle, comparisons, start, out / stages.reward_name(k), settings, k))


@main.command()
@click.argument("bundle", type=PathOption)
@click.option("--policies", type=PathOption, required=True, help="folder of the policies")
@click.option("--comparisons", type=PathOption, required=True, help="comparisons.parquet, or the folder of ingest")
@click.option("--embedded", type=PathOption, required=True, help="folder of embed")
@click.option("--clustered", type=PathOption, required=True, help="folder of cluster")
@click.option("--out", type=PathOption, required=True)
@click.option("--title", default="coterie", show_default=True, help="of policies.html")
@settings_options(config.JudgeSettings)
def judge(
    bundle: Path,
    policies: Path,
    comparisons: Path,
    embedded: Path,
    clustered: Path,
    out: Path,
    title: str,
    **values: Any,
) -> None:
    """Whose policy people prefer: own against start, global and wrong, by rewards that no policy was tuned on."""
    settings = read_settings(config.JudgeSettings, values)
    _echo(stages.judge(_made_in(policies), bundle, comparisons, embedded, clustered, out, settings, title))


@main.command()
@click.argument("bundle", type=PathOption)
@click.option("--policies", type=PathOption, required=True, help="folder of the policies")
@click.option("--judged", type=PathOption, required=True, help="folder of judge")
@click.option("--out", type=PathOption, required=True)
def release(bundle: Path, policies: Path, judged: Path, out: Path) -> None:
    """BUNDLE with the policies that serve."""
    _echo(stages.release(bundle, _made_in(policies), judged, out))


@main.command()
@click.argument("candidate", type=PathOption)
@click.option("--incumbent", type=PathOption, required=True, help="the bundle that serves now")
@click.option(
    "--comparisons",
    type=PathOption,
    required=True,
    help="comparisons.parquet of the candidate's run, or the folder of ingest",
)
@click.option("--out", type=PathOption, required=True)
@settings_options(config.EvaluateSettings)
def promote(candidate: Path, incumbent: Path, comparisons: Path, out: Path, **values: Any) -> None:
    """Whether the bundle CANDIDATE may take the incumbent's place; ends with status 1 where it may not."""
    decision = stages.promote(candidate, incumbent, comparisons, out, read_settings(config.EvaluateSettings, values))
    _echo(decision)
    click.get_current_context().exit(0 if decision["promote"] else 1)


@main.command()
@click.argument("folder", type=PathOption)
@click.option("--out", type=PathOption, help="default: FOLDER/report")
@click.option("--title", default="coterie", show_default=True)
def report(folder: Path, out: Path | None, title: str) -> None:
    """report.html and metrics.json from the stage folders in FOLDER."""
    target = out or folder / "report"
    stages.report(**_stage_folders(folder), out=target, title=title)
    click.echo(target / "report.html")


@main.command()
@click.argument("source", nargs=-1, required=True)
@click.option("--out", type=PathOption, required=True)
@click.option(
    "--worthwhile",
    default=0.005,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="held-out gain, in nats a comparison, from which rewards of several tastes would be worth their cost",
)
@settings_options(config.IngestSettings, "source")
@settings_options(config.EncodeSettings)
def assess(source: tuple[str, ...], out: Path, worthwhile: float, **values: Any) -> None:
    """What SOURCE... could show before any GPU is used: the verdict, the power, how many more comparisons settle it."""
    of_encode = {name: values.pop(name) for name in config.EncodeSettings.model_fields}
    ingest_settings = read_settings(config.IngestSettings, values).model_copy(update={"source": list(source)})
    click.echo(stages.assess(out, ingest_settings, read_settings(config.EncodeSettings, of_encode), worthwhile))


# ----------------------------------------------------------------------------------------------------------- feedback
def of_feedback(command: Any) -> Any:
    """Add the option that names the feedback database."""
    text = "URL of the feedback database"
    return click.option("--database", envvar="COTERIE_FEEDBACK_DATABASE", show_envvar=True, help=text)(command)


def _database(url: str | None) -> str:
    if url is None:
        raise BadConfiguration("no feedback database: give --database, or set COTERIE_FEEDBACK_DATABASE")
    return url


@main.command()
@click.argument("run", type=PathOption)
@of_feedback
@click.option("--always", is_flag=True, help="make a new run whether or not what people want has changed")
@click.option("--out", type=PathOption, required=True)
def refresh(run: Path, database: str | None, always: bool, out: Path) -> None:
    """Fold feedback into RUN: posteriors always; coteries and rewards, through the gate, if what people want has changed."""
    _echo(stages.refresh(run, _database(database), out, always))


@main.command()
@of_feedback
@settings_options(config.EvaluateSettings)
def uplift(database: str | None, **values: Any) -> None:
    """What people's own rewards gain over the global one in agreement with feedback, by the requests held out."""
    from coterie.uplift import uplift

    _echo(uplift(_database(database), **read_settings(config.EvaluateSettings, values).model_dump()))


@main.command()
@click.argument("worker")
@of_feedback
@click.option("--run", "runs", type=PathOption, multiple=True, help="folder of a run, or of a single stage")
@click.option("--pseudonym", is_flag=True, help="WORKER is the id as tables hold it")
def forget(worker: str, database: str | None, runs: tuple[Path, ...], pseudonym: bool) -> None:
    """Remove a person from the feedback database, runs, the online store and the cache; say what was removed."""
    from coterie.ingest.pseudonyms import load_key
    from coterie.ingest.pseudonyms import pseudonym as named

    _echo(stages.forget(worker if pseudonym else named(load_key(), worker), database, runs))


# ------------------------------------------------------------------------------------------------------------- the bundle
def of_a_person(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that tell who asks a bundle; the command gets a person.Person as `person`."""

    @functools.wraps(command)
    def told(
        worker: str | None, pseudonym: str | None, posterior: str | None, examples: Path | None, **values: Any
    ) -> Any:
        from coterie.person import Person

        return command(person=Person(worker, pseudonym, posterior, examples), **values)

    for option in (
        click.option("--profiles", type=PathOption, help="folder of publish; default: beside the bundle"),
        click.option("--examples", type=PathOption, help="comparisons of a new person, line JSON, instead of --worker"),
        click.option("--posterior", help="probabilities of the coteries, as in 0.2,0.8, instead of --worker"),
        click.option("--pseudonym", help="worker id as the profiles hold it, instead of --worker"),
        click.option("--worker", help="worker id as the application knows it"),
        click.argument("bundle", type=PathOption),
    ):
        told = option(told)
    return told


@main.command()
@of_a_person
@click.option("--prompt", required=True)
@click.option("--response", "responses", multiple=True, required=True, help="once for every candidate")
@click.option("--json", "as_json", is_flag=True, help="print the prediction as JSON")
def score(
    bundle: Path, person: Person, profiles: Path | None, prompt: str, responses: tuple[str, ...], as_json: bool
) -> None:
    """Score responses for a person by the reward of their coterie; a stranger by the global one."""
    from coterie.answers import Asked, answer
    from coterie.bundle import Bundle
    from coterie.scoring import load_scorer

    loaded = Bundle.load(bundle)
    scorer = functools.cache(lambda: load_scorer(loaded))
    taken = person.route(loaded, profiles or bundle.parent / "publish", scorer)
    asked = Asked(RoutedInstance(prompt=prompt, responses=list(responses), routes=[taken]))
    [prediction] = answer(scorer(), [asked])
    if as_json:
        click.echo(prediction.model_dump_json())
        return
    whose = "the global reward" if prediction.source == "global" else f"coterie {prediction.coterie}"
    click.echo(f"scored by {whose}" + (f" ({prediction.reason})" if prediction.reason else ""))
    for i, (value, text) in enumerate(zip(prediction.scores, responses, strict=True)):
        click.echo(f"{'->' if i == prediction.best else '  '} {value:+.3f}  {text[:90]}")


@main.command()
@of_a_person
@click.option("--prompt", required=True)
@click.option("--answers", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0), help="0: the likeliest words")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def generate(
    bundle: Path, person: Person, profiles: Path | None, prompt: str, answers: int, max_tokens: int,
    temperature: float, seed: int,
) -> None:  # fmt: skip
    """Answer a prompt with the policy of a person's coterie; a stranger with that of everybody."""
    from coterie.bundle import Bundle
    from coterie.policies.release import load_policy
    from coterie.scoring import load_scorer

    loaded = Bundle.load(bundle)
    taken = person.route(loaded, profiles or bundle.parent / "publish", lambda: load_scorer(loaded))
    name, policy = load_policy(loaded, taken.coterie)
    click.echo(f"answered by the policy {name}" + (f" ({taken.reason})" if taken.reason else ""), err=True)
    [texts] = policy.generate([prompt], answers, max_tokens, temperature, seed)
    for answer in texts:
        click.echo(answer.text + ("" if answer.finished else " …"))


@main.command()
@click.argument("bundle", type=PathOption)
@click.option("--profiles", type=PathOption, help="folder of publish; default: beside the bundle")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
@click.option("--grpc-port", type=click.IntRange(1, 65535), help="also serve gRPC here")
@click.option("--feedback/--no-feedback", default=True, show_default=True, help="take feedback")
@settings_options(config.ServeSettings)
@settings_options(config.FeedbackSettings)
def serve(
    bundle: Path, profiles: Path | None, host: str, port: int, grpc_port: int | None, feedback: bool, **values: Any
) -> None:
    """A KServe model server with router and predictor on this machine."""
    told = {name: values.pop(name) for name in config.FeedbackSettings.model_fields}
    of_feedback = read_settings(config.FeedbackSettings, told) if feedback else None
    settings = read_settings(config.ServeSettings, values)
    server = stages.adapter("serving.server")
    server.serve(bundle, profiles or bundle.parent / "publish", port, host, grpc_port, settings, of_feedback)


def _made_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{STAGE_FILE}"))


def _stage_folders(folder: Path) -> dict[str, Any]:
    names = {
        "ingested": "ingest",
        "encoded": "encode",
        "clustered": "cluster",
        "evaluated": "evaluate",
    }
    folders = {key: folder / name for key, name in names.items()}
    return folders | {"embedded": stages.embedded_in(folder), "rewards": _made_in(folder / "rewards")}


def _echo(metrics: dict[str, Any]) -> None:
    click.echo(orjson.dumps(metrics, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode())


if __name__ == "__main__":
    main()
