"""The gate between versions: a bundle that serves people worse than the one that serves now is not promoted.

Both bundles are treated as the endpoint treats them: every worker's posterior (and place) is inferred by the bundle's own
mixture from the training comparisons, and the bundle's rewards are averaged over it; then both are judged on the same
validation prompts. A prompt's split depends on the prompt and the seed alone, so that an incumbent from an earlier run of
the same seed has not seen these prompts either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coterie.bootstrap import TwoWayBootstrap
from coterie.bundle import Bundle
from coterie.config import EncodeSettings, EvaluateSettings
from coterie.contracts import COMPARISON, DIFFERENCE, GLOBAL, TRAIN, VALIDATION
from coterie.discovery.differences import differences
from coterie.discovery.logistic import log_loss
from coterie.discovery.votes import Array, VoteFile, Votes
from coterie.encoding import Encoder, encode
from coterie.scoring import Scorer, average, load_scorer


@dataclass(frozen=True)
class _Served:
    """What a bundle says of the validation comparisons: their votes, and margins [n]; ids [n] tell which they are."""

    votes: Votes
    margins: Array
    ids: list[str]


def compare_versions(
    candidate: Path, incumbent: Path, comparisons: Path, settings: EvaluateSettings, encoder: Encoder | None = None
) -> dict[str, Any]:
    """Whether the bundle `candidate` may take the place of the bundle `incumbent`.

    Args:
        candidate, incumbent: folders of bundles.
        comparisons: comparisons.parquet of the run that made the candidate.
        settings: replicates, level and seed of the interval.
        encoder: of both bundles, in place of those that they name.

    Returns:
        promote, reason in words, log_loss (contracts.Estimate: candidate minus incumbent, nats a comparison, macro over
        workers), and both versions.

    Raises:
        BadBundle: one of them is damaged, or computes something else here than where it was made.
        BadData: no validation comparison.
    """
    new, old = (Bundle.load(path) for path in (candidate, incumbent))
    of_new, of_old = (_serve(load_scorer(bundle, encoder), comparisons, encoder) for bundle in (new, old))
    place = {name: row for row, name in enumerate(of_old.ids)}
    rows = np.array([place[name] for name in of_new.ids])
    y = of_new.votes.y
    losses = log_loss(of_new.margins, y) - log_loss(of_old.margins[rows], y)
    bootstrap = TwoWayBootstrap(of_new.votes, settings.replicates, settings.level, settings.seed)
    difference = bootstrap.estimate(losses, np.ones(len(y), bool), np.ones(of_new.votes.n_workers, bool))
    told = f"{difference.value:+.4f} nats a comparison"
    if difference.low is not None and difference.high is not None:
        told += f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    worse = difference.low is not None and difference.low > 0
    if difference.low is None:  # too few people for an interval: the mean must do
        worse = difference.value is not None and difference.value > 0
    verdict = "it is worse than the incumbent" if worse else "it is not worse than the incumbent"
    return {
        "promote": not worse,
        "reason": f"{verdict} on validation prompts: log-loss {told}",
        "log_loss": difference.model_dump(),
        "candidate": new.manifest.model_version,
        "incumbent": old.manifest.model_version,
    }


def _serve(scorer: Scorer, comparisons: Path, encoder: Encoder | None) -> _Served:
    bundle = scorer.bundle
    reference = bundle.encoder
    settings = EncodeSettings(encoder=reference.name, revision=reference.revision, max_tokens=bundle.max_tokens)
    with tempfile.TemporaryDirectory(prefix="coterie-") as scratch:
        folder = Path(scratch)
        encode(comparisons, folder, settings, encoder=encoder)
        path = folder / "differences.parquet"
        differences(comparisons, folder / "vectors.parquet", bundle.features, path)
        train, votes = VoteFile(path, TRAIN), VoteFile(path, VALIDATION).loaded()
        table = DIFFERENCE.read(path, ["comparison_id", "split"])
        ids = table.filter(pc.equal(table["split"].cast(pa.string()), VALIDATION))["comparison_id"].to_pylist()
        posterior, places, *_ = scorer.placing.infer(train)
    if bundle.personal is not None:
        x = votes.x if bundle.manifest.reward == "head" else _sides(scorer.read, comparisons, ids)
        return _Served(votes, bundle.personal.margin(x, places[votes.worker]), ids)
    if bundle.manifest.ships == "one-reward":
        posterior = np.ones((votes.n_workers, 1))
    return _Served(votes, average(_margins(scorer, comparisons, votes, ids), posterior[votes.worker]), ids)


def _margins(scorer: Scorer, comparisons: Path, votes: Votes, ids: list[str]) -> Array:
    """Margins [n, served] of the rewards that serve; one for everybody is the global one alone."""
    bundle = scorer.bundle
    names = [GLOBAL] if bundle.manifest.ships == "one-reward" else scorer.served
    if bundle.manifest.reward == "head":
        return np.stack([bundle.heads[name].margin(votes.x) for name in names], axis=1)

    def scores(prompts: list[str], responses: list[str]) -> Array:
        found = scorer.by_adapter(prompts, responses)
        return np.stack([found[name] for name in names], axis=1)

    return _sides(scores, comparisons, ids)


def _sides(read: Callable[[list[str], list[str]], Array], comparisons: Path, ids: list[str]) -> Array:
    """What is read of the chosen less that of the rejected responses, [n, ...], of comparisons by id."""
    table = COMPARISON.read(comparisons, ["comparison_id", "prompt", "chosen", "rejected"])
    rows = table.take(pc.index_in(pa.array(ids), table["comparison_id"].combine_chunks()))
    prompts = rows["prompt"].to_pylist()
    chosen, rejected = (read(prompts, rows[side].to_pylist()) for side in ("chosen", "rejected"))
    return chosen - rejected
