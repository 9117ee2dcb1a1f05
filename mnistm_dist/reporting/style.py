"""How every figure looks, and how it is saved: to a file for print, or to SVG that follows a page's theme.

The colours of series are those of Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers can tell
apart; markers and line styles differ too, for print in grey. Nothing global is changed: figures are made without
pyplot, and the style holds while one is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#d8dee4"
GROUND = "#ffffff"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
"""Blue, vermilion, green, purple, yellow (darkened, to be seen on white) and sky blue."""
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "D", "s", "^", "v", "P")
PRINT_DPI = 160
COLUMN_INCHES = 5.0
"""The width of a figure: a column of a paper, the whole width of a phone."""

THEME = {INK: "ink", MUTED: "muted", GRID: "rule", GROUND: "ground"} | {
    colour: f"series-{i + 1}" for i, colour in enumerate(SERIES)
}
"""Which colour of a figure becomes which CSS variable in SVG."""

STYLE: Any = {  # Any: matplotlib types its keys as one literal of hundreds of names
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "svg.fonttype": "none",
}

Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Makes a function that draws a figure do so in `STYLE`, and leaves the process's own settings alone."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, width: float = COLUMN_INCHES, gap: float = 0.04) -> Figure:
    """An empty figure, sizes and the gap around its parts in inches, that lays itself out."""
    return Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.01, hspace=0.01)
    )


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as the suffix says (``.png``, ``.svg``, ``.pdf``), without a date, whole or not at all, and
    returns the path."""
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(temporary, dpi=PRINT_DPI, metadata={"Software": None} if path.suffix == ".png" else {})
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def to_svg(figure: Figure, name: str, alternative: str) -> str:
    """A figure as an ``<svg>`` element whose colours are CSS variables (`THEME`), to stand in a page.

    Args:
        figure: the figure.
        name: unique in the page; every id in the element begins with it.
        alternative: what the figure shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font: [^;\"']*?px) '[^;\"]*", r"\g<1> system-ui, sans-serif", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    label = alternative.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # The page gives the width; the view box keeps the shape.
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"',
        rf'<svg role="img" aria-label="{label}" \1\2',
        text,
        count=1,
    )
