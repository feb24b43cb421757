"""policies.html: whose policy answers whom, whose answers people prefer, and how tuning went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from coterie.contracts import GLOBAL
from coterie.policies.judging import OWN, WRONG
from coterie.policies.policy import START
from coterie.report import charts, words
from coterie.report.drawing import glyph
from coterie.report.page import write_page
from coterie.report.pairs import excerpt

_COTERIE, _BEST = "coterie-", " best-of-"  # in names of policies: before a coterie's number, and before n
_SIDES = (OWN, START, GLOBAL, WRONG)  # in this order; the best of n is the last


def write_policies_page(
    judged: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]], out: Path, title: str
) -> None:
    """Write the page about the policies of a run.

    Args:
        judged: what policies.judging.judge returns.
        tuned: by name what the stage of each policy returns: policies.make_start of the start, policies.align of the others.
        out: the file.
        title: of the page.
    """
    gates = sorted(judged["gates"], key=lambda gate: _number(gate["coterie"]))
    if len(gates) == 2 and f"{_COTERIE}0" not in tuned:  # the only coterie, without a policy of its own, is everybody
        gates = gates[:1]
    groups = [gate["coterie"] for gate in gates]
    wins = _compared(judged["wins"], groups)
    called = {name: _called(name) for name in sorted(judged["lengths"], key=_own_first) if _coterie(name) in groups}
    policies = {name: dict(tuned[name]) for name in sorted(tuned, key=_own_first) if name != START}
    for made in policies.values():
        mean, sd = made["reward_start"]["mean"], made["reward_start"]["sd"]
        made["risen"] = (made["reward_end"] - mean) / sd
        made["rewards"] = [(at["step"], (at["reward"] - mean) / sd) for at in made["curve"]]
        made["divergence"] = [(at["step"], at["kl"]) for at in made["curve"]]

    def training(name: str, label: str, unit: str) -> str | None:
        return charts.training(name, label, unit, [(_coterie(policy), made[name]) for policy, made in policies.items()])

    drawn = {
        "wins": charts.win_rates(wins),
        "rewards": training("rewards", "Reward of the policies over their tuning", "sd above the start"),
        "divergence": training("divergence", "Divergence of the policies over their tuning", "nats from the start"),
    }
    context = {
        "title": title,
        "verdict": words.policies_line(gates, judged["level"]),
        "evidence": words.policies_evidence(judged, wins),
        "judged": judged,
        "gates": gates,
        "wins": wins,
        "truth": any("truth" in judges for rows in wins.values() for judges in rows.values()),
        "start": tuned[START],
        "policies": policies,
        "called": called,
        "samples": [
            (excerpt(sample["prompt"]), {name: sample["answers"][name] for name in called if _BEST not in name})
            for sample in judged["samples"]
        ],
        "glyphs": {k: Markup(glyph(k)) for k in groups if k is not None},
        # Our own charts: nothing of the data is markup in them.
        "charts": {name: None if svg is None else Markup(svg) for name, svg in drawn.items()},
    }
    write_page("policies.html.j2", context, out)


def _compared(
    wins: Sequence[Mapping[str, Any]], groups: Sequence[int | None]
) -> dict[int | None, dict[str, dict[str, Any]]]:
    """Win rates by whose people judge (of `groups`), what they compare, and judge; no other coterie's policy by itself."""

    def side(name: str, coterie: int | None) -> str | None:
        base, best, n = name.partition(_BEST)
        if best:
            return f"best of {n}" if _coterie(base) == coterie else None
        if name in _SIDES:
            return name
        return OWN if _coterie(name) == coterie else None

    def place(name: str) -> int:
        return _SIDES.index(name) if name in _SIDES else len(_SIDES)

    found = [(win, side(win["policy"], win["coterie"]), side(win["against"], win["coterie"])) for win in wins]
    rows = [(win, one, other) for win, one, other in found if one and other and win["coterie"] in groups]
    compared: dict[int | None, dict[str, dict[str, Any]]] = {}
    for win, one, other in sorted(rows, key=lambda row: (_number(row[0]["coterie"]), place(row[1]), place(row[2]))):
        compared.setdefault(win["coterie"], {}).setdefault(f"{one} v. {other}", {})[win["judge"]] = win
    return compared


def _called(name: str) -> tuple[int | None, str]:
    """Of which coterie a policy is, and what it is called on the page."""
    base, best, n = name.partition(_BEST)
    coterie = _coterie(base)
    told = base if coterie is None else f"coterie {coterie}"
    return coterie, f"{told}, best of {n}" if best else told


def _coterie(name: str) -> int | None:
    """The coterie in the name of a policy; None: everybody's."""
    base = name.partition(_BEST)[0]
    return int(base.removeprefix(_COTERIE)) if base.startswith(_COTERIE) else None


def _own_first(name: str) -> tuple[bool, bool, int, str]:
    """Places policies: the coteries', the global one, the start, and in the same order what is the best of n."""
    coterie = _coterie(name)
    return _BEST in name, coterie is None, _number(coterie), name


def _number(coterie: int | None) -> int:
    """Places everybody (None) before the coteries."""
    return -1 if coterie is None else coterie
