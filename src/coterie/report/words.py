"""What was found, in plain words: the sentences of the page, of the summary and of the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def verdict_line(metrics: Mapping[str, Any]) -> str:
    """The finding in one sentence."""
    chosen, workers = metrics["selection"], number(metrics["data"]["workers"])
    coteries = chosen["coteries"]
    if chosen["verdict"] == "one-taste" or coteries == 1:
        return f"One reward serves all {workers} workers."
    if chosen["verdict"] == "continuous":
        return (
            f"The {workers} workers’ tastes differ by degrees; {coteries} coteries sum them up, without sharp borders."
        )
    if chosen["insisted"]:
        return f"The {workers} workers in {coteries} coteries, as the recipe asked."
    return f"The {workers} workers fall into {coteries} coteries that want different things."


def evidence(metrics: Mapping[str, Any]) -> list[str]:
    """How sure that is: the test, the held-out gain, the stability, what is served; a sentence each."""
    chosen, seen = metrics["selection"], metrics["heldout"]["seen"]
    gain = seen["difference_to_pooled"]
    one = chosen["coteries"] == 1
    sentences = []
    test = metrics.get("heterogeneity") or {}
    if "p_value" in test:
        p = float(test["p_value"])
        said = "is more than chance and carelessness explain" if p < 0.05 else "is what chance and carelessness explain"
        sentences.append(f"The disagreement between workers {said} (p = {p:.3g}).")
    if one:
        sentences.append(
            f"On prompts kept out of training it predicts {share(seen['accuracy'])} of the choices, every worker counted alike."
        )
        divided = [c for c in chosen["candidates"] if c["member"] not in ("pooled", "reliability")]
        if divided and all(c["gain"] <= c["standard_error"] for c in divided):
            sentences.append(
                "No division of the workers predicted held-out choices better by more than one standard error."
            )
        return sentences
    sentences.append(
        f"On prompts kept out of training, personalised scores predict {share(seen['accuracy'])} of the choices: "
        f"{points(gain['accuracy'])} points against one reward for all."
    )
    own = sum(coterie["serves"] == "own" for coterie in metrics["coteries"])
    count = "None" if not own else "All" if own == chosen["coteries"] else f"{own} of {chosen['coteries']}"
    served = "is served by a reward of its own" if own <= 1 else "are served by rewards of their own"
    sentences.append(
        f"{count} of the coteries {served}." if count in ("None", "All") else f"{count} coteries {served}."
    )
    ari = metrics["stability"].get("half_split_ari")
    if ari is not None:
        judged = "the groups are stable" if ari >= 0.3 else "the borders between the groups are not stable"
        sentences.append(
            f"Fitted on two halves of each worker’s comparisons, the groupings agree with an adjusted Rand index of {ari:.2f}: "
            f"{judged}."
        )
    return sentences


def report_markdown(metrics: Mapping[str, Any]) -> str:
    """A short summary of contracts.Metrics as Markdown, for the pipeline's user interface."""
    seen, gain = metrics["heldout"]["seen"], metrics["heldout"]["seen"]["difference_to_pooled"]
    facts = {
        "Workers": number(metrics["data"]["workers"]),
        "Comparisons": number(metrics["data"]["comparisons"]),
        "Refused rows": number(metrics["data"]["refused"]),
        "Held-out accuracy": share(seen["accuracy"]),
        "against one reward for all, points": points(gain["accuracy"]),
        "Held-out log-loss": f"{seen['log_loss']:.4f}",
        "against one reward for all": nats(gain["log_loss"]),
        "Worst coterie, accuracy": share(metrics["worst"].get("coterie")),
        "Worst tenth of workers, accuracy": share(metrics["worst"].get("decile")),
    }
    if metrics.get("truth"):
        facts |= {f"Truth: {name.replace('_', ' ')}": f"{value:.3f}" for name, value in metrics["truth"].items()}
    lines = [f"# {verdict_line(metrics)}", "", *(f"{sentence}  " for sentence in evidence(metrics)), ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    if len(metrics["coteries"]) > 1:
        lines += ["", "| coterie | workers | serves | own − global, points | likes |", "|---|---|---|---|---|"]
        lines += [
            f"| {c['id']} | {number(c['workers'])} | {c['serves']} | {points(c['own_vs_global']['accuracy'])} | "
            f"{'; '.join(c['likes']).replace('|', '/') or '–'} |"
            for c in metrics["coteries"]
        ]
    return "\n".join(lines) + "\n"
