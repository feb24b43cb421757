"""Does it pay: a share of requests is answered by the global reward, and people say which answers they agree with.

The holdout is drawn for every request anew, so that a person is in both arms. What is estimated is the difference in
agreement with feedback, between what a person's own reward ranked first and what the global one did, by the augmented
inverse-propensity estimator (Robins, Rotnitzky and Zhao 1994, JASA 89(427)) with one mean an arm; its interval is that of
bootstrap.TwoWayBootstrap, over people and prompts.
"""

from __future__ import annotations

import hashlib
from typing import Any

from coterie.errors import BadData


def holdout(worker: str, request_id: str, share: float) -> tuple[bool, float]:
    """Whether the global reward answers this request of a worker for comparison's sake.

    Drawn by a hash of the two, so that every router, and whoever asks again, gets the same answer.

    Returns:
        Whether it is held out, and the probability of what was drawn: `share`, or 1 - share.
    """
    drawn = int.from_bytes(hashlib.blake2b(f"{worker}\0{request_id}".encode(), digest_size=8).digest(), "big") / 2**64
    held_out = drawn < share
    return held_out, share if held_out else 1 - share


def uplift(url: str, replicates: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """The gain in agreement with feedback of people's own rewards over the global one, of a feedback database.

    Feedback on requests of strangers, whom the global reward answers in either arm, says nothing and is left out.

    Args:
        url: of the feedback database.
        replicates, level, seed: of the interval.

    Returns:
        gain (contracts.Estimate, a difference of shares, macro over workers), own and holdout (agreement, comparisons and
        workers of each arm).

    Raises:
        BadData: one of the arms has no feedback. As feedback.reader.connected.
    """
    import numpy as np
    import sqlalchemy as sa

    from coterie.bootstrap import TwoWayBootstrap
    from coterie.discovery.votes import Votes
    from coterie.feedback.reader import connected
    from coterie.feedback.tables import FEEDBACK

    names = ("worker_id", "prompt_id", "arm", "propensity", "agreed")
    told = FEEDBACK.c.arm.is_not(None) & FEEDBACK.c.counts
    with connected(url) as connection:
        query = sa.select(*(FEEDBACK.c[name] for name in names)).where(told)
        rows = connection.execute(query.order_by(FEEDBACK.c.worker_id, FEEDBACK.c.comparison_id)).all()
    if len({row.arm for row in rows}) < 2:
        raise BadData(
            f"{url}: no feedback on answers of both arms. Serve with a holdout above 0, and send `served` with the feedback."
        )
    _, worker = np.unique([row.worker_id for row in rows], return_inverse=True)
    _, prompt = np.unique([row.prompt_id for row in rows], return_inverse=True)
    own, agreed = np.array([row.arm == "own" for row in rows]), np.array([row.agreed for row in rows])
    inverse = 1 / np.array([row.propensity for row in rows])
    means = {arm: float(np.average(agreed[arm == own], weights=inverse[arm == own])) for arm in (True, False)}
    values = means[True] - means[False] + np.where(own, 1, -1) * inverse * (agreed - np.where(own, *means.values()))
    votes = Votes.of(np.zeros((len(rows), 1)), np.ones(len(rows)), worker, prompt)
    everybody = np.ones(votes.n_workers, bool)
    gain = TwoWayBootstrap(votes, replicates, level, seed).estimate(values, np.ones(len(rows), bool), everybody)
    return {
        "gain": gain.model_dump(),
        **{
            name: {
                "agreement": means[arm],
                "comparisons": int((own == arm).sum()),
                "workers": len(np.unique(worker[own == arm])),
            }
            for name, arm in (("own", True), ("holdout", False))
        },
    }
