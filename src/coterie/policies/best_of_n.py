"""Best of n: the policy that a reward alone makes of the start, without any training (Stiennon et al. 2020, arXiv 2009.01325).

What tuning a policy must beat, or explain. The n answers are drawn once, and every reward chooses among the same.

Nothing is done about length here. To choose only among answers of like length would leave a reward few of them, and what
is compared would be no best of n any more; the comparison itself holds length equal (policies.judging).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.policies.policy import Answer


def best_of_n(samples: Sequence[Sequence[Answer]], scores: NDArray[np.floating]) -> list[Answer]:
    """The answer to each prompt that a reward scores highest.

    Args:
        samples: [p][n], a policy's answers to each of p prompts.
        scores: [p, n], theirs by the reward.

    Returns:
        [p]. As in tuning, an unfinished or empty answer is worth less than any other.
    """
    answered = np.array([[answer.finished and bool(answer.text) for answer in answers] for answers in samples])
    eligible = np.where(answered | ~answered.any(axis=1, keepdims=True), scores, -np.inf)
    return [answers[best] for answers, best in zip(samples, eligible.argmax(axis=1).tolist(), strict=True)]
