"""Which policy people prefer: win rates, raw and at equal length, and the gates.

A win rate is the share of people's votes that one policy's answers are expected to get against another's to the same
prompts, every person and every prompt counting once; two equal answers share the votes. How people vote is said by judges
(policies.judges): reward heads of held-out votes, and simulated annotators themselves.

At equal length: a logistic regression of the votes on the difference of the two answers' log lengths, read where they do not
differ (Dubois et al. 2024, arXiv 2404.04475, section 3). Two policies that often say the same, word for word, share those votes
whatever the length, so that this is a tie and no point of the curve. It is the headline, since it uses every prompt. Beside it
stands the rate of different answers that are about as long, which supposes no curve but hears few prompts.

Intervals are those of coterie.bootstrap, over people and prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats
from scipy.special import expit

from coterie.bootstrap import FEWEST_WORKERS, TwoWayBootstrap
from coterie.bundle import Bundle
from coterie.config import JudgeSettings
from coterie.contracts import COMPARISON, GLOBAL, TEST, Estimate, PolicyGate
from coterie.discovery.logistic import gram
from coterie.discovery.votes import Votes
from coterie.errors import BadConfiguration, BadData
from coterie.policies.best_of_n import best_of_n
from coterie.policies.judges import Answers, Array, Judge, heldout_judges, true_judges
from coterie.policies.policy import START, Answer, Policy, prompt_ids
from coterie.progress import progress
from coterie.rewards import fit_head
from coterie.scoring import Question, Scorer, load_scorer
from coterie.simulation.truth import SimulatedTruth, about_style

OWN, WRONG = "own", "wrong"  # of each person's coterie; the mean over the other coteries' policies
_PRECISION = 0.01  # of the prior of the regression on length: it keeps the slope finite where all answers are as long
_SAMPLES = 5  # prompts whose answers are shown


# ----------------------------------------------------------------------------------------------------------- the win rates
class Comparison(NamedTuple):
    """What the people of a judge compare: a policy's answers, and those of one other, or of several for their mean."""

    judge: Judge
    policy: Answers
    against: Sequence[Answers]


def win_rates(comparisons: Sequence[Comparison], settings: JudgeSettings) -> dict[str, Any]:
    """Win rates over the people of one or more comparisons at the same prompts.

    Returns:
        raw, equal_length (headline) and within_tolerance as contracts.Estimate; of how many pairs of answers; same: how many
        of them are one answer, within: how many others are of about equal length; people.
    """
    rates: dict[str, list[tuple[Array, Array]]] = {}
    pairs = same = within = 0
    for judge, policy, against in comparisons:
        votes = np.stack([judge.votes(policy, other) for other in against])  # [others, people, n]
        longer = np.stack([policy.words - other.words for other in against])  # [others, n]
        differ = np.array([[a != b for a, b in zip(policy.texts, other.texts, strict=True)] for other in against])
        near = differ & (-np.expm1(-np.abs(longer)) <= settings.length_tolerance)
        curves = [_at_equal_length(*of_other) for of_other in zip(votes, longer, differ, strict=True)]
        close = np.einsum("opn,on->pn", votes, near) / np.maximum(near.sum(axis=0), 1)
        always = np.ones_like(close, dtype=bool)
        rates.setdefault("raw", []).append((votes.mean(axis=0), always))
        rates.setdefault("equal_length", []).append((np.mean(curves, axis=0), always))
        rates.setdefault("within_tolerance", []).append((close, always & near.any(axis=0)))
        pairs, same, within = pairs + near.size, same + int((~differ).sum()), within + int(near.sum())
    told: dict[str, Any] = {}
    for name, parts in rates.items():
        values, valid = (np.concatenate(column) for column in zip(*parts, strict=True))
        bootstrap = _crossed(*values.shape, settings.replicates, settings.level, settings.seed)
        estimate = bootstrap.estimate(values.ravel(), valid.ravel(), np.ones(len(values), dtype=bool))
        told[name] = _share(estimate)
    return {**told, "pairs": pairs, "same": same, "within": within, "people": len(values)}


def _share(estimate: Estimate) -> dict[str, Any]:
    """An estimate of a share, whose interval says nothing beyond none and all."""
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (estimate.low, estimate.high))
    return Estimate(value=estimate.value, low=low, high=high, level=estimate.level).model_dump()


@lru_cache(maxsize=8)
def _crossed(people: int, prompts: int, replicates: int, level: float, seed: int) -> TwoWayBootstrap:
    """A bootstrap where everybody votes at every prompt."""
    worker = np.repeat(np.arange(people, dtype=np.int32), prompts)
    prompt = np.tile(np.arange(prompts), people)
    votes = Votes(np.empty((len(worker), 0)), np.ones(len(worker)), worker, prompt, people)
    return TwoWayBootstrap(votes, replicates, level, seed)


def _at_equal_length(votes: Array, longer: Array, differ: Array) -> Array:
    """Values [people, n] whose mean is the win rate at equal length, and whose spread is that of its influences.

    Args:
        votes: [people, n].
        longer: [n], the difference of log lengths.
        differ: [n] bool, whether the answers do.
    """
    share, n = votes.mean(axis=0), len(longer)
    x = np.stack([differ, longer / max(float(np.sqrt((longer**2).mean())), 1e-12)], axis=1)
    theta = fit_head(x, np.clip(share, 0.0, 1.0), np.ones(n), np.zeros(2), _PRECISION)
    fitted, equal = expit(x @ theta), expit(theta[0] * differ)  # as they are; were they equally long
    inverse = np.linalg.inv(gram(x, fitted * (1 - fitted)) + _PRECISION * np.eye(2))
    pull = float((equal * (1 - equal) * differ).sum()) * (x @ inverse[0])  # of a residual on the rate, in n-ths
    # A curve bends towards the prompts it was fitted to: what is left of them is enlarged, as HC3 does (MacKinnon and White
    # 1985, Journal of Econometrics 29(3)).
    leverage = fitted * (1 - fitted) * np.einsum("nd,de,ne->n", x, inverse, x)
    influence = pull * (votes - share + (share - fitted) / (1 - leverage))
    values: Array = equal + influence - influence.mean()
    return values


# --------------------------------------------------------------------------------------------------------------- the stage
def judge(
    policies: Mapping[str, Path],
    bundle: Path,
    comparisons: Path,
    embedded: Path,
    clustered: Path,
    settings: JudgeSettings,
) -> dict[str, Any]:
    """Let every policy answer the same test prompts, and let people choose.

    Args:
        policies: folders by name: start, global, coterie-0 ... A coterie may have none.
        bundle: that holds the rewards; they choose the best of n.
        comparisons: comparisons.parquet; beside it truth.json, where ingest simulated people.
        embedded, clustered: folders of those stages.
        settings: of this stage.

    Returns:
        wins: win rates as of `win_rates`, each with judge ("heldout" or "truth"), coterie (None: everybody), policy and
        against, which are names of policies, "own", "wrong", or as "coterie-0 best-of-16" the start's best by a reward.
        gates: as contracts.PolicyGate; everybody's own (coterie None) is the global policy. worst: the coterie whose people
        gain least over the start by what serves them. lengths (words) and finished (share) by policy. samples: prompts
        with everybody's answers. prompts, and prompts_left_out, which are too long for the policies. level, seed.

    Raises:
        BadData: an input is missing, or no test prompt is there. BadBundle: a policy or the bundle is damaged.
        BadConfiguration: a backbone or the encoder cannot be loaded, or the start or the global policy is not given.
    """
    if missing := sorted({START, GLOBAL} - policies.keys()):
        raise BadConfiguration(f"policies are judged against {' and '.join(missing)}; give the folder of it as well")
    scorer = load_scorer(Bundle.load(bundle))
    start = Policy.load(policies[START])
    prompts, left_out = _test_prompts(comparisons, start, settings)
    given: dict[str, list[Answer]] = {}
    for name, folder in progress(policies.items(), desc="judge", unit="policies"):
        policy = start if name == START else Policy.load(folder, start=policies[START])
        given[name] = [answers[0] for answers in _answer(policy, prompts, 1, settings.seed)]
    if settings.best_of > 1:
        samples = _answer(start, prompts, settings.best_of, settings.seed + 1)
        for name, scores in _scored(scorer, prompts, samples).items():
            given[_best(name, settings.best_of)] = best_of_n(samples, scores)
    answered = {name: Answers.of(prompts, answers, scorer.features) for name, answers in given.items()}

    judges: dict[str, Sequence[Judge | None]] = {"heldout": heldout_judges(embedded, clustered, settings.seed)}
    if about_style(comparisons.with_name("truth.json")):
        truth = SimulatedTruth.load(comparisons.with_name("truth.json"), comparisons)
        judges["truth"] = true_judges(truth, clustered)
    wins: list[dict[str, Any]] = []
    for kind, of_coteries in judges.items():
        together: dict[str, list[Comparison]] = {}  # everybody, each with the policy of their own coterie
        for coterie, one in zip([None, *range(len(of_coteries) - 1)], of_coteries, strict=True):
            if one is None:
                continue
            for name, against, others in _pairings(coterie, list(policies), settings.best_of):
                compared = Comparison(one, answered[name], [answered[other] for other in others])
                told = {"judge": kind, "coterie": coterie, "policy": name, "against": against}
                wins.append(told | win_rates([compared], settings))
                if coterie is not None and name == _name(coterie) and against in (START, GLOBAL, WRONG):
                    together.setdefault(against, []).append(compared)
        for against, parts in together.items():
            told = {"judge": kind, "coterie": None, "policy": OWN, "against": against}
            wins.append(told | win_rates(parts, settings))
    gates = _gates(wins, scorer.bundle.manifest.coteries, policies.keys())
    return {
        "wins": wins,
        "gates": [gate.model_dump() for gate in gates],
        "worst": _worst(wins, gates),
        "lengths": {name: _mean(np.expm1(a.words), settings.level).model_dump() for name, a in answered.items()},
        "finished": {name: _share(_mean(a.finished.astype(float), settings.level)) for name, a in answered.items()},
        "samples": [
            {"prompt": prompt, "answers": {name: answers[row]._asdict() for name, answers in given.items()}}
            for row, prompt in enumerate(prompts[:_SAMPLES])
        ],
        "prompts": len(prompts),
        "prompts_left_out": left_out,
        "level": settings.level,
        "seed": settings.seed,
    }


def _test_prompts(comparisons: Path, start: Policy, settings: JudgeSettings) -> tuple[list[str], int]:
    """Test prompts in random order, one of each prompt_id, and how many were too long for the policies."""
    table = COMPARISON.read(comparisons, ["prompt", "prompt_id", "split"])
    held = table.filter(pc.equal(table["split"].cast(pa.string()), TEST)).sort_by(
        [("prompt_id", "ascending"), ("prompt", "ascending")]
    )
    by_id = dict(zip(held["prompt_id"].to_pylist(), held["prompt"].to_pylist(), strict=True))
    different = list(by_id.values())
    kept: list[str] = []
    left_out = 0
    for row in np.random.default_rng(settings.seed).permutation(len(different)).tolist():
        if len(prompt_ids(start.tokenizer, [different[row]])[0]) > start.card.prompt_tokens:
            left_out += 1
        else:
            kept.append(different[row])
        if len(kept) == settings.prompts:
            break
    if not kept:
        raise BadData(
            f"{comparisons}: of {len(different)} test prompts none has at most the {start.card.prompt_tokens} tokens that the "
            "policies were tuned on. Raise align.prompt_tokens, or ingest.test_share."
        )
    return kept, left_out


def _answer(policy: Policy, prompts: list[str], n: int, seed: int) -> list[list[Answer]]:
    card = policy.card
    return policy.generate(prompts, n, max_tokens=card.response_tokens, temperature=card.temperature, seed=seed)


def _scored(scorer: Scorer, prompts: list[str], samples: list[list[Answer]]) -> dict[str, Array]:
    """Scores [prompts, n] of samples by the global reward and by what each coterie is served."""
    questions = [Question(p, [answer.text for answer in answers]) for p, answers in zip(prompts, samples, strict=True)]
    scored = scorer.score_many(questions)
    by_coterie = np.stack([one.by_coterie for one in scored])
    named = {f"coterie-{k}": by_coterie[:, :, k] for k in range(by_coterie.shape[2])}
    return {GLOBAL: np.stack([one.by_global for one in scored]), **named}


def _pairings(coterie: int | None, tuned: list[str], n: int) -> list[tuple[str, str, list[str]]]:
    """What the people of a coterie compare: a policy, what it is against, and the names of which that is the mean."""
    own = _name(coterie)
    pairings = [(name, START, [START]) for name in tuned if name != START]
    if n > 1:
        pairings.append((_best(own, n), START, [START]))
    if own in tuned:
        if n > 1:
            pairings.append((own, _best(own, n), [_best(own, n)]))
        if coterie is not None:
            pairings.append((own, GLOBAL, [GLOBAL]))
            others = [name for name in tuned if name not in (own, GLOBAL, START)]
            pairings += [(own, WRONG, others)] if others else []
    return pairings


def _best(name: str, n: int) -> str:
    return f"{name} best-of-{n}"


def _name(coterie: int | None) -> str:
    return GLOBAL if coterie is None else f"coterie-{coterie}"


def _gates(wins: list[dict[str, Any]], coteries: int, policies: Collection[str]) -> list[PolicyGate]:
    """The global policy serves if people surely prefer it to the start, a coterie's own if its people surely prefer it to what
    would serve them otherwise, and to the global one in any case; by held-out judges, at equal length."""
    rates = {
        (win["coterie"], win["policy"], win["against"]): Estimate(**win["equal_length"])
        for win in wins
        if win["judge"] == "heldout"
    }
    better, reason = _surely(rates.get((None, GLOBAL, START)), START)
    everybody = PolicyGate(coterie=None, serves="own" if better else "start", reason=reason)
    otherwise: Literal["global", "start"] = "global" if better else "start"
    gates = [everybody]
    for k in range(coteries):
        own = _name(k)
        if own not in policies:
            gates.append(PolicyGate(coterie=k, serves=otherwise, reason="no policy of its own was tuned"))
            continue
        tried = [_surely(rates.get((k, own, rival)), rival) for rival in dict.fromkeys((GLOBAL, otherwise))]
        serves = "own" if all(better for better, _ in tried) else otherwise
        gates.append(PolicyGate(coterie=k, serves=serves, reason="; ".join(reason for _, reason in tried)))
    return gates


def _surely(rate: Estimate | None, rival: str) -> tuple[bool, str]:
    """Whether a win rate is surely above one half, and that in words."""
    if rate is None or rate.low is None or rate.high is None:
        return False, f"fewer than {FEWEST_WORKERS} people with held-out votes, or too few prompts, for an interval"
    told = f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] of the votes against the {rival} policy at equal length"
    return rate.low > 0.5, told if rate.low > 0.5 else f"not surely preferred: {told}"


def _worst(wins: list[dict[str, Any]], gates: list[PolicyGate]) -> dict[str, Any] | None:
    """The coterie whose people prefer what serves them least to the start, by held-out judges and at equal length."""
    found = []
    for gate in gates:
        policy = {"own": _name(gate.coterie), "global": GLOBAL, "start": START}[gate.serves]
        wanted = ("heldout", gate.coterie, policy, START)
        rates = [w["equal_length"] for w in wins if (w["judge"], w["coterie"], w["policy"], w["against"]) == wanted]
        if policy == START:  # against itself
            rates = [Estimate(value=0.5, low=0.5, high=0.5).model_dump()]
        if gate.coterie is not None:
            found += [{"coterie": gate.coterie, "policy": policy, **rate} for rate in rates]
    return min(found, key=lambda worst: float(worst["value"]), default=None)


def _mean(values: Array, level: float) -> Estimate:
    """The mean over prompts [n], with the interval of Student's t."""
    value, error = float(values.mean()), float(stats.sem(values)) if len(values) > 1 else float("nan")
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    bounds = {} if np.isnan(half) else {"low": value - half, "high": value + half}
    return Estimate(value=value, level=level, **bounds)
