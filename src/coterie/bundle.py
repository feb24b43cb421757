"""The bundle: everything that serves, as one versioned folder whose every file has its sum in manifest.json."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.compute as pc

from coterie import __version__
from coterie.config import BundleSettings
from coterie.contracts import (
    ADAPTER_FILE,
    COMPARISON,
    EMBEDDING_REWARD,
    FEATURES_FILE,
    GLOBAL,
    HEAD_FILE,
    MIXTURE_FILE,
    MODEL_FILE,
    PERSONAL_FILE,
    SCORES_FILE,
    STATES_FILE,
    TEST,
    VECTOR,
    BaseModelReference,
    Gate,
    Manifest,
    Ships,
    matrix,
    replacing,
    write_text,
)
from coterie.discovery.features import FeatureMap
from coterie.errors import BadBundle, BadData
from coterie.manifest import GOLDEN_FILE, MANIFEST_FILE, RECORDS, check_sums, files_of, read_manifest, sha256
from coterie.rewards import PersonalHead, RewardHead, serving_own
from coterie.rewards.scored import ScoredResponses, States, has_adapter

REFERENCE_FILE, CARD_FILE = "reference.safetensors", "README.md"
_NOT_SERVED = {*RECORDS, HEAD_FILE, SCORES_FILE, STATES_FILE}  # of a reward's folder: the head is written anew, centred
_GOLDEN_PROMPTS = 8
_SERVED: dict[Ships, str] = {
    "one-reward": "one reward for everybody",
    "embedding": "each person by their own place among the tastes",
    "coteries": "each person by the rewards of their coteries",
}


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        path: its folder.
        manifest: what it is.
        features: from vectors and style to h.
        heads: rewards by name, `global`, `coterie-0` ...
        golden: texts with the scores that they had when the bundle was made.
        personal: everybody's own reward by their embedding, where the bundle ships that; else None.
        adapters: folders of the reward adapters by name, `global` and the coteries' that serve their own; none where
            linear heads serve.
    """

    path: Path
    manifest: Manifest
    features: FeatureMap
    heads: dict[str, RewardHead]
    golden: list[dict[str, Any]]
    personal: PersonalHead | None = None
    adapters: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, verify: bool = True) -> Self:
        """Read the bundle in folder `path`; with `verify`, check the sum of every file first.

        Raises:
            BadBundle: not a bundle, of a newer schema, or with files that are missing, changed or not in the manifest.
        """
        manifest = read_manifest(path)
        if verify:
            check_sums(path, manifest)
        try:
            heads = {file.parent.name: RewardHead.load(file) for file in sorted(path.glob(f"rewards/*/{HEAD_FILE}"))}
            features = FeatureMap.load(path / FEATURES_FILE)
            golden = json.loads((path / GOLDEN_FILE).read_text(encoding="utf-8"))
            personal = None
            if manifest.ships == EMBEDDING_REWARD:
                personal = PersonalHead.load(path / "rewards" / EMBEDDING_REWARD)
        except (BadData, OSError, ValueError) as error:
            raise BadBundle(f"{path}: {error}") from error
        own = {gate.coterie for gate in manifest.gates if gate.serves == "own" and gate.coterie is not None}
        wanted = {GLOBAL} | {f"coterie-{k}" for k in own}
        adapters = {file.parent.name: file.parent for file in sorted(path.glob(f"rewards/*/{ADAPTER_FILE}"))}
        if missing := wanted - (adapters if manifest.reward == "adapter" else heads).keys():
            raise BadBundle(
                f"{path}: the manifest serves {', '.join(sorted(missing))}, which is not there. Make it again."
            )
        if not any(model.role == "encoder" for model in manifest.base_models):
            raise BadBundle(f"{path / MANIFEST_FILE}: names no encoder. Fetch or make the bundle again.")
        return cls(path, manifest, features, heads, golden, personal, adapters)

    @property
    def encoder(self) -> BaseModelReference:
        """The encoder that the features were learned on."""
        return next(model for model in self.manifest.base_models if model.role == "encoder")

    @property
    def max_tokens(self) -> int:
        """Where that encoder cut its texts."""
        return int(self.manifest.metrics["encoder_max_tokens"])


def build_bundle(
    *,
    ingested: Path,
    encoded: Path,
    embedded: Path,
    clustered: Path,
    rewards: Mapping[str, Path],
    evaluated: Path,
    out: Path,
    settings: BundleSettings,
) -> dict[str, Any]:
    """Write a bundle into the folder `out` from the folders of the stages; `rewards` by name.

    The same inputs make the same bytes. Rewards are centred on a reference set of responses that travels with them.

    Returns:
        model_version, mixture_version, the number of files and their bytes.

    Raises:
        BadData: a stage's file is missing or is something else.
    """
    selection, evaluation, discovery = (_json(folder / "metrics.json") for folder in (clustered, evaluated, embedded))
    encoder = VECTOR.metadata(encoded / "vectors.parquet")
    features = FeatureMap.load(embedded / FEATURES_FILE)
    table = VECTOR.read(encoded / "vectors.parquet")
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(table), min(settings.reference, len(table)), replace=False))
    part = table.take(rows)
    reference = features.transform(matrix(part["vector"]), matrix(part["style"]))
    heads = {
        name: RewardHead.load(folder).centered(reference)
        for name, folder in rewards.items()
        if name != EMBEDDING_REWARD
    }
    gates, personal = [Gate(**gate) for gate in evaluation["gates"]], None
    own = serving_own(gates)
    served = [f"coterie-{k}" if serves else GLOBAL for k, serves in enumerate(own)]
    adapters = {name: rewards[name] for name in {GLOBAL, *served} if has_adapter(rewards[name])}
    if evaluation["ships"] == EMBEDDING_REWARD:
        personal = PersonalHead.load(rewards[EMBEDDING_REWARD])
        if not adapters:  # else it reads the global adapter's hidden state, and is centred there
            personal = personal.centered(reference)
        personal.save(out / "rewards" / EMBEDDING_REWARD / PERSONAL_FILE)

    for file, source in {FEATURES_FILE: embedded, MODEL_FILE: embedded, MIXTURE_FILE: clustered}.items():
        with replacing(out / file) as temporary:
            temporary.write_bytes((source / file).read_bytes())
    for name, head in heads.items():
        head.save(out / "rewards" / name / HEAD_FILE)
    for name, folder in adapters.items():
        for part in sorted(part for part in folder.iterdir() if part.is_file() and part.name not in _NOT_SERVED):
            shutil.copyfile(part, out / "rewards" / name / part.name)
    with replacing(out / REFERENCE_FILE) as temporary:
        from safetensors.numpy import save_file

        save_file({"features": np.ascontiguousarray(reference)}, temporary)
    scored = {name: ScoredResponses.load(folder) for name, folder in adapters.items()}
    read = rewards[GLOBAL] if adapters else None
    golden = _golden(ingested / "comparisons.parquet", table, features, scored or heads, served, personal, read)
    write_text(out / GOLDEN_FILE, json.dumps(golden, indent=1, ensure_ascii=False))

    figures = {
        "encoder_max_tokens": float(encoder["max_tokens"]),
    }
    seen = evaluation["heldout"]["seen"]
    measured = {"test_accuracy": seen["accuracy"], "test_log_loss": seen["log_loss"], **selection["stability"]}
    figures |= {name: float(value) for name, value in measured.items() if value is not None}
    described: dict[str, Any] = {
        "name": settings.name,
        "mixture_version": selection["mixture_version"],
        "created_by": f"coterie {__version__}",
        "seed": int(selection.get("seed", 0)),
        "base_models": [
            BaseModelReference(name=encoder["encoder"], revision=encoder["revision"], role="encoder"),
            *(one.backbone for name, one in scored.items() if name == GLOBAL),
        ],
        "coteries": int(selection["selection"]["coteries"]),
        "rank": int(discovery["rank"]),
        "features": features.size,
        "style_names": json.loads(encoder["style_names"])[: len(features.style_mean)],
        "verdict": selection["selection"]["verdict"],
        "ships": evaluation["ships"],
        "reward": "adapter" if adapters else "head",
        "temperature": float(evaluation["heldout"].get("temperature", 1.0)),
        "key_fingerprint": _json(ingested / "metrics.json").get("key_fingerprint"),
        "gates": gates,
        "metrics": figures,
    }
    write_text(out / CARD_FILE, _card(described, evaluation))
    return seal(out, described)


def seal(out: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of the files that lie in `out`; `described` holds the fields that do not follow from these.

    Returns:
        model_version, mixture_version, the number of files and their bytes.
    """
    files = {name: sha256(out / name) for name in files_of(out)}
    version = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    manifest = Manifest(model_version=version, files=files, **described)
    write_text(out / MANIFEST_FILE, manifest.model_dump_json(indent=1))
    return {
        "model_version": version,
        "mixture_version": manifest.mixture_version,
        "files": len(files),
        "bytes": sum((out / name).stat().st_size for name in files),
    }


def _golden(
    comparisons: Path,
    vectors: Any,
    features: FeatureMap,
    rewards: Mapping[str, RewardHead] | Mapping[str, ScoredResponses],
    served: list[str],
    personal: PersonalHead | None,
    read: Path | None,
) -> list[dict[str, Any]]:
    """Scores of a few test pairs, by the global reward, by what each coterie serves, and for a made-up person each, whose
    reward reads the hidden states in the folder `read`, or the features."""
    columns = ["prompt", "chosen", "rejected", "chosen_id", "rejected_id", "pair_id", "split"]
    table = COMPARISON.read(comparisons, columns)
    held = table.filter(pc.equal(table["split"].cast("string"), TEST))
    rows = (held if len(held) else table).sort_by("pair_id").to_pylist()
    picked = list({row["prompt"]: row for row in rows}.values())[:_GOLDEN_PROMPTS]
    where = {name: i for i, name in enumerate(vectors["response_id"].to_pylist())}
    golden = []
    for number, row in enumerate(picked):
        ids = [row["chosen_id"], row["rejected_id"]]
        pair = vectors.take([where[response] for response in ids])
        h = features.transform(matrix(pair["vector"]), matrix(pair["style"]))
        scores = {
            name: reward.score(h) if isinstance(reward, RewardHead) else reward.score(ids)
            for name, reward in rewards.items()
        }
        golden.append(
            {
                "prompt": row["prompt"],
                "responses": [row["chosen"], row["rejected"]],
                "global": scores[GLOBAL].round(6).tolist(),
                "coteries": np.stack([scores[name] for name in served], axis=1).round(6).tolist(),
            }
        )
        if personal is not None:
            if read is not None:
                states = States.load(read, ids)
                h = states.values[states.rows(ids)]
            person = np.round(np.random.default_rng(number).standard_normal(personal.basis.shape[1]), 3)
            golden[-1] |= {"embedding": person.tolist(), "personal": personal.of(person).score(h).round(6).tolist()}
    return golden


def _card(described: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The model card, with the header that Hugging Face reads."""
    encoder = described["base_models"][0]
    gates = "\n".join(
        f"| {'everybody, by embedding' if gate.coterie is None else gate.coterie} | {gate.serves} | {gate.reason} |"
        for gate in described["gates"]
    )
    figures = described["metrics"]
    names = {"test_accuracy": "accuracy", "test_log_loss": "log-loss"}
    measured = ", ".join(f"{told} {figures[name]:.3f}" for name, told in names.items() if name in figures)
    made_of = f"linear heads on {described['features']} features of"
    if described["reward"] == "adapter":
        backbone = described["base_models"][1]
        made_of = f"PEFT adapters of `{backbone.name}` (revision `{backbone.revision}`), beside {made_of}"
    return f"""---
library_name: coterie
pipeline_tag: text-classification
tags: [reward-model, preferences, personalization]
---

# {described["name"]}

Rewards for the coteries of one set of annotators, as {made_of} the encoder
`{encoder.name}` (revision `{encoder.revision}`). Verdict of the analysis: **{described["verdict"]}**,
{described["coteries"]} coterie{"s" if described["coteries"] > 1 else ""}. Served: {_SERVED[described["ships"]]}.

Test prompts, macro over workers: {measured or "no comparison was held out"}.

| coterie | serves | because |
|---|---|---|
{gates}

A score of 0 is an average response of the reference set; the logistic function of a difference of two scores is the
probability that a person of that coterie prefers the first. Mixture `{described["mixture_version"]}`: a worker's
posterior means something beside this mixture only.

Load it with `coterie score` or `coterie serve`. Made by {described["created_by"]}.
"""


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: not readable ({error}). Run the stage that writes it again.") from error
    return content
