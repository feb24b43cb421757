"""Scores from a bundle: the one function behind the predictor, the command line and the evaluation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import Bundle
from coterie.config import EncodeSettings
from coterie.contracts import GLOBAL, Example, Route
from coterie.discovery import Votes
from coterie.encoding import Encoder, load_encoder, style_features
from coterie.errors import BadBundle
from coterie.golden import disagreement
from coterie.placing import Placing
from coterie.rewards import serving_own
from coterie.routing import fall_back

Array = NDArray[np.floating]

MASS = 0.95  # of a posterior that is averaged over; the rest is coteries that hardly matter


def leading_coteries(posterior: Array, mass: float = MASS) -> Array:
    """Keep the most probable coteries up to `mass` of each row of a posterior [n, K], and renormalise.

    The coterie that reaches the mass is kept, so that every row keeps at least one.
    """
    order = np.argsort(-posterior, axis=1, kind="stable")
    ranked = np.take_along_axis(posterior, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    kept = np.zeros_like(posterior)
    np.put_along_axis(kept, order, np.where(before < mass, ranked, 0.0), axis=1)
    normalised: Array = kept / kept.sum(axis=1, keepdims=True)
    return normalised


def average(scores: Array, posterior: Array) -> Array:
    """Average scores [n, K] of the coteries' heads over the leading coteries of posteriors [n, K]: [n].

    The scores are calibrated, each by its own head, so that they are on one scale (docs/method, section 5).
    """
    shares = leading_coteries(posterior)
    averaged: Array = (np.where(shares > 0, scores, 0.0) * shares).sum(axis=1)
    return averaged


class Question(NamedTuple):
    """Responses to a prompt, and what is known of the person whose preference is asked: nothing, for the global reward."""

    prompt: str
    responses: Sequence[str]
    posterior: Sequence[float] | None = None  # [K]
    embedding: Sequence[float] | None = None  # [rank]; serves where the bundle ships "embedding"
    everything: bool = True  # by every reward, not by those alone that serve this person


@dataclass(frozen=True)
class Scored:
    """Scores of one instance's responses: what is served [n], by the global reward [n], by each coterie's [n, K]; NaN where
    the question did not ask for everything and an adapter was spared."""

    scores: Array
    by_global: Array
    by_coterie: Array


class Scorer:
    """Scores texts with the rewards of a bundle.

    Args:
        bundle: a loaded bundle.
        encoder: of the name and revision that the bundle names.
        device, dtype: of the backbone, where rewards are adapters; auto: a GPU, and as they were trained.

    Raises:
        BadBundle: the encoder, or the backbone, is not the bundle's.
    """

    def __init__(self, bundle: Bundle, encoder: Encoder, device: str = "auto", dtype: str = "auto") -> None:
        reference = bundle.encoder
        if (encoder.name, encoder.revision) != (reference.name, reference.revision):
            raise BadBundle(
                f"the bundle was made with encoder {reference.name} at {reference.revision}, not {encoder.name} at "
                f"{encoder.revision}. Install that revision, or make the bundle again."
            )
        self.bundle, self._encoder = bundle, encoder
        self._encoding = threading.Lock()  # tokenizers are not for several threads
        own = serving_own(bundle.manifest.gates)
        self.served = [f"coterie-{k}" if own[k] else GLOBAL for k in range(bundle.manifest.coteries)]
        self._adapters = None
        if bundle.manifest.reward == "adapter":
            from coterie.rewards.adapters import AdapterRewards  # imports torch

            self._adapters = AdapterRewards.load(bundle.adapters, device, dtype)

    def score(
        self,
        prompt: str,
        responses: Sequence[str],
        posterior: Sequence[float] | None = None,
        embedding: Sequence[float] | None = None,
    ) -> Scored:
        """Score responses [n] to one prompt for a person; without posterior [K] and embedding [rank]: the global reward."""
        return self.score_many([Question(prompt, responses, posterior, embedding)])[0]

    def score_many(self, questions: Sequence[Question]) -> list[Scored]:
        """Score several questions with one call of the encoder, or of the backbone.

        Raises:
            BadBundle: a posterior of another number of coteries than the bundle's, or no embedding of its rank where
                it ships that.
        """
        prompts = [question.prompt for question in questions for _ in question.responses]
        responses = [text for question in questions for text in question.responses]
        if self._adapters is not None:
            states = self._adapters.states(prompts, responses, self._wanted(questions))
            scores, h = self._adapters.of_states(states), states[GLOBAL]  # what the reward by embedding reads
        else:
            h = self.features(prompts, responses)
            scores = {name: self.bundle.heads[name].score(h) for name in {GLOBAL, *self.served}}
        by_global = scores[GLOBAL]
        by_coterie = np.stack([scores[name] for name in self.served], axis=1)
        scored, end = [], 0
        for question in questions:
            start, end = end, end + len(question.responses)
            rows = slice(start, end)
            served = by_global[rows]
            if question.posterior is not None:
                served = self._personal(question, h[rows], by_coterie[rows])
            scored.append(Scored(served, by_global[rows], by_coterie[rows]))
        return scored

    def _wanted(self, questions: Sequence[Question]) -> dict[str, Array]:
        """Which of all responses [n] each reward is needed for."""
        wanted: dict[str, list[Array]] = {name: [] for name in dict.fromkeys([GLOBAL, *self.served])}
        for question in questions:
            needed = {GLOBAL}
            if question.everything:
                needed = set(wanted)
            elif question.posterior is not None and self.bundle.personal is None:
                shares = leading_coteries(np.array([question.posterior]))[0]
                needed = {name for name, share in zip(self.served, shares, strict=False) if share}
            for name, rows in wanted.items():
                rows.append(np.full(len(question.responses), name in needed))
        return {name: np.concatenate(rows) for name, rows in wanted.items()}

    def _personal(self, question: Question, h: Array, by_coterie: Array) -> Array:
        posterior, embedding = np.asarray(question.posterior, dtype=np.float64), question.embedding
        if len(posterior) != by_coterie.shape[1]:
            raise BadBundle(
                f"a posterior over {len(posterior)} coteries for a bundle of {by_coterie.shape[1]}; "
                "the profile belongs to another mixture"
            )
        if self.bundle.personal is None:
            return average(by_coterie, np.tile(posterior, (len(by_coterie), 1)))
        if embedding is None or len(embedding) != self.bundle.manifest.rank:
            raise BadBundle(
                f"an embedding of {len(embedding or ())} numbers for a bundle of rank {self.bundle.manifest.rank}; "
                "the profile belongs to another mixture"
            )
        return self.bundle.personal.of(np.asarray(embedding, dtype=np.float64)).score(h)

    def place(self, examples: Sequence[Example]) -> Route:
        """Whose reward answers a new person who made these comparisons: the coteries, and the place, that explain them."""
        if not examples:
            return fall_back("no-comparisons")
        prompts = [example.prompt for example in examples]
        chosen, rejected = ([getattr(example, side) for example in examples] for side in ("chosen", "rejected"))
        h = self.features(prompts * 2, chosen + rejected)
        x, labels = h[: len(examples)] - h[len(examples) :], [0.5 if example.tie else 1.0 for example in examples]
        placed = self.placing.infer(Votes.of(x, labels, np.zeros(len(x))))
        return Route(
            source="comparisons",
            coterie=int(np.argmax(placed.posterior[0])),
            posterior=placed.posterior[0].tolist(),
            embedding=placed.mean[0].tolist(),
            mixture_version=self.bundle.manifest.mixture_version,
        )

    @cached_property
    def placing(self) -> Placing:
        """Of people whom the bundle does not know."""
        return Placing.of(self.bundle)

    @property
    def exact(self) -> bool:
        """Whether scores come out here as where the bundle was made, to the digits of float32."""
        return self._adapters is None or self._adapters.exact

    def by_adapter(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Array]:
        """Calibrated scores [n] of responses to prompts by each adapter that serves; where linear heads serve, there are none."""
        return {} if self._adapters is None else self._adapters.score(prompts, responses)

    def read(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """What the reward by embedding reads of responses, [n, d]: their features, or the global adapter's hidden state."""
        if self._adapters is None:
            return self.features(prompts, responses)
        return self._adapters.states(prompts, responses, {GLOBAL: np.ones(len(prompts), dtype=bool)})[GLOBAL]

    def by_reward(self, name: str, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Calibrated scores [n] of responses to prompts by one reward that serves, and no other: global or coterie-<k>."""
        if self._adapters is None:
            return self.bundle.heads[name].score(self.features(prompts, responses))
        states = self._adapters.states(prompts, responses, {name: np.ones(len(prompts), dtype=bool)})
        return self._adapters.of_states(states)[name]

    def features(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """h [n, d] of responses to prompts."""
        texts = [self._encoder.text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        with self._encoding:
            vectors = self._encoder.encode(texts)
        h: Array = self.bundle.features.transform(vectors, style_features(list(prompts), list(responses)))
        return h


def load_scorer(bundle: Bundle, encoder: Encoder | None = None) -> Scorer:
    """A scorer with the encoder that the bundle names, or with `encoder`, after its golden scores came out right.

    Raises:
        BadBundle: they did not, or the encoder is another. BadConfiguration: the encoder cannot be loaded.
    """
    reference = bundle.encoder
    settings = EncodeSettings(encoder=reference.name, revision=reference.revision, max_tokens=bundle.max_tokens)
    scorer = Scorer(bundle, encoder or load_encoder(settings))
    check_golden(scorer)
    return scorer


def check_golden(scorer: Scorer) -> None:
    """Score the bundle's golden texts anew.

    Raises:
        BadBundle: a score differs by more than GOLDEN_TOLERANCE from what it was when the bundle was made; or where bfloat16
            came into it, all of them by more than BFLOAT16_NOISE.
    """
    golden = scorer.bundle.golden
    people = [entry.get("embedding") for entry in golden]
    uniform = np.full(scorer.bundle.manifest.coteries, 1 / scorer.bundle.manifest.coteries)
    questions = [
        Question(entry["prompt"], entry["responses"], None if person is None else uniform.tolist(), person)
        for entry, person in zip(golden, people, strict=True)
    ]
    answers = [
        {"global": now.by_global, "coteries": now.by_coterie}
        | ({"personal": now.scores} if "personal" in entry else {})
        for entry, now in zip(golden, scorer.score_many(questions), strict=True)
    ]
    if (off := disagreement(golden, answers, scorer.exact)) is not None:
        raise BadBundle(
            f"{scorer.bundle.path}: {off}. The encoder computes something else here than where the bundle was made: use the "
            "same versions of torch, transformers and sentence-transformers, and the same precision."
        )
