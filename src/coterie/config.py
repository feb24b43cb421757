"""Settings of every stage, and the recipe that names one run.

The fields here are the command line's options, the components' parameters and the recipe's keys: one name, one default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coterie.errors import BadConfiguration

Format = Literal["auto", "openai", "trl", "prism", "table", "coterie"]


class Settings(BaseModel):
    """Base of every stage's settings: frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: ClassVar[str | None] = None
    """Prefix of the environment variables that give these settings; None where none do."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make the settings of `values`. Raises BadConfiguration in words."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadConfiguration(in_words(cls.__name__.removesuffix("Settings").lower(), error)) from error


class IngestSettings(Settings):
    """From raw preferences to comparisons."""

    source: list[str] = Field(
        default=["simulated://groups"],
        description="files, globs, s3://, hf://, sqlite:// or postgresql:// (the feedback database), or "
        "simulated://SETTING?workers=..&seed=..",
    )
    format: Format = Field(default="auto", description="the sources' format; auto looks")
    columns: dict[str, str] = Field(
        default={}, description="for tables: our column = theirs, as in worker_id=annotator"
    )
    pseudonyms: Literal["keyed", "none"] = Field(
        default="keyed", description="keyed: HMAC-SHA-256 of the worker ids; none: keep them as they are"
    )
    max_refused: float = Field(
        default=0.05, ge=0, le=1, description="largest share of refused rows before the run fails"
    )
    validation_share: float = Field(default=0.15, gt=0, lt=0.5, description="share of prompts that gates are judged on")
    test_share: float = Field(default=0.2, gt=0, lt=0.5, description="share of prompts that only reports see")
    seed: int = Field(default=0, ge=0, description="decides which prompts are held out")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class EncodeSettings(Settings):
    """From texts to vectors."""

    encoder: str = Field(
        default="minilm",
        description="minilm, a sentence-transformers model, or last-token:MODEL for any transformers causal or reward model",
    )
    revision: str = Field(default="main", description="the model's revision on the hub; a local folder has none")
    max_tokens: int = Field(default=256, ge=8, description="longer texts are cut, and counted")
    batch_size: int = Field(default=32, ge=1)
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    precision: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on a GPU")


class EmbedSettings(Settings):
    """Worker embeddings, learned jointly with the reward."""

    components: int = Field(default=32, ge=1, description="principal components kept of the encoder's vector")
    style: bool = Field(default=True, description="put the readable style features beside them")
    rank: Literal["auto"] | int = Field(default="auto", description="directions of taste; auto: held-out likelihood")
    max_rank: int = Field(default=4, ge=1, description="largest rank that auto tries")
    splits: int = Field(default=3, ge=1, description="item-disjoint splits inside the training prompts")
    seed: int = Field(default=0, ge=0)


FEWEST_REPLICATES = 20
"""Draws of which a test of level .05 can reject anything."""


class ClusterSettings(Settings):
    """Coteries of workers, and the verdict."""

    coteries: Literal["auto"] | int = Field(default="auto", description="number of coteries; auto: held-out likelihood")
    max_coteries: int = Field(default=8, ge=1, description="largest number that auto tries")
    min_workers: int = Field(default=5, ge=0, description="workers with training votes that a coterie has at least")
    method: Literal["mixture", "kmeans", "ward", "average"] = Field(
        default="mixture", description="mixture, or clustering of the worker embeddings"
    )
    ship: Literal["auto", "one-reward", "embedding", "coteries"] = Field(
        default="auto", description="what is served; auto: what the verdict says"
    )
    replicates: int = Field(
        default=59,
        ge=0,
        description="data sets that the test of differing tastes draws at most, 20 or more; 0: no test",
    )
    splits: int = Field(default=3, ge=1, description="item-disjoint splits inside the training prompts")
    seed: int = Field(default=0, ge=0)

    @field_validator("replicates")
    @classmethod
    def _may_reject(cls, value: int) -> int:
        if 0 < value < FEWEST_REPLICATES:
            raise ValueError(
                f"the smallest p-value of {value} draws is {1 / (value + 1):.2g}, and one taste would always be found: draw "
                f"{FEWEST_REPLICATES} or more, or 0 for no test"
            )
        return value


class AdapterSettings(Settings):
    """LoRA on a backbone, trained on comparisons."""

    backbone: str = Field(
        default="smollm2",
        description="adapters: smollm2, or a transformers model that AutoModelForSequenceClassification loads",
    )
    revision: str = Field(default="main", description="of the backbone on the hub; a local folder has none")
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, description="of the adapters, with a linear decay to zero")
    epochs: float = Field(default=1.0, gt=0, description="over the training comparisons")
    max_steps: int = Field(default=0, ge=0, description="optimiser steps at most; 0: as many as the epochs have")
    batch_size: int = Field(default=8, ge=1, description="comparisons of a forward pass, on each GPU")
    accumulation: int = Field(default=1, ge=1, description="forward passes of an optimiser step")
    max_tokens: int = Field(
        default=512, ge=16, description="comparisons with a longer side are not trained on, and counted"
    )
    pull: float = Field(
        default=1.0,
        ge=0,
        description="precision of the prior around what training starts from: for a coterie the global adapter",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU; on a CPU scores are read in float32 whatever it says"
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    checkpoint_steps: int = Field(default=100, ge=1, description="optimiser steps between two checkpoints")
    seed: int = Field(default=0, ge=0)


class JointSettings(AdapterSettings):
    """Worker embeddings learned on a trained backbone, with the reward and in place of those of embed."""

    enabled: bool = Field(default=False, description="whether a run does it; it wants a GPU")


class RewardSettings(AdapterSettings):
    """Rewards: a global one, and one a coterie pulled towards it."""

    kind: Literal["head", "adapter", "adapter-head"] = Field(
        default="head",
        description="head: linear, on the encoder's features; beside these adapter: LoRA and a head on the backbone; "
        "adapter-head: LoRA of everybody, and a head a coterie on its hidden state",
    )
    precision: Literal["auto"] | float = Field(
        default="auto", description="heads: precision of the prior around the global head; auto: validation log-loss"
    )
    nodes: int = Field(
        default=1, ge=1, description="that share the training of an adapter; several: a TrainJob on a cluster"
    )


class AlignSettings(Settings):
    """A policy for everybody and one a coterie, tuned against their rewards."""

    method: Literal["none", "ppo", "grpo", "rloo"] = Field(default="none", description="none: no policies are made")
    backbone: str = Field(default="smollm2", description="smollm2, or a transformers causal model with a tokenizer")
    revision: str = Field(default="main", description="of the backbone on the hub; a local folder has none")
    sft_steps: int = Field(
        default=0,
        ge=0,
        description="steps of supervised fine-tuning on chosen responses that the shared start gets first",
    )
    steps: int = Field(default=60, ge=1, description="updates of the policy")
    batch_size: int = Field(default=16, ge=2, description="responses sampled for an update, on each GPU")
    group: int = Field(default=4, ge=2, description="grpo and rloo: responses to one prompt that are compared")
    response_tokens: int = Field(default=48, ge=4, description="longest response; an unfinished one earns the least")
    prompt_tokens: int = Field(default=256, ge=8, description="prompts with more are left out, and counted")
    temperature: float = Field(default=0.9, gt=0, description="of sampling")
    learning_rate: float = Field(default=3e-5, gt=0)
    kl_coefficient: float = Field(default=0.05, ge=0, description="price of a nat of divergence from the shared start")
    kl_limit: float = Field(default=10.0, gt=0, description="nats a response at which training stops early")
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on a GPU")
    device: str = Field(default="auto", description="auto, cpu or cuda")
    seed: int = Field(default=0, ge=0)


class JudgeSettings(Settings):
    """Which policy people prefer: win rates, by rewards of data that no policy was tuned on."""

    prompts: int = Field(default=200, ge=8, description="test prompts that every policy answers")
    best_of: int = Field(default=16, ge=1, description="responses of the start among which a reward chooses; 1: none")
    length_tolerance: float = Field(
        default=0.1, ge=0, lt=1, description="two answers are of equal length within this share of the longer one"
    )
    replicates: int = Field(default=1000, ge=100, description="bootstrap replicates over people and prompts")
    level: float = Field(default=0.95, gt=0.5, lt=1, description="confidence level of the intervals")
    seed: int = Field(default=0, ge=0)


class EvaluateSettings(Settings):
    """Held-out quality, with intervals, and the gate."""

    replicates: int = Field(default=1000, ge=100, description="bootstrap replicates over workers and prompts")
    level: float = Field(default=0.95, gt=0.5, lt=1, description="confidence level of the intervals")
    seed: int = Field(default=0, ge=0)


class BundleSettings(Settings):
    """The served artifact."""

    name: str = Field(
        default="coterie", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="name of the model"
    )
    reference: int = Field(default=512, ge=32, description="responses that rewards are centred and scaled on")


class PublishSettings(Settings):
    """Worker profiles in Feast."""

    project: str = Field(default="coterie", pattern=r"^[a-z][a-z0-9_]*$", description="Feast project")
    online_store: Literal["sqlite", "redis"] = Field(
        default="sqlite", description="sqlite: a file beside the profiles; redis: the server that COTERIE_REDIS names"
    )


class DeploySettings(Settings):
    """Which release of the chart a bundle is deployed to."""

    namespace: str = Field(
        default="",
        pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$",
        description="that the chart is installed in; empty: nothing is deployed",
    )
    release: str = Field(
        default="coterie", pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$", description="name of the Helm release there"
    )
    timeout: int = Field(default=900, ge=1, description="seconds that a rollout may take before it is undone")


class ServeSettings(Settings):
    """Router and predictor; each setting is also an environment variable, as in COTERIE_PROFILE_DEADLINE_MS."""

    environment: ClassVar[str | None] = "COTERIE_"

    profile_deadline_ms: float = Field(
        default=25, gt=0, le=60_000, description="how long a lookup of profiles may take before a cached one serves"
    )
    profile_max_age_days: float = Field(default=90, gt=0, le=36_500, description="age past which a profile is stale")
    cache_seconds: float = Field(default=10, ge=0, description="how long a profile is not looked up again")
    cache_workers: int = Field(default=100_000, ge=1, description="workers whose profiles are kept at most")
    profile_failures: int = Field(
        default=5, ge=1, description="lookups that fail in a row until the store is left alone for a while"
    )
    profile_pause_seconds: float = Field(default=2, gt=0, description="how long it is left alone")
    batch_texts: int = Field(default=128, ge=1, description="texts that are scored together at most")
    batch_wait_ms: float = Field(
        default=5, ge=0, description="how long a batch waits for as many requests as the last one had"
    )
    queue_texts: int = Field(default=4096, ge=1, description="texts that may wait; a request past them gets 429")
    request_seconds: float = Field(default=30, gt=0, description="a request that takes longer gets 504")
    max_body_mb: float = Field(default=16, gt=0, description="a larger body gets 413; in MiB")
    grace_seconds: int = Field(default=30, ge=0, description="what is in flight has this long to end after SIGTERM")
    policies: str = Field(
        default="", description="an OpenAI-compatible server that holds the bundle's policies, as in http://host:port"
    )
    log_texts: bool = Field(default=False, description="log what people send, which may be private")


class FeedbackSettings(Settings):
    """What people say of what was served, and what becomes of it; also environment variables, as COTERIE_FEEDBACK_DATABASE."""

    environment: ClassVar[str | None] = "COTERIE_FEEDBACK_"

    database: str = Field(
        default="sqlite:///feedback.db",
        description="sqlite:///FILE, or postgresql+psycopg://HOST/NAME for several routers",
    )
    daily_cap: int = Field(
        default=200, ge=1, description="comparisons of a worker that count in a day; more are stored and do not count"
    )
    holdout: float = Field(
        default=0.0, ge=0, le=0.5, description="share of requests that the global reward answers, for comparison's sake"
    )
    most_waiting: int = Field(default=20_000, ge=1, description="comparisons that wait to be stored before 429 is said")


class Recipe(Settings):
    """One run: the settings of every stage."""

    name: str = Field(default="coterie", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    title: str = "coterie"
    ingest: IngestSettings = IngestSettings()
    encode: EncodeSettings = EncodeSettings()
    embed: EmbedSettings = EmbedSettings()
    joint: JointSettings = JointSettings()
    cluster: ClusterSettings = ClusterSettings()
    reward: RewardSettings = RewardSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    bundle: BundleSettings = BundleSettings()
    align: AlignSettings = AlignSettings()
    judge: JudgeSettings = JudgeSettings()
    publish: PublishSettings = PublishSettings()
    deploy: DeploySettings = DeploySettings()

    def arguments(self) -> dict[str, Any]:
        """The pipeline's parameters: `<stage>_<field>` for every field of every stage that differs from its default."""
        return {
            f"{stage}_{field}": value
            for stage, settings in self
            if isinstance(settings, Settings)
            for field, value in settings.model_dump(exclude_defaults=True).items()
        }


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `stage.field=value` (the value is YAML).

    Raises:
        BadConfiguration: no such file, not YAML, an unknown key, or a value out of range; named with its place.
    """
    where = Path(path)
    if not where.is_file():
        raise BadConfiguration(f"{where}: no such recipe. Recipes that come with coterie lie in recipes/.")
    try:
        tree = yaml.safe_load(where.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{where}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise BadConfiguration(f"{where}: a recipe is a mapping of stage to settings, not a {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe(**tree)
    except ValidationError as error:
        raise BadConfiguration(in_words(str(where), error)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise BadConfiguration(f"--set {override}: write it as stage.field=value, for example cluster.coteries=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadConfiguration(f"--set {override}: the value is not YAML: {error}") from error
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise BadConfiguration(f"--set {override}: {part} is a value, not a section")
    node[parts[-1]] = value


def in_words(where: str, error: ValidationError) -> str:
    """What is wrong with the settings of `where`, in one line."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "settings"
        hint = "there is no such setting" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        shown = "" if problem["type"] in {"extra_forbidden", "missing"} else f" (it is {problem['input']!r})"
        lines.append(f"{place}: {hint}{shown}")
    return f"{where}: " + "; ".join(dict.fromkeys(lines))
