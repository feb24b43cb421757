"""How charts are drawn: one look for every coterie, and inline SVG by matplotlib, the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by every kind of colour vision; the marker says the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900", "#3A9BC1", "#555555", "#7A5230")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
INK, FAINT, _RULE = "#1d2429", "#5d686f", "#d9dee1"
_WIDTH = 5.0  # inches; the page scales it: 10 points are 10 pixels on a phone and 14 in Kubeflow's frame

_STYLE = {
    "svg.hashsalt": "coterie",
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be found and read aloud
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def look(coterie: int | None) -> tuple[str, str]:
    """Colour and marker of a coterie, or of everybody (None); more than eight repeat colours with other markers."""
    if coterie is None:
        return INK, "*"
    return COLOURS[coterie % len(COLOURS)], MARKERS[(coterie + coterie // len(COLOURS)) % len(MARKERS)]


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

    svg = inline_svg("glyph", f"marker of coterie {coterie}", 0.2, draw, width=0.2, style="glyph")
    return re.sub(r'\s+id="[^"]*"', "", svg)


def inline_svg(name: str, label: str, height: float, draw: Any, width: float = _WIDTH, style: str = "chart") -> str:
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
