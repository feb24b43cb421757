"""Golden scores: those that a bundle's texts had when it was made, beside those that they have here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

GOLDEN_TOLERANCE = 1e-3  # of a calibrated score
BFLOAT16_NOISE = 0.25  # root mean square of what bfloat16 may change, in standard deviations of the scores


def disagreement(
    golden: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, ArrayLike]], exact: bool
) -> str | None:
    """What of the golden scores comes out otherwise, in words; None where they agree.

    Args:
        golden: the content of a bundle's golden.json.
        answers: for each of its texts the scores here, by name as there: global, coteries, personal; those that are given
            are compared.
        exact: whether scores are to come out to the digits of float32, each within GOLDEN_TOLERANCE; else all of a name
            together within BFLOAT16_NOISE.
    """
    for name in dict.fromkeys(name for answer in answers for name in answer):
        rows = [row for row, answer in enumerate(answers) if name in answer]
        then = [np.asarray(golden[row][name], dtype=np.float64) for row in rows]
        now = [np.asarray(answers[row][name], dtype=np.float64) for row in rows]
        for row, one, other in zip(rows, then, now, strict=True):
            if one.shape != other.shape:
                prompt = golden[row]["prompt"][:40]
                return f"golden scores ({name}) of the prompt {prompt!r} are {other.shape}, not {one.shape}"
        off = [np.abs(one - other) for one, other in zip(then, now, strict=True)]
        worst = np.array([part.max() for part in off])
        if exact:
            agrees = bool(worst.max() <= GOLDEN_TOLERANCE)
        else:
            noise = np.sqrt(np.mean(np.concatenate([part.ravel() for part in off]) ** 2))
            agrees = bool(noise <= BFLOAT16_NOISE * np.std(np.concatenate([one.ravel() for one in then])))
        if not agrees:
            prompt = golden[rows[int(np.argmax(worst))]]["prompt"][:40]
            return f"golden score ({name}) of the prompt {prompt!r} is off by {worst.max():.2g}"
    return None
