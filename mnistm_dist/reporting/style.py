"""The style of all figures, and how they are saved: to a file, or to SVG that follows the theme of a page.

The colours of series are those of Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers can tell
apart; markers and line styles differ too, for print in grey. No global setting is changed: figures are made without
pyplot, and the style is active only while a figure is drawn or saved.
"""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Transform

from mnistm_dist.files import atomic_path

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#d8dee4"
GROUND = "#ffffff"
# Blue, vermilion, green, purple, yellow (darkened for contrast on white) and sky blue.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "D", "s", "^", "v", "P")
PRINT_DPI = 160
COLUMN_INCHES = 5.0  # width of a figure: one column of a paper, the full width of a phone
SMALL = 7.5  # font size of annotations, points

# The CSS variable that replaces each colour of a figure in SVG.
THEME = {INK: "ink", MUTED: "muted", GRID: "rule", GROUND: "ground"} | {
    colour: f"series-{i + 1}" for i, colour in enumerate(SERIES)
}

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

# Decorates a function that draws or saves a figure: it runs with `STYLE`.
styled = matplotlib.rc_context(STYLE)


class PageFigure(Figure):
    """A figure with tips: texts that a page shows while the pointer is over a part of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Text and box of each tip: left, bottom, right and top in the coordinates of the transform.
        self.tips: list[tuple[Transform, tuple[float, float, float, float], str]] = []


def new_figure(height: float, width: float = COLUMN_INCHES, gap: float = 0.04, title: str = "") -> PageFigure:
    """Return an empty figure with constrained layout; sizes and the gap around its axes are in inches."""
    layout = ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.01, hspace=0.01)
    figure = PageFigure((width, height), layout=layout)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, without a date. The suffix is the format: ``.png``, ``.svg``, ``.pdf``. Raises
    `OSError`."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=PRINT_DPI, metadata={"Software": None} if path.suffix == ".png" else {})


def to_svg(figure: PageFigure, name: str, description: str) -> Markup:
    """Return a figure as an ``<svg>`` element with its tips, whose colours are the CSS variables of `THEME`.

    Args:
        figure: the figure.
        name: prefix of every id in the element; unique in the page.
        description: text alternative for screen readers.
    """
    buffer = io.StringIO()
    no_metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", buffer.getvalue())
    text = re.sub(r"(font: [^;\"']*?px) '[^;\"]*", r"\g<1> system-ui, sans-serif", text)
    text = re.sub("|".join(THEME), lambda colour: f"var(--{THEME[colour[0]]})", text)
    # The page sets the width; the view box keeps the aspect ratio.
    head, _, body = text[text.index("<svg") :].partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # After the figure was saved, since this lays it out. SVG has 72 units per inch, and y points down.
    units = 72 / figure.dpi
    tips = []
    for transform, (left, bottom, right, top), tip in figure.tips:
        corners = units * transform.transform([(left, bottom), (right, top)])
        (x, y), (width, height) = corners.min(axis=0), abs(corners[1] - corners[0])
        y = units * figure.bbox.height - y - height
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        tips.append(f"<rect {box}><title>{escape(tip)}</title></rect>")
    body = body.replace("</svg>", f'<g class="tips">{"".join(tips)}</g></svg>')
    return Markup(f'{head} role="img" aria-label="{escape(description)}">{body}')
