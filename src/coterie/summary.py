"""What a finished run says to the person who started it, and one prediction from a bundle on the disk."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from coterie.bundle import Bundle
from coterie.contracts import PROFILE, Prediction, RoutedInstance, matrix
from coterie.errors import BadConfiguration
from coterie.ingest.pseudonyms import fingerprint, load_key, pseudonym
from coterie.report import verdict_line
from coterie.report.words import nats, points
from coterie.routing import Profile, fall_back, route
from coterie.scoring import Scorer, load_scorer

PROFILES_FILE = "profiles.parquet"


def predict(
    bundle: Path,
    profiles: Path,
    prompt: str,
    responses: list[str],
    worker: str | None = None,
    known_as: str | None = None,
) -> Prediction:
    """Score `responses` [n] to `prompt` as the endpoint would, with the profiles of Feast's offline Parquet.

    Args:
        bundle: the bundle's folder.
        profiles: folder of the publish stage.
        worker: an id as the application knows it; becomes a pseudonym with the key that ingest used.
        known_as: the id as the profiles hold it, in place of `worker`.

    Raises:
        BadBundle: the bundle is damaged. BadData: no profiles. BadConfiguration: both ids, no key, or another key.
    """
    if worker is not None and known_as is not None:
        raise BadConfiguration("give --worker or --pseudonym, not both")
    loaded = Bundle.load(bundle)
    if worker is not None:
        known_as = pseudonym(_key_of(loaded), worker)
    return _predict(load_scorer(loaded), profiles / PROFILES_FILE, prompt, responses, known_as)


def closing_words(run: Path) -> str:
    """What was found and how sure it is, one pair of texts scored for two people and a stranger, and where to look."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    gain = metrics["heldout"]["seen"]["difference_to_pooled"]
    lines = [
        "",
        verdict_line(metrics),
        f"Against one reward for everybody, on test prompts: accuracy {points(gain['accuracy'])}, log-loss "
        f"{nats(gain['log_loss'])}.",
    ]
    for coterie in metrics["coteries"]:
        likes = ", ".join(coterie["likes"]) or "what everybody likes"
        lines.append(
            f"  coterie {coterie['id']}: {coterie['workers']} workers, serves {coterie['serves']}; likes {likes}"
        )
    if metrics["truth"] and "ari" in metrics["truth"]:
        lines.append(f"Simulated annotators: adjusted Rand index to the truth {metrics['truth']['ari']:.2f}.")
    lines += ["", *_example(run), "", f"Report: {run / 'report.html'}", f"Serve:  coterie serve {run / 'bundle'}"]
    return "\n".join(lines)


def _example(run: Path) -> list[str]:
    """The golden pair that two people of different coteries score most differently."""
    bundle = Bundle.load(run / "bundle")
    profiles = PROFILE.read(run / "publish" / PROFILES_FILE)
    coterie, posterior = profiles["coterie"].to_numpy(), matrix(profiles["posterior"])
    names = profiles["worker_id"].to_pylist()
    surest = [int(np.argmax(np.where(coterie == k, posterior[:, k], -1))) for k in sorted(set(coterie.tolist()))]
    gaps = [np.diff(np.array(entry["coteries"]), axis=0)[0] for entry in bundle.golden]
    entry = bundle.golden[int(np.argmax([np.ptp(gap) for gap in gaps]))]
    gap = np.diff(np.array(entry["coteries"]), axis=0)[0]
    two = [surest[int(np.argmin(gap))], surest[int(np.argmax(gap))]] if len(surest) > 1 else [surest[0]]
    scorer, path = load_scorer(bundle), run / "publish" / PROFILES_FILE
    lines = [f"Prompt: {entry['prompt'][:100]}"]
    lines += [
        f"  {letter}: {' '.join(text.split())[:110]}" for letter, text in zip("AB", entry["responses"], strict=True)
    ]
    people: list[tuple[str, str | None]] = [(f"worker {names[i][:10]}… of coterie {coterie[i]}", names[i]) for i in two]
    for label, known_as in [*people, ("a stranger", "nobody-we-know")]:
        made = _predict(scorer, path, entry["prompt"], entry["responses"], known_as)
        source = "own profile" if made.source == "profile" else f"global reward, {made.reason}"
        lines.append(
            f"  {label:34} A {made.scores[0]:+.2f}  B {made.scores[1]:+.2f}  prefers {'AB'[made.best]}  ({source})"
        )
    return lines


def _predict(scorer: Scorer, profiles: Path, prompt: str, responses: list[str], known_as: str | None) -> Prediction:
    if known_as is None:
        taken = fall_back("no-worker")
    else:
        version = scorer.bundle.manifest.mixture_version
        taken = route(_profile(profiles, known_as), version, datetime.now(UTC))
    return scorer.predict([RoutedInstance(prompt=prompt, responses=responses, route=taken)])[0]


def _profile(path: Path, worker_id: str) -> Profile | None:
    table = PROFILE.read(path)
    rows = table.filter(pc.equal(table["worker_id"], worker_id)).to_pylist()
    if not rows:
        return None
    row = rows[0]
    return Profile(**row | {"embedding": tuple(row["embedding"]), "posterior": tuple(row["posterior"])})


def _key_of(bundle: Bundle) -> bytes | None:
    """The pseudonym key that the bundle was made with; None where it was made without."""
    expected = bundle.manifest.key_fingerprint
    if expected is None:
        return None
    key = load_key()
    if fingerprint(key) != expected:
        raise BadConfiguration(
            "the pseudonym key is not the one that this bundle was made with: every worker would be a stranger. Set "
            "COTERIE_PSEUDONYM_KEY or COTERIE_PSEUDONYM_KEY_FILE to the key that ingest used."
        )
    return key
