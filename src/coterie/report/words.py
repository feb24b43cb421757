"""What was found, in plain words: the sentences of the page, of the summary and of the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import expm1
from typing import Any

from coterie.discovery.discover import LEVEL
from coterie.discovery.stability import STABLE

# A member of the family: as a chart's legend has it, and what it says about people.
MEMBERS: dict[str, tuple[str, str]] = {
    "pooled": ("one reward", "everybody wants the same"),
    "reliability": ("one reward, care counted", "everybody wants the same, some answer with less care"),
    "mixture": ("groups", "{} groups who want different things"),
    "lowrank": ("by degrees", "tastes differ by degrees, along {} direction{s}"),
    "slopes": ("each their own", "everybody differs from everybody, in all {} features"),
}


# -------------------------------------------------------------------------------------------------------------- numbers
def number(value: float) -> str:
    """A count with separators: 12,000."""
    return f"{value:,.0f}"


def share(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 71.2 %."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def signed(value: float | None, digits: int) -> str:
    """A signed number with a true minus."""
    if value is None or value != value:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def points(estimate: Mapping[str, Any] | None) -> str:
    """A difference of accuracies in percentage points, with its interval: +2.1 [+1.2, +3.0]."""
    return interval(estimate, 100, 1, sign=True)


def nats(estimate: Mapping[str, Any] | None) -> str:
    """A difference of log-losses in nats, with its interval: −0.013 [−0.019, −0.007]."""
    return interval(estimate, 1, 3, sign=True)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def size(count: float) -> str:
    """Bytes as 512 MB or 1.2 GB."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def interval(estimate: Mapping[str, Any] | None, factor: float = 1, digits: int = 1, sign: bool = False) -> str:
    """A contracts.Estimate times `factor` with its interval, if it has one; `sign` shows a plus."""
    if estimate is None or estimate["value"] is None or estimate["value"] != estimate["value"]:
        return "–"

    def told(value: float) -> str:
        return signed(factor * value, digits) if sign else f"{factor * value:.{digits}f}"

    if estimate["low"] is None:
        return told(estimate["value"])
    return f"{told(estimate['value'])} [{told(estimate['low'])}, {told(estimate['high'])}]"


def sure(confidence: float) -> str:
    """A share of resamples, which cannot tell 100 % from a little less: 93 %, over 99 %."""
    return "over 99 %" if confidence > 0.995 else share(confidence, 0)


def chances(p: float) -> str:
    """A probability as what one meets: 1 of 60, 42 of 100."""
    return f"{round(100 * p)} of 100" if p >= 0.1 else f"1 of {number(round(1 / p))}"


# -------------------------------------------------------------------------------------------------------------- verdict
def verdict_line(metrics: Mapping[str, Any]) -> str:
    """The finding in one sentence, and how sure it is."""
    chosen, people = metrics["selection"], f"{number(metrics['data']['workers'])} annotators"
    coteries, ships = chosen["coteries"], chosen.get("ships")
    confidence = _confidence(chosen)
    if chosen.get("insisted"):
        served = {
            "one-reward": "share one reward",
            "embedding": "are each served by their own place among all tastes",
        }.get(str(ships), f"are served in {coteries} coteries" if coteries > 1 else "share one reward")
        return f"Your {people} {served} because the recipe insisted; the data say {_said(chosen)}{confidence}."
    if chosen["verdict"] == "one-taste":
        return f"One reward serves all {people}{_at_most(chosen) or confidence}."
    if chosen["verdict"] == "continuous":
        apart = {
            "embedding": ": each is served by their own place among all tastes",
            "one-reward": ": too little to be served apart",
        }.get(str(ships), "")
        summed = f"{', and' if apart else ':'} {coteries} coteries only sum them up" if coteries > 1 else ""
        return f"Your {people} differ by degrees, not in groups{confidence}{apart}{summed}."
    return f"Your {people} fall into {coteries} coteries that want different things{confidence}."


def _confidence(chosen: Mapping[str, Any]) -> str:
    confidence = chosen.get("confidence")
    return " (how sure that is was not measured)" if confidence is None else f" (confidence {sure(confidence)})"


def _said(chosen: Mapping[str, Any]) -> str:
    return {
        "one-taste": "that one reward serves everybody",
        "continuous": "that tastes differ by degrees, not in groups",
        "coteries": "that there are groups who want different things",
    }[chosen["verdict"]]


def _at_most(chosen: Mapping[str, Any]) -> str | None:
    """What a division would gain at most. A gain of g nats makes the choices exp(g) times as probable, on average."""
    gain = chosen.get("gain")
    if gain is None or gain["high"] is None:
        return None
    level = f"({share(gain['level'], 0)} sure)"
    if gain["high"] <= 0:
        return f": splitting them would predict their choices no better {level}"
    return f": splitting them would predict their choices at most {100 * expm1(gain['high']):.1f} % better {level}"


# ------------------------------------------------------------------------------------------------------------- evidence
def evidence(metrics: Mapping[str, Any]) -> list[str]:
    """How sure that is: the test, the held-out gain, the stability, what is served, the worst served; a sentence each."""
    chosen = metrics["selection"]
    told = [
        _tested(metrics.get("heterogeneity")),
        _confirmed(chosen),
        _gained(metrics["heldout"]["seen"], _personal(metrics)),
        _stability(metrics) if chosen["coteries"] > 1 else None,
        _served(metrics),
        _worst(metrics["worst"]),
    ]
    return [sentence for sentence in told if sentence]


def _personal(metrics: Mapping[str, Any]) -> bool:
    """Whether anybody is served by anything but the one reward."""
    ships = metrics["selection"].get("ships")
    return ships == "embedding" or (ships != "one-reward" and any(c["serves"] == "own" for c in metrics["coteries"]))


def _tested(test: Mapping[str, Any] | None) -> str:
    if not test or not test.get("replicates"):
        return "Whether tastes differ at all was not tested."
    p = float(test["p_value"])
    alike = "made-up data in which everybody wants the same, and some are careless, look like that in"
    if p < LEVEL:
        return (
            f"The annotators disagree by more than chance and carelessness explain: {alike} at most {chances(p)} cases."
        )
    return f"Chance and carelessness explain the annotators’ disagreement: {alike} about {chances(p)} cases."


def _confirmed(chosen: Mapping[str, Any]) -> str | None:
    """One taste: the bound of the first line in the unit of the tables, and the verdict's own confidence."""
    gain, confidence = chosen.get("gain"), chosen.get("confidence")
    if chosen["verdict"] != "one-taste" or chosen.get("insisted") or gain is None or confidence is None:
        return None
    return (
        f"The best division that was tried gains {interval(gain, 1000, 1, sign=True)} thousandths of a nat a comparison; "
        f"of redrawn sets of annotators, {sure(confidence)} give the same verdict."
    )


def _gained(seen: Mapping[str, Any], personal: bool) -> str:
    who = "personal scores predict" if personal else "the one reward predicts"
    told = f"On prompts kept out of training, {who} {share(seen['accuracy'])} of the choices"
    gain = seen["difference_to_pooled"]["accuracy"]
    if not personal or gain["value"] is None:
        return f"{told}, every annotator counting alike."
    told = f"{told}: {signed(100 * gain['value'], 1)} points against one reward for all"
    if gain["low"] is None:
        return f"{told}; the annotators are too few to say how sure that is."
    low, high = (signed(100 * gain[end], 1) for end in ("low", "high"))
    return f"{told} ({share(gain['level'], 0)} sure: between {low} and {high})."


def _stability(metrics: Mapping[str, Any]) -> str | None:
    ari = metrics["stability"].get("half_split_ari")
    if ari is None:
        return None
    judged = "they are stable" if ari >= STABLE else "their borders are not stable"
    return (
        f"Found twice, from two halves of everybody’s comparisons, the groups agree by {ari:.2f} (1 is the same, 0 is "
        f"chance): {judged}."
    )


def _served(metrics: Mapping[str, Any]) -> str | None:
    chosen = metrics["selection"]
    coteries, ships = chosen["coteries"], chosen.get("ships")
    if ships == "embedding":
        summary = f" The {coteries} coteries are a summary of them, no more." if coteries > 1 else ""
        return f"Everybody is served by a reward of their own, made from their place among all tastes.{summary}"
    if ships == "one-reward" or coteries == 1:
        return None if chosen["verdict"] == "one-taste" else "Everybody is served by the one reward."
    own = sum(coterie["serves"] == "own" for coterie in metrics["coteries"])
    if own == coteries:
        return "All coteries are served by rewards of their own."
    if not own:
        return "No coterie has proved a reward of its own: all are served by the global one."
    are = "is served by a reward of its own" if own == 1 else "are served by rewards of their own"
    return f"{own} of the {coteries} coteries {are}, the others by the global one."


def _worst(worst: Mapping[str, float]) -> str | None:
    if "decile" not in worst:
        return None
    return f"The tenth of the annotators who are served worst see {share(worst['decile'])} of their choices predicted."


def tried(candidate: Mapping[str, Any]) -> str:
    """What a contracts.Candidate says about people."""
    count = candidate["size"]
    return MEMBERS[candidate["member"]][1].format(number(count), s="" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------------------- policies
def policies_line(gates: Sequence[Mapping[str, Any]], level: float) -> str:
    """Whose policy answers whom and how sure that is, in one sentence; gates are contracts.PolicyGate as dicts."""
    serves = {gate["coterie"]: gate["serves"] for gate in gates}
    own = [str(k) for k, served in serves.items() if k is not None and served == "own"]
    coteries, sure = len(serves) - 1, f"({share(level, 0)} sure{' of each' if len(own) > 1 else ''})"
    if own:
        who = "Each coterie" if 1 < len(own) == coteries else f"Coterie {own[0]}"
        answered = "is answered by a policy of its own, which its people prefer"
        if 1 < len(own) < coteries:
            who = f"Coteries {', '.join(own[:-1])} and {own[-1]}"
            answered = "are answered by policies of their own, which their people prefer"
        others = "strangers" if len(own) == coteries else "everybody else"
        common = "the global one" if serves[None] == "own" else "the one that tuning started from"
        return f"{who} {answered} to the global one {sure}; {others} by {common}."
    if serves[None] == "own":
        others = "; no coterie has earned one of its own" if coteries else ""
        return f"Everybody is answered by the global policy, which people prefer to the start of its tuning {sure}{others}."
    told = f"No tuned policy has proved itself at {share(level, 0)} certainty"
    return f"{told}: everybody is answered by the one that tuning started from."


def policies_evidence(
    judged: Mapping[str, Any], wins: Mapping[int | None, Mapping[str, Mapping[str, Mapping[str, Any]]]]
) -> list[str]:
    """What else the judges say: the simulated truth, the best of n, who gains least; a sentence each.

    Args:
        judged: what policies.judging.judge returns.
        wins: its win rates by whose people compare, what they compare ("own v. start") and judge.
    """
    told = [
        f"All policies answered the same {number(judged['prompts'])} test prompts. Which answers people prefer, if both are "
        "equally long, is said by rewards of held-out votes, which no policy was tuned on."
    ]
    truth = [
        f"{label.replace(' v. ', ' against ')} {rate(by['truth']['equal_length'])}"
        for label, by in wins[None].items()
        if "truth" in by and "best of" not in label
    ]
    if truth:
        told.append(f"The simulated annotators’ true tastes say: {', '.join(truth)}.")
    against = [
        (label.partition(" v. ")[2], k, by["heldout"]["equal_length"])
        for k, rows in wins.items()
        for label, by in rows.items()
        if "v. best of" in label and "heldout" in by
    ]
    if against:
        votes = [f"{rate(win)} {'of everybody’s votes' if k is None else f'in coterie {k}'}" for _, k, win in against]
        told.append(
            f"The same reward can also choose the {against[0][0]} answers of the start, without any tuning. Against that "
            f"choice the tuned policies get {', '.join(votes)}."
        )
    worst = judged["worst"]
    if worst and worst["coterie"] in wins:
        policy = "their own policy" if worst["policy"].startswith("coterie-") else f"the {worst['policy']} policy"
        gain = "" if worst["policy"] == "start" else f", which gets {rate(worst)} of their votes against the start"
        told.append(f"Coterie {worst['coterie']} gains least: its people are answered by {policy}{gain}.")
    return told


def rate(estimate: Mapping[str, Any]) -> str:
    """A share with its interval: 58.3 % [54.1, 62.2]."""
    ends = "" if estimate["low"] is None else f" [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"
    return share(estimate["value"]) + ends


# -------------------------------------------------------------------------------------------------------------- summary
def report_markdown(metrics: Mapping[str, Any]) -> str:
    """A short summary of contracts.Metrics as Markdown, for the pipeline's user interface."""
    seen, gain = metrics["heldout"]["seen"], metrics["heldout"]["seen"]["difference_to_pooled"]
    facts = {
        "Annotators": number(metrics["data"]["workers"]),
        "Comparisons": number(metrics["data"]["comparisons"]),
        "Refused rows": number(metrics["data"]["refused"]),
        "Held-out accuracy": share(seen["accuracy"]),
        "against one reward for all, points": points(gain["accuracy"]),
        "Held-out log-loss": "–" if seen["log_loss"] is None else f"{seen['log_loss']:.4f}",
        "against one reward for all": nats(gain["log_loss"]),
        "Worst coterie, accuracy": share(metrics["worst"].get("coterie")),
        "Worst tenth of annotators, accuracy": share(metrics["worst"].get("decile")),
    }
    facts |= {
        f"New annotators after {shots} comparisons, points": points(point["difference_to_pooled"]["accuracy"])
        for shots, point in metrics["heldout"].get("unseen_by_shots", {}).items()
    }
    if metrics.get("truth"):
        facts |= {f"Truth: {name.replace('_', ' ')}": f"{value:.3f}" for name, value in metrics["truth"].items()}
    lines = [f"# {verdict_line(metrics)}", "", *(f"{sentence}  " for sentence in evidence(metrics)), ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    if len(metrics["coteries"]) > 1:
        lines += ["", "| coterie | annotators | serves | own − global, points | likes |", "|---|---|---|---|---|"]
        lines += [
            f"| {c['id']} | {number(c['workers'])} | {c['serves']} | {points(c['own_vs_global']['accuracy'])} | "
            f"{'; '.join(c['likes']).replace('|', '/') or '–'} |"
            for c in metrics["coteries"]
        ]
    return "\n".join(lines) + "\n"
