"""Which prompts train, select and test: whole prompts are held out (docs/method, section 2: split by item,
not by pair).

A prompt's split depends on the seed and its prompt_id alone, so it stays where it is when data are added: a
hash below test_share is test, below test_share + validation_share validation. Where there are fewer than
200 prompts that would miss the shares by far, so there the prompts are ordered by their hashes and counted
off; no split is then empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pandas.util import hash_array

from coterie.contracts import SPLITS, TEST, TRAIN, VALIDATION

FEW_PROMPTS = 200
_TRAIN, _VALIDATION, _TEST = (SPLITS.index(name) for name in (TRAIN, VALIDATION, TEST))
UNKNOWN = -1  # the source brings no split

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Codes = np.ndarray[Any, np.dtype[np.int8]]  # positions in SPLITS, or UNKNOWN


def prompt_hashes(prompt_ids: pa.StringArray, seed: int) -> Hashes:
    """SipHash of each row's prompt_id, keyed with the seed."""
    texts = prompt_ids.to_numpy(zero_copy_only=False)
    hashes: Hashes = hash_array(texts, hash_key=f"{seed % 2**64:016x}", categorize=False)
    return hashes


def assign_splits(prompts: Hashes, validation_share: float, test_share: float) -> Codes:
    """The split of each prompt.

    Args:
        prompts: the distinct prompts' hashes, ascending. Fewer than three all train: there is nothing to
        hold out.
    """
    number = len(prompts)
    codes = np.full(number, _TRAIN, dtype=np.int8)
    if number < 3:
        return codes
    if number >= FEW_PROMPTS:
        return by_hash(prompts, validation_share, test_share)
    test = min(max(1, round(test_share * number)), number - 2)
    held_out = test + min(max(1, round(validation_share * number)), number - 1 - test)
    codes[:held_out] = _VALIDATION
    codes[:test] = _TEST
    return codes


def by_hash(prompts: Hashes, validation_share: float, test_share: float) -> Codes:
    """The split of each prompt where there are many: by its hash alone."""
    test, held_out = np.array([test_share, test_share + validation_share]) * 2.0**64
    codes = np.full(len(prompts), _TRAIN, dtype=np.int8)
    codes[prompts < held_out] = _VALIDATION
    codes[prompts < test] = _TEST
    return codes


def honour_given(codes: Codes, rows: np.ndarray[Any, np.dtype[np.intp]], given: Codes) -> int:
    """Put the source's own splits in place of ours; return how many prompts the source has in several.

    Such a prompt goes to the most held-out of its splits (test, then validation), so that no prompt is in
    two.

    Args:
        codes: the split of each prompt; changed.
        rows: the prompt of each row, as a position in `codes`.
        given: the source's split of each row.
    """
    known = given != UNKNOWN
    if not known.any():
        return 0
    highest, lowest = np.full(len(codes), UNKNOWN, np.int8), np.full(len(codes), len(SPLITS), np.int8)
    np.maximum.at(highest, rows[known], given[known])
    np.minimum.at(lowest, rows[known], given[known])
    told = highest != UNKNOWN
    codes[told] = highest[told]
    return int((told & (highest != lowest)).sum())
