"""The report's charts: inline SVG by matplotlib, the same bytes for the same numbers, readable without colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

# Okabe and Ito's palette, told apart by every kind of colour vision; the marker says the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900", "#3A9BC1", "#555555", "#7A5230")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_INK, _FAINT, _RULE = "#1d2429", "#6b757c", "#d9dee1"
_WIDTH = 6.4  # inches; the page scales it, 10 points stay readable at 530 pixels
_MOST_POINTS = 2000

_STYLE = {
    "svg.hashsalt": "coterie",
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be found and read aloud
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def look(coterie: int) -> tuple[str, str]:
    """Colour and marker of a coterie; more than eight repeat colours with other markers."""
    return COLOURS[coterie % len(COLOURS)], MARKERS[(coterie + coterie // len(COLOURS)) % len(MARKERS)]


def worker_map(embedding: Array, coterie: Array, posterior: Array, comparisons: Array, seed: int = 0) -> str | None:
    """The workers on the first two principal components of their embeddings, as SVG.

    Args:
        embedding: [workers, rank]. coterie: [workers]. posterior: [workers, K]. comparisons: [workers], training.
        seed: of the sample that is drawn where there are more workers than a page can show.

    Returns:
        None where the embeddings do not differ (one taste).
    """
    centred = np.asarray(embedding, dtype=np.float64) - embedding.mean(axis=0)
    if centred.shape[1] == 0 or not np.isfinite(centred).all() or np.abs(centred).max() < 1e-9:
        return None
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # SVD leaves the signs open
    share = spread**2 / (spread**2).sum()
    place = centred @ axes[:2].T
    certainty = posterior.max(axis=1)
    flat = place.shape[1] == 1
    if flat:  # a strip a coterie, its marks spread across the strip so that they can be told apart
        spread_out = (0.618034 * np.arange(len(place))) % 1 - 0.5
        place = np.column_stack([place[:, 0], coterie + 0.5 * spread_out])
    shown = np.arange(len(place))
    if len(shown) > _MOST_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(len(place), _MOST_POINTS, replace=False))
    size = 12 + 70 * np.sqrt(comparisons / max(comparisons.max(), 1))

    def draw(ax: Axes) -> None:
        for k in range(posterior.shape[1]):
            rows = shown[coterie[shown] == k]
            if not len(rows):
                continue
            colour, marker = look(k)
            # From 0, every coterie as probable as the next, to 1.
            sure = (certainty[rows] - 1 / posterior.shape[1]) / max(1 - 1 / posterior.shape[1], 1e-9)
            ax.scatter(
                place[rows, 0], place[rows, 1], s=size[rows], marker=marker, color=colour,
                alpha=np.clip(0.15 + 0.6 * sure, 0.15, 0.75), linewidths=0,
            )  # fmt: skip
            ax.scatter(
                place[rows, 0], place[rows, 1], s=size[rows], marker=marker, facecolors="none", edgecolors=colour,
                linewidths=0.7,
            )  # fmt: skip
            if flat or posterior.shape[1] == 1:
                continue
            middle = np.median(place[coterie == k], axis=0)
            box = {"boxstyle": "circle,pad=0.28", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
            ax.annotate(str(k), middle, ha="center", va="center", weight="bold", bbox=box)
        ax.set_xlabel(f"first direction of taste ({share[0]:.0%} of the variance)")
        ax.grid(True, axis="x" if flat else "both")
        ax.margins(0.06)
        if flat:
            ax.set_yticks(range(posterior.shape[1]), [f"coterie {k}" for k in range(posterior.shape[1])], color=_INK)
            ax.set_ylim(posterior.shape[1] - 0.5, -0.5)
        else:
            ax.set_ylabel(f"second direction ({share[1]:.0%})")
            ax.set_aspect("equal", adjustable="datalim")

    return _svg("map", "Map of workers by taste", 0.9 + 0.8 * posterior.shape[1] if flat else 4.2, draw)


def gains(estimates: Sequence[dict[str, Any]]) -> str:
    """Own reward minus global (filled) and minus wrong coterie's (hollow), in accuracy points, with intervals.

    Args:
        estimates: a coterie each: id, own_vs_global and own_vs_wrong (contracts.Estimate as dict, the latter or None).
    """

    def draw(ax: Axes) -> None:
        ax.axvline(0, color=_INK, linewidth=0.8)
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
        ax.plot([], [], marker="o", color=_FAINT, linestyle="none", label="own − global")
        ax.plot([], [], marker="o", color=_FAINT, markerfacecolor="white", linestyle="none", label="own − wrong")
        ax.set_yticks(range(len(estimates)), [f"coterie {c['id']}" for c in estimates], color=_INK)
        ax.set_ylim(len(estimates) - 0.5, -0.5)
        ax.set_xlabel("difference in held-out accuracy, percentage points")
        ax.grid(True, axis="x")
        ax.spines["left"].set_visible(False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.2)

    return _svg("gains", "Own against global and wrong rewards", 0.9 + 0.55 * len(estimates), draw)


def selection(candidates: Sequence[dict[str, Any]]) -> str | None:
    """Held-out gain of every tried member over its size, with one standard error; the band of the one-SE rule is that
    of the chosen member's best size.

    Args:
        candidates: contracts.Candidate as dicts.

    Returns:
        None where fewer than two were tried.
    """
    if len(candidates) < 2:
        return None
    family = {c["member"] for c in candidates if c["chosen"]} or {c["member"] for c in candidates}
    best = max((c for c in candidates if c["member"] in family), key=lambda c: c["gain"])
    members = list(dict.fromkeys(c["member"] for c in candidates))

    def draw(ax: Axes) -> None:
        low = 1000 * (best["gain"] - best["standard_error"])
        ax.axhspan(low, 1000 * best["gain"], color="#eef2f4", label="one standard error from its best")
        ax.axhline(0, color=_INK, linewidth=0.8)
        for at, member in enumerate(members):
            points = sorted((c for c in candidates if c["member"] == member), key=lambda c: c["size"])
            colour, marker = look(at)
            x = [c["size"] + 0.12 * (at - (len(members) - 1) / 2) for c in points]
            ax.errorbar(
                x, [1000 * c["gain"] for c in points], yerr=[1000 * c["standard_error"] for c in points],
                marker=marker, color=colour, markersize=6, linewidth=1.2, elinewidth=1.2, label=member,
            )  # fmt: skip
            for place, c in zip(x, points, strict=True):
                if c["chosen"]:
                    ax.plot(
                        place, 1000 * c["gain"], marker="o", markersize=15, markerfacecolor="none",
                        markeredgecolor=_INK, linestyle="none", label="chosen",
                    )  # fmt: skip
        sizes = sorted({c["size"] for c in candidates})
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("coteries of a mixture, rank of a low-rank member")
        ax.set_ylabel("gain in log-loss × 1000")
        ax.grid(True, axis="y")
        ax.margins(y=0.15)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.2)

    return _svg("selection", "Held-out gain over the number of coteries", 3.6, draw)


def glyph(coterie: int) -> str:
    """A coterie's marker alone, to stand in a line of text, as often as need be: it has no ids."""

    def draw(ax: Axes) -> None:
        from matplotlib.markers import MarkerStyle
        from matplotlib.patches import PathPatch

        colour, name = look(coterie)
        marker = MarkerStyle(name)
        shape = marker.get_path().transformed(marker.get_transform())
        ax.add_patch(PathPatch(shape, color=colour, linewidth=0, clip_on=False))
        ax.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7))
        ax.set_axis_off()

    svg = _svg("glyph", f"marker of coterie {coterie}", 0.2, draw, width=0.2, style="glyph")
    return re.sub(r'\s+id="[^"]*"', "", svg)


def _svg(name: str, label: str, height: float, draw: Any, width: float = _WIDTH, style: str = "chart") -> str:
    """Draw on one axes and return an <svg> element without anything that points outside the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure: Figure = Figure(figsize=(width, height), layout=None if style == "glyph" else "constrained")
        ax = figure.add_axes((0, 0, 1, 1)) if style == "glyph" else figure.subplots()
        draw(ax)
        buffer = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    # Ids are the figure's own; several figures share one page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg\b([^>]*?)\s+width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg\b([^>]*?)\s+height="[^"]*"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg class="{style}" role="img" aria-label="{label}"', 1).strip()
