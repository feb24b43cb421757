"""Questions and answers whose differences a reader can see: every answer turns twelve visible attributes on or off.

The attributes are named as the style features that measure them (coterie.encoding.style), so that what an annotator
is made to like and what a report finds can be compared by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.simulation.topics import FORMS, TOPICS, Topic

ATTRIBUTES: tuple[str, ...] = (
    "words",  # explains at length
    "hedging",
    "lists",
    "numbers",
    "exclamations",  # is warm
    "questions",  # asks back
    "word_length",  # formal, technical words
    "contractions",
    "examples",
    "second_person",
    "first_person",
    "overlap",  # repeats the question
)
MOST_PROMPTS = len(TOPICS) * len(FORMS)

# Sentences by attribute; each answer draws one of every kind that it needs. {isnt} and the like depend on contractions.
_WARM = ("What a lovely question!", "What a nice thing to take up!", "This is going to be fun!")
_CHEERS = ("Good luck, and enjoy it!", "It gets better every time!", "Have fun with it!")
_RESTATED = (
    "The question is how to {task}.",
    "This is about the best way to {task}.",
    "To {task} is the aim here.",
)
# What leads into the steps, by (hedging, second_person).
_LEADS = {
    (0, 0): ("", "First of all, ", "Simply "),
    (0, 1): ("You should ", "You simply ", "You just have to "),
    (1, 0): ("It might help to ", "Perhaps it is best to ", "Possibly it would help to "),
    (1, 1): ("You might want to ", "Perhaps you could ", "Maybe you could "),
}
_DOUBTS = {
    0: ("It may turn out differently.", "That is probably enough.", "Results may vary."),
    1: (
        "It may turn out differently for you.",
        "That is probably enough for you.",
        "Your results may vary.",
    ),
}
_READER = ("You know your own case best.", "You can go at your own pace.", "Your own eye is your best guide.")
_WRITER = (
    "In my experience this works, and I still do it myself.",
    "I have done it many times, and it has always worked for me.",
    "I learnt this from my mistakes, so I trust it.",
)
# The rest by word_length: plain words, technical words.
_WHY = ("The reason is that {why}.", "The underlying explanation is comparatively elementary: {why}.")
_MORE = (
    (
        "Do one thing after the other, and look at the result before going on.",
        "Most people skip the last part, and {thats} where things go wrong later.",
        "If it {doesnt} work at once, go back a step and try again with more care.",
    ),
    (
        "Sequential execution with intermediate verification considerably increases reliability.",
        "Insufficient attention to the concluding operation {isnt} uncommon and jeopardises everything.",
        "Whenever unsatisfactory results materialise, systematic repetition of preceding operations {isnt} avoidable.",
    ),
)
_FIGURE = ("As a rule, {figure}.", "Recommended specification: {figure}.")
_EXAMPLE = ("For example, {example}.", "For example, {example}.")
_CALM = (
    ("{dont} rush it, {its} not that hard.", "{its} easy, so {dont} worry.", "{thats} all, and it {doesnt} cost much."),
    (
        "{its} essential that preparation {isnt} neglected.",
        "{thats} an established procedure, and it {doesnt} necessitate specialised equipment.",
        "Thorough preparation {isnt} optional: {its} indispensable.",
    ),
)
_ASK = ("One thing: {ask}?", "Additional clarification required: {ask}?")
_SPELLED = {"isnt": "is not", "its": "it is", "dont": "do not", "doesnt": "does not", "thats": "that is"}
_CONTRACTED = {"isnt": "isn't", "its": "it's", "dont": "don't", "doesnt": "doesn't", "thats": "that's"}


@dataclass(frozen=True)
class Texts:
    """Prompts [p], their responses [p][m], and the attributes of every response [p, m, len(ATTRIBUTES)] as 0 or 1."""

    prompts: list[str]
    responses: list[list[str]]
    attributes: NDArray[np.float64]


def write_texts(prompts: int, responses: int, rng: np.random.Generator) -> Texts:
    """Write `prompts` distinct questions with `responses` answers each, of which no two have the same attributes.

    Args:
        prompts: at most MOST_PROMPTS.
        responses: at most 2 ** len(ATTRIBUTES).
        rng: decides which questions, attributes and wordings.
    """
    texts = Texts([], [], np.empty((prompts, responses, len(ATTRIBUTES))))
    for row, number in enumerate(rng.choice(MOST_PROMPTS, size=prompts, replace=False).tolist()):
        topic, form = TOPICS[number % len(TOPICS)], FORMS[number // len(TOPICS)]
        codes = rng.choice(2 ** len(ATTRIBUTES), size=responses, replace=False)
        texts.attributes[row] = (codes[:, None] >> np.arange(len(ATTRIBUTES))) & 1
        texts.prompts.append(form.format(task=topic.task))
        texts.responses.append(
            [
                _answer(topic, dict(zip(ATTRIBUTES, switches, strict=True)), rng)
                for switches in texts.attributes[row].astype(int).tolist()
            ]
        )
    return texts


def _answer(topic: Topic, on: dict[str, int], rng: np.random.Generator) -> str:
    """An answer about `topic` with the attributes `on`: opening, steps, explanation, closing."""
    draw = iter(rng.integers(3, size=10).tolist())
    reader, technical = on["second_person"], on["word_length"]
    opening = [_WARM[next(draw)]] * on["exclamations"] + [_RESTATED[next(draw)]] * on["overlap"]
    steps = list(topic.steps if on["words"] else topic.steps[:2])
    lead = _LEADS[on["hedging"], reader][next(draw)]
    if on["lists"]:
        body = [_sentence(f"{lead}do this:"), *(f"\n- {_sentence(step)}" for step in steps), "\n"]
    else:
        body = [_sentence(f"{lead}{', '.join(steps[:-1])} and {steps[-1]}.")]
    closing = [_WHY[technical], *_MORE[technical][: 1 + next(draw)]] * on["words"]
    closing += [_DOUBTS[reader][next(draw)]] * on["hedging"] + [_READER[next(draw)]] * reader
    closing += [_FIGURE[technical]] * on["numbers"] + [_EXAMPLE[technical]] * on["examples"]
    closing += [_WRITER[next(draw)]] * on["first_person"] + [_CALM[technical][next(draw)]]
    closing += [_CHEERS[next(draw)]] * on["exclamations"] + [_ASK[technical]] * on["questions"]
    filled = topic._asdict() | (_CONTRACTED if on["contractions"] else _SPELLED)
    told = [_sentence(sentence.format_map(filled)) for sentence in (*opening, *body, *closing)]
    return " ".join(told).replace(" \n", "\n").replace("\n ", "\n")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
