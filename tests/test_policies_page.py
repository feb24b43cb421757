"""The page about policies: whose answers whom comes first, and what it shows is what the judges and the trainers said."""

import re

import numpy as np
import pytest

from coterie.report import charts
from coterie.report.policies import write_policies_page
from coterie.report.words import policies_line, share
from tests.test_report import Page, number

RATES = ("equal_length", "raw", "within_tolerance")


def judged_by(coteries=2, own=(0, 1), judges=("heldout", "truth"), best=16, interval=0.03):
    """What the judges say of these coteries' own policies, the global one, the start and the best of n of it."""
    rng = np.random.default_rng(0)

    def rate():
        value = round(float(rng.uniform(0.3, 0.7)), 3)
        return number(value) if interval is None else number(value, value - interval, value + interval)

    def win(judge, coterie, policy, against):
        told = {"judge": judge, "coterie": coterie, "policy": policy, "against": against}
        return told | {name: rate() for name in RATES} | {"pairs": 200, "within": 31, "people": 60}

    policies = ["global", *(f"coterie-{k}" for k in own), "start"]
    bests = {k: f"{'global' if k is None else f'coterie-{k}'} best-of-{best}" for k in [None, *range(coteries)]}
    wins = []
    for judge in judges:
        for k in [None, *range(coteries)]:
            name = "global" if k is None else f"coterie-{k}"
            pairings = [(policy, "start") for policy in policies[:-1]] + [(bests[k], "start")]
            pairings += [(name, bests[k])] if name in policies else []
            pairings += [(name, "global"), (name, "wrong")] if k in own else []
            wins += [win(judge, k, *pairing) for pairing in pairings]
        wins += [win(judge, None, "own", against) for against in ("start", "global", "wrong") if own]
    names = [*policies, *bests.values()]
    return {
        "wins": wins,
        "gates": [gate(None, "own"), *(gate(k, "own" if k in own else "global") for k in range(coteries))],
        "worst": {"coterie": 0, "policy": "coterie-0" if 0 in own else "global", **number(0.512, 0.491, 0.533)},
        "lengths": {name: number(20 + place, 19.5 + place, 20.5 + place) for place, name in enumerate(names)},
        "finished": {name: number((90 - place) / 100) for place, name in enumerate(names)},
        "samples": [
            {"prompt": f"Question {n}?", "answers": {name: answer(f"{name} says {n}.", name) for name in names}}
            for n in range(2)
        ],
        "prompts": 187,
        "prompts_left_out": 13,
        "level": 0.95,
        "seed": 4,
    }


def gate(coterie, serves):
    return {"coterie": coterie, "serves": serves, "reason": f"so many votes of {coterie}"}


def answer(text, name):
    return {"text": text, "finished": name != "start"}


def tuned_as(*names, steps=40):
    """What the stages of these policies said, and the start's."""
    made = {"start": {"examples": 1204, "examples_left_out": 3, "steps": 0, "seed": 0, "curve": []}}
    for place, name in enumerate(names):
        curve = [{"step": s, "reward": 1.5 + 0.05 * s, "kl": (1 + place) * 0.1 * s} for s in range(1, steps + 1)]
        made[name] = {
            "steps": steps - place, "stopped": "it went too far" if place == 1 else None,
            "reward_start": {"mean": 1.5, "sd": 0.5}, "reward_end": 2.5 + 0.1 * place, "kl_end": 4.25 + place,
            "finished_start": 0.72, "finished_end": 0.93, "curve": curve,
        }  # fmt: skip
    return made


def write(tmp_path, judged, tuned, title="a run"):
    write_policies_page(judged, tuned, tmp_path / "policies.html", title)
    html = (tmp_path / "policies.html").read_text(encoding="utf-8")
    return html, Page(html)


TWO = tuned_as("global", "coterie-1", "coterie-0")


def test_the_page_is_valid_and_asks_for_nothing_outside_itself(tmp_path):
    html, page = write(tmp_path, judged_by(), TWO)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|@import|src=|url\((?!#)", html)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(page.ids)
    assert page.text["h1"] == page.text["title"]
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Who is answered by what",
        "Whose answers people prefer",
        "Answers side by side",
        "How long the answers are",
        "How tuning went",
        "Words used here",
        "How it was judged",
    ]
    assert write(tmp_path, judged_by(), TWO)[0] == html


@pytest.mark.parametrize(
    ("serves", "says"),
    [
        (
            ["own", "own", "own"],
            "Each coterie is answered by a policy of its own, which its people prefer to the global one (95 % sure of "
            "each); strangers by the global one.",
        ),
        (
            ["start", "own", "own", "start"],
            "Coteries 0 and 1 are answered by policies of their own, which their people prefer to the global one (95 % sure "
            "of each); everybody else by the one that tuning started from.",
        ),
        (
            ["own", "global", "own"],
            "Coterie 1 is answered by a policy of its own, which its people prefer to the global one (95 % sure); everybody "
            "else by the global one.",
        ),
        (
            ["own", "global", "global"],
            "Everybody is answered by the global policy, which people prefer to the start of its tuning (95 % sure); no "
            "coterie has earned one of its own.",
        ),
        (
            ["own"],
            "Everybody is answered by the global policy, which people prefer to the start of its tuning (95 % sure).",
        ),
        (
            ["start", "start", "start"],
            "No tuned policy has proved itself at 95 % certainty: everybody is answered by the one that tuning started from.",
        ),
    ],
)
def test_the_first_line_says_whose_policy_answers_whom(serves, says):
    gates = [gate(k, policy) for k, policy in zip([None, 0, 1, 2], serves, strict=False)]
    assert policies_line(gates, 0.95) == says


def shown_rates(html):
    """Cells of the table of win rates, by whose votes and what is compared."""
    table = re.search(r'<table class="dense">.*?</table>', html, re.DOTALL)[0].split("<tbody>")[1]
    found, people = {}, None
    for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL):
        if heading := re.search(r'<th colspan="\d">.*?(everybody|coterie \d+)</th>', row, re.DOTALL):
            people = heading[1]
            continue
        label = re.search(r"<td>(.*?)</td>", row)[1]
        cells = re.findall(
            r'<td class="n">(<b>)?([\d.–]+)[^<]*(?:</b>)?(?:<small>([\d.]+) to ([\d.]+)</small>)?</td>', row
        )
        found[people, label] = [(bool(bold), value, low, high) for bold, value, low, high in cells]
    return found


def test_every_win_rate_is_that_of_its_judge(tmp_path):
    judged = judged_by()
    shown = shown_rates(write(tmp_path, judged, TWO)[0])

    def rates(judge, coterie, policy, against, names):
        wanted = (judge, coterie, policy, against)
        win = next(w for w in judged["wins"] if (w["judge"], w["coterie"], w["policy"], w["against"]) == wanted)
        return [
            (win[name]["low"] > 0.5, *(f"{100 * win[name][end]:.1f}" for end in ("value", "low", "high")))
            for name in names
        ]

    rows = {(None, "own v. start"): ("own", "start"), (None, "own v. wrong"): ("own", "wrong")}
    rows |= {
        (None, "global v. start"): ("global", "start"),
        (None, "global v. best of 16"): ("global", "global best-of-16"),
    }
    for k in (0, 1):
        own, best = f"coterie-{k}", f"coterie-{k} best-of-16"
        rows |= {
            (k, "own v. start"): (own, "start"),
            (k, "own v. global"): (own, "global"),
            (k, "own v. wrong"): (own, "wrong"),
        }
        rows |= {(k, "best of 16 v. start"): (best, "start"), (k, "own v. best of 16"): (own, best)}
        rows |= {(k, "global v. start"): ("global", "start")}
    for (k, label), pairing in rows.items():
        cells = rates("heldout", k, *pairing, RATES) + rates("truth", k, *pairing, RATES[:2])
        assert shown["everybody" if k is None else f"coterie {k}", label] == cells
    # Six of everybody's and six of each coterie's: another coterie's policy stands in the mean over the wrong ones alone.
    assert len(shown) == 18


def test_the_forest_draws_each_rate_where_its_axis_says():
    wins = {None: {}, 1: {}}
    values = {"own v. start": (0.62, 0.55), "own v. global": (0.48, 0.51)}
    for rows in wins.values():
        for label, (heldout, truth) in values.items():
            rates = {"heldout": number(heldout, heldout - 0.05, heldout + 0.05), "truth": number(truth, None, None)}
            rows[label] = {judge: {"equal_length": rate} for judge, rate in rates.items()}
    svg = charts.win_rates(wins)
    axis = re.findall(r'text-anchor: middle[^>]* x="([\d.]+)"[^>]*>([\d.]+)</text>', svg)
    at, percent = np.array(axis, float).T
    read = np.poly1d(np.polyfit(at, percent, 1))
    marks = re.findall(r'<use href="[^"]*" x="([\d.]+)"[^>]*style="fill: (#\w+)', svg)[:8]  # others are the legend's
    np.testing.assert_allclose(read([float(x) for x, _ in marks]), 2 * [62, 55, 48, 51], atol=0.01)
    assert [fill == "#ffffff" for _, fill in marks] == 4 * [False, True]
    bar = re.findall(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" clip-path="[^"]*" style="[^"]*stroke-width: 1.4', svg)
    np.testing.assert_allclose(read(np.array(bar, float).ravel()), 2 * [57, 67, 43, 53], atol=0.01)
    assert "simulated truth" in svg
    for rows in wins.values():
        for judges in rows.values():
            judges.pop("truth")
    assert "simulated truth" not in charts.win_rates(wins)


def test_the_gates_are_told_with_their_reasons(tmp_path):
    html, page = write(tmp_path, judged_by(coteries=3, own=(0, 2)), tuned_as("coterie-0", "coterie-2", "global"))
    table = re.search(r"<th>because</th>.*?</table>", html, re.DOTALL)[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><th.*?</tr>", table, re.DOTALL)]
    served = ["the global policy", "their own", "the global policy", "their own"]
    assert rows == [[by, f"so many votes of {k}"] for by, k in zip(served, (None, 0, 1, 2), strict=True)]
    assert (
        "Coterie 0 gains least: its people are answered by their own policy, which gets 51.2 % [49.1, 53.3]"
        in page.read
    )
    assert ("coterie 1", "own v. start") not in shown_rates(html)
    assert ("coterie 1", "global v. start") in shown_rates(html)


def test_answers_stand_side_by_side_the_own_ones_first(tmp_path):
    html, _ = write(tmp_path, judged_by(), TWO)
    pairs = re.findall(r'<div class="pair"><p>(.*?)</p>(.*?)</div></div>', html, re.DOTALL)
    assert [prompt for prompt, _ in pairs] == ["Question 0?", "Question 1?"]
    texts = [re.findall(r"<b>(?:<svg.*?</svg>)?([^<]*)</b>([^<]*)", answers, re.DOTALL) for _, answers in pairs]
    assert texts[1] == [
        ("coterie 0", "coterie-0 says 1."),
        ("coterie 1", "coterie-1 says 1."),
        ("global", "global says 1."),
        ("start, not finished", "start says 1."),
    ]


def test_text_from_outside_is_shown_and_never_markup(tmp_path):
    judged = judged_by()
    judged["samples"][0]["prompt"] = "<script>alert(1)</script> & why?"
    judged["samples"][0]["answers"]["global"]["text"] = "</div><img src=x onerror=alert(2)>"
    judged["gates"][1]["reason"] = "<i>none</i>"
    html, page = write(tmp_path, judged, TWO, title="</title><b>bold</b>")
    assert not page.tags & {"script", "img"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; why?" in html
    assert "&lt;/div&gt;&lt;img src=x onerror=alert(2)&gt;" in html
    assert "&lt;i&gt;none" in html
    assert "<b>bold" not in html


def test_lengths_and_finished_shares_of_all_that_answered(tmp_path):
    judged = judged_by()
    html, _ = write(tmp_path, judged, TWO)
    table = re.search(r"finished</th>.*?</table>", html, re.DOTALL)[0]
    row = r'<tr><th>(?:<svg.*?</svg>)?([^<]*)</th><td class="n">([\d.]+)<small>([\d.]+) to ([\d.]+)</small></td>\s*<td class="n">([^<]*)<'
    found = {name: numbers for name, *numbers in re.findall(row, table, re.DOTALL)}
    assert len(found) == 7
    called = {"start": "start", "coterie-1": "coterie 1", "coterie-1 best-of-16": "coterie 1, best of 16"}
    for name, told in called.items():
        ends = [f"{judged['lengths'][name][end]:.1f}" for end in ("value", "low", "high")]
        assert found[told] == [*ends, share(judged["finished"][name]["value"]).replace(" ", "\u00a0")]


def test_how_tuning_went_is_told_in_deviations_of_the_start(tmp_path):
    html, page = write(tmp_path, judged_by(), TWO)
    assert (
        "coterie 0 +2.40 6.25 72 % → 93 % 38 coterie 1 +2.20 5.25 72 % → 93 % 39 Stopped early: it went too far. global +2.00"
        in page.read
    )
    assert page.read.count("Stopped early") == 1
    assert "All policies start from the language model as it is." in page.read
    drawn = re.findall(r'aria-label="(\w+) of the policies over their tuning"', html)
    assert drawn == ["Reward", "Divergence"]
    curve = [{"step": 1, "loss": 3.25}, {"step": 2, "loss": 2.5}]
    learnt = TWO | {"start": TWO["start"] | {"steps": 2, "curve": curve}}
    told = "2 steps of supervised fine-tuning on 1,204 chosen responses made of the language model (3.250 nats a token at first, 2.500 at the end)"
    assert told in write(tmp_path, judged_by(), learnt)[1].read


def test_curves_are_told_apart_by_dashes_and_marks():
    points = [(step, float(step)) for step in range(1, 31)]
    svg = charts.training("t", "A training", "nats", [(0, points), (1, points), (None, points)])
    lines = re.findall(r"stroke-dasharray: ([\d. ,]+); stroke-dashoffset: 0; stroke: #\w+; stroke-width: 1.6", svg)
    assert len(set(lines)) == 2  # and a solid one
    assert {"coterie 0", "coterie 1", "global"} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert charts.training("t", "A training", "nats", [(0, points[:1]), (None, [])]) is None


def test_a_coterie_alone_is_everybody(tmp_path):
    html, page = write(tmp_path, judged_by(coteries=1, own=(), judges=("heldout",)), tuned_as("global"))
    assert page.read.startswith("Everybody is answered by the global policy")
    assert {people for people, _ in shown_rates(html)} == {"everybody"}
    assert {label for _, label in shown_rates(html)} == {
        "global v. start",
        "global v. best of 16",
        "best of 16 v. start",
    }
    for absent in ("coterie 0", "Coterie 0", "strangers", "wrong", "true tastes"):
        assert absent not in page.read


def test_what_has_no_interval_or_no_number_is_a_dash(tmp_path):
    judged = judged_by(best=1, interval=None)
    for win in judged["wins"]:
        win["within_tolerance"] = number(None)
    judged["worst"] = None
    bare = {name: made | ({} if name == "start" else {"curve": [], "steps": 0}) for name, made in TWO.items()}
    html, page = write(tmp_path, judged, bare)
    assert {cells[2] for cells in shown_rates(html).values()} == {(False, "–", "", "")}
    assert not any(bold for cells in shown_rates(html).values() for bold, *_ in cells)
    assert "None" not in page.read.replace("so many votes of None", "")
    assert "nan" not in page.read
    assert "gains least" not in page.read
    assert "over their tuning" not in html
