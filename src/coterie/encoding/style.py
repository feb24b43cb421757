"""Style features: what a person can see in a text without reading it closely, and words for it in a report.

Shares are of the words or of the sentences, counts are logarithms, so that an odd text (a wall of exclamation
marks, one word of 100,000 letters) stays within the range of the others.
"""

from __future__ import annotations

import re
from math import log1p

import numpy as np
from numpy.typing import NDArray

# Feature: what more of it is called, and what less of it is called.
STYLE_WORDS: dict[str, tuple[str, str]] = {
    "words": ("longer answers", "shorter answers"),
    "sentences": ("more sentences", "fewer sentences"),
    "sentence_length": ("long sentences", "short sentences"),
    "word_length": ("technical words", "plain words"),
    "hedging": ("hedged statements", "direct statements"),
    "lists": ("lists", "prose"),
    "questions": ("questions back to the reader", "no questions back"),
    "exclamations": ("an enthusiastic tone", "a matter-of-fact tone"),
    "numbers": ("figures", "no figures"),
    "contractions": ("contractions, as in speech", "no contractions, as in print"),
    "first_person": ("the writer's own view", "no mention of the writer"),
    "second_person": ("speaking to the reader", "impersonal wording"),
    "examples": ("examples", "no examples"),
    "overlap": ("repeating the prompt's words", "words of its own"),
}
STYLE_NAMES: tuple[str, ...] = tuple(STYLE_WORDS)

_END_MARKS = ".!?…"  # these end a sentence before a space; the wide ones of _ENDS always do
_ENDS = re.compile(r"[.!?…。！？]++[\s\"')\]*]?+")
_LIST_ITEM = re.compile(r"\n[ \t]*+(?:[-*•–]|(\d{1,3}[.)]))[ \t]([^\n]*+)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*+")
_EXAMPLES = ("for example", "for instance", "e.g.", "such as")
_PROMPT_WORD_LENGTH = 4  # shorter ones are mostly "the", "and", "how"
_LONGEST_WORD = 30.0  # a mean beyond it is a text without spaces

# What a word counts as, a letter each: hedge, first person, second person, contraction.
_VOCABULARY = {
    "h": """might may could perhaps maybe possibly probably likely presumably apparently arguably seem seems
        seemed appear appears suggest suggests somewhat fairly roughly generally usually typically often
        sometimes unsure uncertain guess""",
    "f": "i me my mine myself i'm i've i'd i'll",
    "s": "you your yours yourself yourselves you're you've you'd you'll",
    "c": """i'm i've i'd i'll you're you've you'd you'll he's he'd he'll she's she'd she'll it's it'd it'll
        we're we've we'd we'll they're they've they'd they'll that's that'll there's here's what's who's
        where's how's let's isn't aren't wasn't weren't don't doesn't didn't won't wouldn't can't couldn't
        shouldn't mustn't haven't hasn't hadn't needn't ain't""",
}
_LETTERS = {
    word: "".join(letter for letter, words in _VOCABULARY.items() if word in words.split())
    for word in " ".join(_VOCABULARY.values()).split()
}


def style_features(prompts: list[str], responses: list[str]) -> NDArray[np.float32]:
    """The style features of each response, in the order of STYLE_NAMES.

    Args:
        prompts: [n], what each response answers; only `overlap` reads it.
        responses: [n], of any length; an empty one has zeros.

    Returns:
        [n, len(STYLE_NAMES)], finite. Words, sentences, lengths, list items and examples as log(1 + count);
        questions and exclamations a sentence; hedges, numbers, contractions and persons a word; overlap as
        the share of the prompt's words of four letters and more that the response repeats.
    """
    known: dict[str, frozenset[str]] = {}
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        asked = known.get(prompt)
        if asked is None:
            words = _words_of(prompt.lower())
            asked = known[prompt] = frozenset(word for word in words if len(word) >= _PROMPT_WORD_LENGTH)
        rows.append(_features(asked, response))
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(STYLE_NAMES))


class _Separators(dict[int, int]):
    """A table for str.translate, filled as characters are met: what belongs to no word becomes a space."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        if character == "’":
            self[code] = ord("'")
        else:
            self[code] = code if character.isalnum() or character == "'" else ord(" ")
        return self[code]


_SEPARATORS = _Separators()


def _words_of(lowered: str) -> list[str]:
    # Apostrophes stay inside words and go around them. Faster than a regular expression by half.
    return f" {lowered.translate(_SEPARATORS)} ".replace(" '", " ").replace("' ", " ").split()


def _features(asked: frozenset[str], response: str) -> tuple[float, ...]:
    lowered = response.lower()
    words = _words_of(lowered)
    if not words:
        return (0.0,) * len(STYLE_NAMES)
    n = len(words)
    letters = "".join(filter(None, map(_LETTERS.get, words)))
    ends = [end for end in _ENDS.findall(response + " ") if end[-1] not in _END_MARKS]
    items = _LIST_ITEM.findall("\n" + response)
    numbered = sum(marker != "" for marker, _ in items)
    # A list item is a sentence with or without a full stop, and the one of "1." ends none.
    unended = sum(line.rstrip()[-1:] not in _END_MARKS for _, line in items)
    sentences = max(1, len(ends) + unended - sum(marker.endswith(".") for marker, _ in items))
    return (
        log1p(n),
        log1p(sentences),
        log1p(n / sentences),
        log1p(min(len("".join(words)) / n, _LONGEST_WORD)),
        letters.count("h") / n,
        log1p(len(items)),
        sum("?" in end or "？" in end for end in ends) / sentences,
        sum("!" in end or "！" in end for end in ends) / sentences,
        max(0, len(_NUMBER.findall(response)) - numbered) / n,
        letters.count("c") / n,
        letters.count("f") / n,
        letters.count("s") / n,
        log1p(sum(map(lowered.count, _EXAMPLES))),
        len(asked.intersection(words)) / len(asked) if asked else 0.0,
    )
