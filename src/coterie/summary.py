"""What a finished run says to the person who started it, and one prediction from a bundle on the disk."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from pydantic import ValidationError

from coterie.bundle import Bundle
from coterie.config import in_words
from coterie.contracts import EMBEDDING_REWARD, PROFILE, Example, Prediction, Route, RoutedInstance, matrix
from coterie.errors import BadConfiguration, BadData
from coterie.ingest.pseudonyms import fingerprint, load_key, pseudonym
from coterie.report import verdict_line
from coterie.report.words import nats, points
from coterie.routing import Profile, fall_back, is_posterior, route
from coterie.scoring import Scorer, load_scorer

PROFILES_FILE = "profiles.parquet"


def predict(
    bundle: Path,
    profiles: Path,
    prompt: str,
    responses: list[str],
    worker: str | None = None,
    known_as: str | None = None,
    posterior: list[float] | None = None,
    examples: Path | None = None,
) -> Prediction:
    """Score `responses` [n] to `prompt` as the endpoint would, with the profiles of Feast's offline Parquet.

    Whose preference is asked is told in one way at most; in none, the global reward answers.

    Args:
        bundle: the bundle's folder.
        profiles: folder of the publish stage.
        worker: an id as the application knows it; becomes a pseudonym with the key that ingest used.
        known_as: the id as the profiles hold it, in place of `worker`.
        posterior: over the coteries [K].
        examples: line JSON of comparisons that a new person made (contracts.Example).

    Raises:
        BadBundle: the bundle is damaged. BadData: no profiles, or examples that are no comparisons. BadConfiguration: a
            person told in two ways, no key, another key, or a posterior that is none over the bundle's coteries.
    """
    if sum(told is not None for told in (worker, known_as, posterior, examples)) > 1:
        raise BadConfiguration("give one of --worker, --pseudonym, --posterior and --examples")
    loaded = Bundle.load(bundle)
    if worker is not None:
        known_as = pseudonym(_key_of(loaded), worker)
    evidence = None if examples is None else read_examples(examples)
    scorer = load_scorer(loaded)
    if evidence is not None:
        taken = scorer.place(evidence)
    elif posterior is not None:
        taken = _by_posterior(loaded, posterior)
    else:
        taken = _looked_up(scorer, profiles / PROFILES_FILE, known_as)
    return scorer.predict([RoutedInstance(prompt=prompt, responses=responses, route=taken)])[0]


def read_examples(path: Path) -> list[Example]:
    """Comparisons of one person, a JSON object a line: prompt, chosen, rejected, and "tie": true where both were liked alike.

    Raises:
        BadData: no such file, or a line that is no comparison.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: not readable ({error}). Give line JSON with prompt, chosen and rejected.") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(Example.model_validate_json(line))
        except ValidationError as error:
            raise BadData(
                f"{in_words(f'{path}, line {number}', error)}. A line holds prompt, chosen and rejected."
            ) from error
    return examples


def _by_posterior(bundle: Bundle, posterior: list[float]) -> Route:
    manifest = bundle.manifest
    if len(posterior) != manifest.coteries or not is_posterior(posterior):
        raise BadConfiguration(
            f"--posterior {','.join(map(str, posterior))}: give {manifest.coteries} probabilities that sum to one, one a "
            "coterie of this bundle"
        )
    if manifest.ships == EMBEDDING_REWARD:
        raise BadConfiguration("this bundle serves each person by their embedding: give --worker or --examples")
    coterie = int(np.argmax(posterior))
    return Route(source="profile", coterie=coterie, posterior=posterior, mixture_version=manifest.mixture_version)


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
        taken = _looked_up(scorer, path, known_as)
        asked = RoutedInstance(prompt=entry["prompt"], responses=entry["responses"], route=taken)
        made = scorer.predict([asked])[0]
        source = "own profile" if made.source == "profile" else f"global reward, {made.reason}"
        lines.append(
            f"  {label:34} A {made.scores[0]:+.2f}  B {made.scores[1]:+.2f}  prefers {'AB'[made.best]}  ({source})"
        )
    return lines


def _looked_up(scorer: Scorer, profiles: Path, known_as: str | None) -> Route:
    if known_as is None:
        return fall_back("no-worker")
    return route(_profile(profiles, known_as), scorer.bundle.manifest.mixture_version, datetime.now(UTC))


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
