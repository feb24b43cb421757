"""The charts of the reports, readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.ndimage import uniform_filter1d
from scipy.stats import binomtest

from coterie.report.drawing import COLOURS, FAINT, INK, inline_svg, look
from coterie.report.people import Direction, People, sample
from coterie.report.words import MEMBERS, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

_MOST_POINTS = 1000
_MOST_LEAVES, _FEWEST_LEAVES = 300, 3
_DASHES = ("--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
_BEYOND = 6.0  # times the range of what is worth looking at: a candidate worse than that is drawn at the border


def worker_map(people: People, ids: Sequence[int], seed: int = 0) -> str | None:
    """The workers along the directions in which their tastes differ most, as SVG.

    Args:
        people: who they are.
        ids: [K], what the coteries are called.
        seed: of the sample that is drawn where there are more workers than a page can show.

    Returns:
        None where tastes do not differ.
    """
    if not people.directions:
        return None
    flat, coteries = len(people.directions) == 1, len(ids)
    first, second = people.directions[0], people.directions[-1]
    number = np.arange(len(people.coterie))
    # On a strip for each coterie, marks are spread across it so that they can be told apart.
    place = np.column_stack(
        [first.place, people.coterie + 0.5 * ((0.618034 * number) % 1 - 0.5) if flat else second.place]
    )
    shown = sample(len(number), _MOST_POINTS, seed)
    size = 12 + 70 * np.sqrt(people.comparisons / max(people.comparisons.max(), 1))
    # From 0, every coterie as probable as the next, to 1.
    sure = (
        (people.posterior.max(axis=1) - 1 / coteries) / (1 - 1 / coteries)
        if coteries > 1
        else np.full(len(number), 0.5)
    )

    def draw(ax: Axes) -> None:
        for k, name in enumerate(ids):
            rows = shown[people.coterie[shown] == k]
            if not len(rows):
                continue
            colour, marker = look(name)
            x, y = place[rows].T
            ax.scatter(
                x, y, s=size[rows], marker=marker, color=colour, alpha=np.clip(0.8 * sure[rows], 0, 0.8), linewidths=0
            )
            ax.scatter(x, y, s=size[rows], marker=marker, facecolors="none", edgecolors=colour, linewidths=0.7)
            if flat or coteries == 1:
                continue
            middle = np.median(place[people.coterie == k], axis=0)
            box = {"boxstyle": "circle,pad=0.28", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
            ax.annotate(str(name), middle, ha="center", va="center", weight="bold", bbox=box)
        ax.grid(True, axis="x" if flat else "both")
        ax.margins(0.08)
        ax.tick_params(labelbottom=False, labelleft=flat)
        ax.set_xlabel(_named(first, f"first direction of taste ({first.share:.0%} of the differences)"))
        if flat:
            ax.set_yticks(range(coteries), [f"coterie {name}" for name in ids], color=INK)
            ax.set_ylim(coteries - 0.5, -0.5)
            ax.tick_params(labelleft=coteries > 1)
        else:
            ax.set_ylabel(_named(second, f"second direction ({second.share:.0%})"))
            ax.set_aspect("equal", adjustable="datalim")

    return inline_svg("map", "Map of the annotators by taste", 1.1 + 0.8 * coteries if flat else 4.2, draw)


def _named(direction: Direction, told: str) -> str:
    low, high = direction.ends
    ends = f"← {low}\u2003·\u2003{high} →\n" if high else ""  # SVG keeps wide spaces only
    return f"{ends}{told}"


def dendrogram(people: People, ids: Sequence[int], seed: int = 0) -> str | None:
    """Who is like whom: Ward's linkage of the workers' tastes, every worker marked in the row of their coterie.

    Args:
        people: who they are. ids: [K], what the coteries are called.
        seed: of the workers who are drawn where there are more than a page can show.

    Returns:
        None where tastes do not differ, or fewer than three workers have any.
    """
    shown = sample(len(people.coterie), _MOST_LEAVES, seed)
    if not people.directions or len(shown) < _FEWEST_LEAVES:
        return None
    linkage = hierarchy.linkage(people.tastes[shown], method="ward")
    owner = people.coterie[
        shown
    ].tolist()  # of a leaf or branch: the coterie of all its leaves, -1 where they are of several
    for one, other in linkage[:, :2].astype(int):
        owner.append(owner[one] if owner[one] == owner[other] else -1)

    def colour_of(branch: int) -> str:
        return FAINT if owner[branch] < 0 or len(ids) == 1 else look(ids[owner[branch]])[0]

    tree = hierarchy.dendrogram(linkage, no_plot=True, link_color_func=colour_of)
    coterie = people.coterie[shown][tree["leaves"]]
    top = float(linkage[-1, 2])
    step = 0.09 * top

    def draw(ax: Axes) -> None:
        for across, up, colour in zip(tree["icoord"], tree["dcoord"], tree["color_list"], strict=True):
            ax.plot(across, up, color=colour, linewidth=0.8, solid_joinstyle="miter")
        for k, name in enumerate(ids):
            colour, marker = look(name)
            at = np.flatnonzero(coterie == k)
            ax.scatter(
                10 * at + 5, np.full(len(at), -(k + 1) * step), s=np.clip(2500 / len(coterie), 7, 45), marker=marker,
                color=colour, linewidths=0,
            )  # fmt: skip
        rows = -step * np.arange(1, len(ids) + 1)
        ax.set_yticks(rows, [f"coterie {name}" if len(ids) > 1 else "" for name in ids], color=INK)
        ax.set_xticks([])
        ax.set(xlim=(0, 10 * len(coterie)), ylim=(-step * (len(ids) + 0.6), 1.03 * top))
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)

    return inline_svg("dendrogram", "Tree of the annotators by likeness of taste", 2.7 + 0.22 * len(ids), draw)


def gains(estimates: Sequence[Mapping[str, Any]]) -> str:
    """Own reward minus global (filled) and minus wrong coterie's (hollow), in accuracy points, with intervals.

    Args:
        estimates: a coterie each: id, own_vs_global and own_vs_wrong (contracts.Estimate as dict, the latter or None).
    """

    def draw(ax: Axes) -> None:
        ax.axvline(0, color=INK, linewidth=0.8)
        for row, coterie in enumerate(estimates):
            colour, marker = look(coterie["id"])
            for shift, key, filled in ((-0.14, "own_vs_global", True), (0.14, "own_vs_wrong", False)):
                estimate = coterie[key]
                if estimate is None or estimate["value"] is None:
                    continue
                if estimate["low"] is not None:
                    ends = [100 * estimate["low"], 100 * estimate["high"]]
                    ax.plot(ends, [row + shift] * 2, color=colour, linewidth=1.6, solid_capstyle="round")
                ax.plot(
                    100 * estimate["value"], row + shift, marker=marker, markersize=7, color=colour, markeredgewidth=1.4,
                    markerfacecolor=colour if filled else "white", linestyle="none",
                )  # fmt: skip
        ax.plot([], [], marker="o", color=FAINT, linestyle="none", label="own − global")
        ax.plot([], [], marker="o", color=FAINT, markerfacecolor="white", linestyle="none", label="own − wrong")
        ax.set_yticks(range(len(estimates)), [f"coterie {c['id']}" for c in estimates], color=INK)
        ax.set_ylim(len(estimates) - 0.5, -0.5)
        ax.set_xlabel("more choices predicted, percentage points")
        ax.grid(True, axis="x")
        ax.spines["left"].set_visible(False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.2)

    return inline_svg("gains", "Own against global and wrong rewards", 1.0 + 0.55 * len(estimates), draw)


def selection(candidates: Sequence[Mapping[str, Any]]) -> str | None:
    """Held-out gain of every tried member over its size, with one standard error; the band of the one-SE rule is that
    of the best.

    Args:
        candidates: contracts.Candidate as dicts.

    Returns:
        None where fewer than two were tried.
    """
    if len(candidates) < 2:
        return None
    best = max(candidates, key=lambda c: c["gain"])
    members = [member for member in MEMBERS if any(c["member"] == member for c in candidates)]
    sizes = sorted({c["size"] for c in candidates})
    top = max(1000 * (c["gain"] + c["standard_error"]) for c in candidates)
    # One that went far astray would flatten all others.
    floor = -_BEYOND * max(top, 1000 * float(np.median([c["standard_error"] for c in candidates])), 1.0)

    def at(candidate: Mapping[str, Any]) -> tuple[float, float]:
        shift = 0.12 * (members.index(candidate["member"]) - (len(members) - 1) / 2)
        return sizes.index(candidate["size"]) + shift, max(1000 * candidate["gain"], floor)

    def draw(ax: Axes) -> None:
        if best["standard_error"] > 0:
            low = 1000 * (best["gain"] - best["standard_error"])
            ax.axhspan(low, 1000 * best["gain"], color="#e6ecef", label="one standard error from the best")
        ax.axhline(0, color=INK, linewidth=0.8)
        for member in members:
            tried = sorted((c for c in candidates if c["member"] == member), key=lambda c: c["size"])
            colour, marker = look(list(MEMBERS).index(member))
            x, y = np.array([at(c) for c in tried]).T
            inside = y > floor
            error = 1000 * np.array([c["standard_error"] for c in tried])
            ax.plot(x[inside], y[inside], color=colour, linewidth=1.2)
            ax.errorbar(
                x[inside], y[inside], yerr=error[inside], marker=marker, color=colour, markersize=6, linestyle="none",
                elinewidth=1.2, label=MEMBERS[member][0],
            )  # fmt: skip
        for c in candidates:
            if at(c)[1] <= floor:
                told = f"↓ {signed(1000 * c['gain'], 0)}"
                ax.annotate(told, at(c), xytext=(5, 3), textcoords="offset points", color=FAINT)
            if c["chosen"]:
                ring: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": INK, "linestyle": "none"}
                ax.plot(*at(c), markersize=15, **ring)
                ax.plot([], [], markersize=9, label="chosen", **ring)
        lowest = min(1000 * (c["gain"] - c["standard_error"]) for c in candidates)
        ax.set_ylim(bottom=max(lowest, floor) - 0.08 * (top - max(lowest, floor)))
        ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        ax.set_xlabel("number of groups, or of directions of taste")
        ax.set_ylabel("gain, nats × 1000")
        ax.grid(True, axis="y")
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, columnspacing=1.2)

    return inline_svg("selection", "Held-out gain over the number of groups", 4.0, draw)


def newcomers(shots: Mapping[int, Mapping[str, Any]], seen: float | None) -> str | None:
    """What new workers gain over one reward for all, in accuracy points, after some of their own comparisons.

    Args:
        shots: contracts.Heldout as dicts, by the number of comparisons.
        seen: the same gain of the workers who were learned from.

    Returns:
        None where fewer than two points have a number.
    """
    gain = {k: point["difference_to_pooled"]["accuracy"] for k, point in sorted(shots.items())}
    gain = {k: estimate for k, estimate in gain.items() if estimate["value"] is not None}
    if len(gain) < 2:
        return None

    def draw(ax: Axes) -> None:
        ax.axhline(0, color=INK, linewidth=0.8)
        y = np.array([100 * e["value"] for e in gain.values()])
        low, high = (
            np.array([100 * (e["value"] if e[end] is None else e[end]) for e in gain.values()])
            for end in ("low", "high")
        )
        x, colour = np.arange(len(gain)), COLOURS[0]
        ax.errorbar(x, y, yerr=[y - low, high - y], marker="o", color=colour, markersize=6, linewidth=1.4, capsize=3)
        if seen is not None:
            ax.axhline(100 * seen, color=FAINT, linewidth=1, linestyle="--")
            ax.annotate(
                "those it was learned from", (0, 100 * seen), xytext=(0, 3), textcoords="offset points", color=FAINT
            )
        ax.set_xticks(x, [str(k) for k in gain])
        ax.set_xlabel("own comparisons of a new annotator")
        ax.set_ylabel("points more than one reward")
        ax.grid(True, axis="y")

    return inline_svg("newcomers", "What new annotators gain after some comparisons", 2.9, draw)


def calibration(curve: Sequence[Mapping[str, float]], level: float) -> str | None:
    """How often predictions are right over how sure they are; bars are what chance alone leaves open.

    Args:
        curve: of portraits.calibration_curve.
        level: of the bars, Wilson's interval of a share.

    Returns:
        None where there are fewer than two bins.
    """
    if len(curve) < 2:
        return None

    def draw(ax: Axes) -> None:
        x, y = (np.array([100 * point[name] for point in curve]) for name in ("confidence", "accuracy"))
        chance = [
            binomtest(round(point["accuracy"] * point["comparisons"]), int(point["comparisons"])).proportion_ci(
                level, "wilson"
            )
            for point in curve
        ]
        low, high = (np.array([100 * getattr(interval, end) for interval in chance]) for end in ("low", "high"))
        ends = [50, max(float(x.max()), float(high.max())) + 1]
        ax.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--", label="as sure as right")
        ax.errorbar(
            x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], marker="o", color=COLOURS[0], markersize=6,
            linewidth=1.2, capsize=3,
        )  # fmt: skip
        ax.set_xlabel("how sure the prediction is, %")
        ax.set_ylabel("how often it is right, %")
        ax.grid(True)
        ax.legend(loc="lower right")

    return inline_svg("calibration", "How often predictions are right, over how sure they are", 3.2, draw)


def training(
    name: str, label: str, unit: str, curves: Sequence[tuple[int | None, Sequence[tuple[float, float]]]]
) -> str | None:
    """Something that training moves, over its steps: the running mean over a tenth of them, the values themselves faint.

    Args:
        name, label: of the chart.
        unit: what is drawn.
        curves: (step, value) points of each coterie, or of everybody (None).

    Returns:
        None where no curve has two points.
    """
    curves = [(coterie, points) for coterie, points in curves if len(points) > 1]
    if not curves:
        return None

    def draw(ax: Axes) -> None:
        for coterie, points in curves:
            x, y = np.array(points, dtype=np.float64).T
            colour, marker = look(coterie)
            dashes = "-" if coterie is None else _DASHES[coterie % len(_DASHES)]
            window = max(len(y) // 10, 1)
            if window > 1:
                ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
            ax.plot(
                x, uniform_filter1d(y, window, mode="nearest"), color=colour, linestyle=dashes, linewidth=1.6, marker=marker,
                markersize=7, markevery=max(len(y) // 6, 1), label="global" if coterie is None else f"coterie {coterie}",
            )  # fmt: skip
        ax.set_xlabel("updates")
        ax.set_ylabel(unit)
        ax.grid(True)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=3.2)

    return inline_svg(name, label, 2.9 + 0.2 * ((len(curves) - 1) // 3), draw)


def win_rates(wins: Mapping[int | None, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Shares of votes at equal length, by held-out judges (filled) and by the simulated truth (hollow), with intervals.

    Args:
        wins: by whose people judge (None: everybody), what they compare, and judge; as of policies.judging.win_rates.
    """
    truth = any("truth" in judges for rows in wins.values() for judges in rows.values())
    labels: list[str] = []
    headings = []

    def draw(ax: Axes) -> None:
        ax.axvline(50, color=INK, linewidth=0.8)
        for coterie, rows in wins.items():
            colour, marker = look(coterie)
            headings.append(len(labels))
            labels.append("everybody" if coterie is None else f"coterie {coterie}")
            for label, judges in rows.items():
                for judge, win in judges.items():
                    estimate, row = win["equal_length"], len(labels) + (0.15 if judge == "truth" else -0.15 * truth)
                    if estimate["value"] is None:
                        continue
                    if estimate["low"] is not None:
                        ends = [100 * estimate["low"], 100 * estimate["high"]]
                        ax.plot(ends, [row] * 2, color=colour, linewidth=1.4, solid_capstyle="round")
                    ax.plot(
                        100 * estimate["value"], row, marker=marker, markersize=7, color=colour, markeredgewidth=1.2,
                        markerfacecolor="white" if judge == "truth" else colour, linestyle="none",
                    )  # fmt: skip
                labels.append(label)
        ax.set_yticks(range(len(labels)), labels, color=INK)
        for row in headings:
            ax.get_yticklabels()[row].set_fontweight("bold")
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlabel("share of the votes at equal length, %")
        ax.grid(True, axis="x")
        ax.spines["left"].set_visible(False)
        if truth:
            ax.plot([], [], marker="o", color=FAINT, linestyle="none", label="held-out judges")
            ax.plot([], [], marker="o", color=FAINT, markerfacecolor="white", linestyle="none", label="simulated truth")
            ax.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2, handletextpad=0.2)

    rows = len(wins) + sum(map(len, wins.values()))
    return inline_svg("wins", "Win rates of the policies", 0.9 + 0.22 * rows, draw)
