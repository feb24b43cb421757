"""Style features against values counted by hand, and their manners with odd texts."""

import time
from math import log1p

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.encoding.style import STYLE_NAMES, STYLE_WORDS, style_features


def features(response, prompt=""):
    return dict(zip(STYLE_NAMES, style_features([prompt], [response])[0].tolist(), strict=True))


def test_every_feature_has_words_for_more_and_for_less():
    assert tuple(STYLE_WORDS) == STYLE_NAMES
    phrases = [phrase for pair in STYLE_WORDS.values() for phrase in pair]
    assert all(phrases)
    assert len(set(phrases)) == len(phrases)


def test_a_hedged_and_friendly_answer():
    # 13 words in three sentences.
    found = features("Perhaps you could try it! I'm not sure. Is it 3.5 metres long?")
    expected = {
        "words": log1p(14),  # the two halves of 3.5 count
        "sentences": log1p(3),
        "sentence_length": log1p(14 / 3),
        "hedging": 2 / 14,
        "lists": 0,
        "questions": 1 / 3,
        "exclamations": 1 / 3,
        "numbers": 1 / 14,
        "contractions": 1 / 14,
        "first_person": 1 / 14,
        "second_person": 1 / 14,
        "examples": 0,
        "overlap": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    letters = len("perhapsyoucouldtryiti'mnotsureisit35metreslong")
    assert found["word_length"] == pytest.approx(log1p(letters / 14), abs=1e-6)


def test_a_list_counts_its_items_not_its_numbers():
    found = features("Do this:\n1. Mix the flour.\n2) Wait\n- Bake 40 minutes.")
    assert found["lists"] == pytest.approx(log1p(3))
    assert found["numbers"] == pytest.approx(1 / 11)  # 40, and not the markers
    assert found["sentences"] == pytest.approx(log1p(3))  # "Do this:" goes with its first item


def test_examples_and_overlap():
    found = features("For example, fig trees grow, e.g. in pots.", "How do fig TREES grow in winter?")
    assert found["examples"] == pytest.approx(log1p(2))
    assert found["overlap"] == pytest.approx(2 / 3)  # trees and grow, not winter; the rest is short


def test_typographic_apostrophes_are_apostrophes():
    assert features("It’s fine and we don’t mind.") == features("It's fine and we don't mind.")
    assert features("It's")["contractions"] == 1
    assert features("'quoted' you")["second_person"] == 0.5


def test_three_dots_or_ten_marks_end_one_sentence():
    assert features("Well... yes!!!!!!!!!! (Truly.)")["sentences"] == pytest.approx(log1p(3))
    assert features("Version 2.5 of coterie.io is out")["sentences"] == pytest.approx(log1p(1))


@pytest.mark.parametrize(
    "text",
    ["", "   ", "🙂🙂", "...", "\n\n", "'"],
    ids=["empty", "spaces", "emoji", "dots", "lines", "apostrophe"],
)
def test_a_text_without_words_is_zero(text):
    assert not any(features(text).values())


def test_wide_punctuation():
    found = features("今日は暑いですか？はい！そうです。")
    assert found["sentences"] == pytest.approx(log1p(3))
    assert found["questions"] == found["exclamations"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text",
    ["." * 10**5 + "x", "a" * 10**5, "\n- " * 33_333, "a.b!" * 25_000, "1." * 50_000, " \n" * 50_000, "🙂é" * 50_000],
    ids=["dots", "one word", "empty items", "marks", "numbers", "lines", "emoji"],
)
def test_long_texts_take_linear_time_and_stay_in_range(text):
    start = time.perf_counter()
    found = features(text)
    assert time.perf_counter() - start < 2  # a quadratic search takes minutes
    assert max(found.values()) < 20


@settings(max_examples=200, deadline=None)
@given(prompts=st.lists(st.text(), min_size=2, max_size=4), responses=st.lists(st.text(), min_size=2, max_size=4))
def test_any_text_gives_finite_features_that_depend_on_it_alone(prompts, responses):
    n = min(len(prompts), len(responses))
    prompts, responses = prompts[:n], responses[:n]
    together = style_features(prompts, responses)
    assert together.shape == (n, len(STYLE_NAMES))
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    assert (together >= 0).all()
    np.testing.assert_array_equal(together[::-1], style_features(prompts[::-1], responses[::-1]))


def test_no_texts():
    assert style_features([], []).shape == (0, len(STYLE_NAMES))
