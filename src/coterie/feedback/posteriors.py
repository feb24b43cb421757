"""Where a person stands by what they have said: their published profile, moved by their feedback.

The published posterior is the prior. It speaks of the training votes of its run, and of one mixture; feedback is evidence on
top, which counts as the calibration of new workers found (docs/method, section 5). Everything is computed from the
stored comparisons each time, so it does not matter how often, or by which router.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from coterie.contracts import content_id
from coterie.discovery.votes import Array, Votes, VoteSet
from coterie.errors import BadData
from coterie.feedback.evidence import Evidence, Place, Prior, Said
from coterie.placing import Placing
from coterie.scoring import Scorer

_SURE = 1e-7  # a float32 that says 1 knows no more than 1 less this
_KEPT = 200_000  # feature differences in memory


class Mixed:
    """Moves priors by votes on a bundle's features."""

    def __init__(self, placing: Placing) -> None:
        self._placing = placing

    def places(self, votes: VoteSet, priors: Sequence[Prior | None]) -> list[Place]:
        """Where the people of `votes` stand, beside what was published of each; all have votes.

        Raises:
            BadData: a prior of another mixture than the bundle's.
        """
        placed = self._placing.infer(votes)
        return [
            Place(
                posterior=self._posterior(placed.posterior[i], prior).tolist(),
                embedding=_embedding(placed.mean[i], placed.covariance[i], int(votes.counts[i]), prior).tolist(),
                reliability=float(placed.reliability[i]) if prior is None else prior.reliability,
            )
            for i, prior in enumerate(priors)
        ]

    def _posterior(self, shares: Array, prior: Prior | None) -> Array:
        if prior is None:
            return shares
        if len(prior.posterior) != len(shares):
            raise BadData(
                f"a profile over {len(prior.posterior)} coteries beside a bundle of {len(shares)}; publish the bundle's run"
            )
        combined = np.maximum(prior.posterior, _SURE) * shares / self._placing.mixture.weights_
        return np.asarray(combined / combined.sum())


def _embedding(mean: Array, covariance: Array, comparisons: int, prior: Prior | None) -> Array:
    """The mean of both Gaussian posteriors together.

    Of the training votes only the mean is published: each of them is taken to tell as much as one of the feedback.
    """
    if prior is None or len(prior.embedding) != len(mean):
        return mean
    eye = np.eye(len(mean))
    information = np.linalg.inv(covariance) - eye
    before = information * prior.comparisons / comparisons
    known = (eye + before) @ np.asarray(prior.embedding) + (eye + information) @ mean
    return np.asarray(np.linalg.solve(eye + before + information, known))


class Posteriors:
    """Infers places with the rewards of a bundle. A response is encoded once, as long as it is remembered.

    Args:
        scorer: of the bundle whose mixture the priors belong to; `mixture_version` names it.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self._mixed = scorer, Mixed(scorer.placing)
        self.mixture_version = scorer.bundle.manifest.mixture_version
        self._differences: OrderedDict[str, Array] = OrderedDict()

    def __call__(self, people: Sequence[Evidence]) -> list[Place]:
        """The place of each person. Raises BadData: a prior of another mixture than the bundle's."""
        said = [one for person in people for one in person.said]
        votes = Votes.of(
            self._x(said),
            [0.5 if one.tie else 1.0 for one in said],
            np.repeat(np.arange(len(people)), [len(person.said) for person in people]),
            weight=[one.weight for one in said],
        )
        return self._mixed.places(votes, [person.prior for person in people])

    def _x(self, said: Sequence[Said]) -> Array:
        """Feature differences [n, d]."""
        keys = [content_id(one.prompt, one.chosen, one.rejected) for one in said]
        new = list({key: one for key, one in zip(keys, said, strict=True) if key not in self._differences}.items())
        if new:
            prompts = [one.prompt for _, one in new]
            h = self.scorer.features(prompts * 2, [one.chosen for _, one in new] + [one.rejected for _, one in new])
            self._differences.update(zip((key for key, _ in new), h[: len(new)] - h[len(new) :], strict=True))
        x = np.stack([self._differences[key] for key in keys])
        for key in dict.fromkeys(keys):
            self._differences.move_to_end(key)
        while len(self._differences) > _KEPT:
            self._differences.popitem(last=False)
        return x
