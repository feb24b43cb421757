"""Who is asking: from what a command is told of a person to the route that their question takes through a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from pydantic import ValidationError

from coterie.bundle import Bundle
from coterie.config import in_words
from coterie.contracts import EMBEDDING_REWARD, PROFILE, Example, Route
from coterie.errors import BadConfiguration, BadData
from coterie.ingest.pseudonyms import fingerprint, load_key, pseudonym
from coterie.routing import Profile, fall_back, is_posterior, route
from coterie.scoring import Scorer

PROFILES_FILE = "profiles.parquet"


@dataclass(frozen=True)
class Person:
    """What is told of a person: one thing at most; nothing of a stranger.

    Attributes:
        worker: an id as the application knows it; becomes a pseudonym with the key that ingest used.
        known_as: the id as the profiles hold it.
        posterior: over the coteries, numbers with commas between them.
        examples: a file of comparisons that they made (`read_examples`).
    """

    worker: str | None = None
    known_as: str | None = None
    posterior: str | None = None
    examples: Path | None = None

    def __post_init__(self) -> None:
        """Raises BadConfiguration: told in two ways."""
        if sum(told is not None for told in (self.worker, self.known_as, self.posterior, self.examples)) > 1:
            raise BadConfiguration("give one of --worker, --pseudonym, --posterior and --examples")

    def route(self, bundle: Bundle, profiles: Path, scorer: Callable[[], Scorer]) -> Route:
        """The route of their questions.

        Args:
            bundle: that answers.
            profiles: folder of the publish stage.
            scorer: makes one of that bundle, which only examples need.

        Raises:
            BadConfiguration: no pseudonym key or another one than ingest's, or a posterior that is none over the bundle's
                coteries. BadData: no profiles, or examples that are no comparisons.
        """
        if self.examples is not None:
            evidence = read_examples(self.examples)
            return scorer().place(evidence)
        if self.posterior is not None:
            return _by_posterior(bundle, self.posterior)
        known_as = self.known_as
        if self.worker is not None:
            known_as = pseudonym(_key_of(bundle), self.worker)
        return look_up(bundle, profiles / PROFILES_FILE, known_as)


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


def _by_posterior(bundle: Bundle, told: str) -> Route:
    manifest = bundle.manifest
    try:
        posterior = [float(part) for part in told.split(",")]
    except ValueError:
        posterior = []
    if len(posterior) != manifest.coteries or not is_posterior(posterior):
        raise BadConfiguration(
            f"--posterior {told}: give {manifest.coteries} probabilities that sum to one, with "
            "commas between them, one a coterie of this bundle"
        )
    if manifest.ships == EMBEDDING_REWARD:
        raise BadConfiguration("this bundle serves each person by their embedding: give --worker or --examples")
    coterie = int(np.argmax(posterior))
    return Route(source="profile", coterie=coterie, posterior=posterior, mixture_version=manifest.mixture_version)


def look_up(bundle: Bundle, profiles: Path, known_as: str | None) -> Route:
    """The route by the profile in the table `profiles`; nobody's is the global one. Raises BadData: no such table."""
    if known_as is None:
        return fall_back("no-worker")
    return route(_profile(profiles, known_as), bundle.manifest.mixture_version, datetime.now(UTC))


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
