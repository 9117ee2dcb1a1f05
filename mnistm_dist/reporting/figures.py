"""The figures of a set of predictions and of a batch. Each function draws one and returns it; `drawing.save` writes it.

The learning curve has its own file, `mnistm_dist.reporting.curves`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from mnistm_dist.reporting.describe import percent, plural
from mnistm_dist.reporting.metrics import CalibrationBin, Metrics
from mnistm_dist.reporting.predictions import Mistake
from mnistm_dist.reporting.style import COLUMN_INCHES, GRID, INK, MUTED, SERIES, new_figure, styled

TILES_ACROSS = 6
MOST_MISTAKES = 36
"""Mistakes that a figure shows."""
WEAKEST_SHADE, STRONGEST_SHADE = 0.10, 0.60
"""Opacity of the faintest and the strongest cell: text in ink stays legible on both, in a light and in a dark theme."""


@styled
def confusion_matrix(metrics: Metrics, title: str = "Confusion matrix") -> Figure:
    """Counts in every cell, shares of the true class under those off the diagonal and in the margin.

    The diagonal (blue) is shaded by the share that is right. The errors (orange) have a shade of their own, from none
    to the largest error, so that they stay visible beside a strong diagonal.
    """
    matrix = np.array(metrics.confusion_matrix)
    width = len(metrics.classes)
    support = matrix.sum(axis=1)
    shares = matrix / np.maximum(support, 1)[:, None]
    errors = shares.copy()
    np.fill_diagonal(errors, 0.0)
    largest = errors.max()
    cell = 0.44 if width <= 12 else 0.38
    size = cell * (width + 3.2)
    figure = new_figure(height=size * 0.92, width=max(size, COLUMN_INCHES))
    axes = figure.add_subplot()
    axes.grid(False)
    digits = len(str(matrix.max()))
    counts_size = 8.5 if digits <= 3 else 8.0 if digits == 4 else 6.5
    for i in range(width):
        for j in range(width):
            diagonal = i == j
            strength = shares[i, i] if diagonal else errors[i, j] / largest if largest else 0.0
            if matrix[i, j]:
                shade = WEAKEST_SHADE + (STRONGEST_SHADE - WEAKEST_SHADE) * float(strength)
                axes.add_patch(
                    Rectangle(
                        (j - 0.5, i - 0.5), 1, 1, facecolor=SERIES[0 if diagonal else 1], alpha=shade, linewidth=0
                    )
                )
            if diagonal or not matrix[i, j]:
                empty = not matrix[i, j]
                text, colour = ("·", MUTED) if empty and not diagonal else (f"{matrix[i, j]}", INK)
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=counts_size)
            else:
                axes.text(j, i - 0.14, f"{matrix[i, j]}", ha="center", va="center", fontsize=counts_size)
                axes.text(j, i + 0.27, _small_share(shares[i, j]), ha="center", va="center", fontsize=5.5)
    for line in range(width + 1):
        axes.plot([-0.5, width - 0.5], [line - 0.5] * 2, color=GRID, linewidth=0.6)
        axes.plot([line - 0.5] * 2, [-0.5, width - 0.5], color=GRID, linewidth=0.6)
    for i, scores in enumerate(metrics.per_class):
        recall = "no image" if scores.recall is None else percent(scores.recall, 1)
        axes.text(
            width - 0.3, i, recall, ha="left", va="center", fontsize=7.5, color=MUTED if scores.recall is None else INK
        )
    axes.text(width - 0.3, -0.62, "right", ha="left", va="bottom", fontsize=7.5, color=MUTED)
    axes.set_xlim(-0.5, width + 1.0)
    axes.set_ylim(width - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(width), metrics.classes)
    axes.set_yticks(range(width), metrics.classes)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("read as", loc="left")
    axes.set_ylabel("true class", loc="top", labelpad=8)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}: {metrics.total - metrics.correct:,} of {plural(metrics.total, 'image')} wrong")
    return figure


def _small_share(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


@styled
def mistakes(images: Sequence[np.ndarray], shown: Sequence[Mistake], total: int, title: str = "Mistakes") -> Figure:
    """The mistakes with their image, the most confident first.

    Args:
        images: uint8 (H, W, 3) each, in the order of `shown`.
        shown: the first of them, `MOST_MISTAKES` at most.
        total: how many mistakes there are in all.
        title: what they are mistakes of.
    """
    assert len(images) == len(shown) <= MOST_MISTAKES
    captions = [f"{row.true} read as {row.predicted}\n{percent(row.probability, 1)}" for row in shown]
    if total == 0:
        head = f"{title}: none"
    elif len(shown) >= total:
        head = f"{title}: {'the only one' if total == 1 else f'all {total:,}'}"
    else:
        head = f"{title}: the {len(shown)} most confident of {total:,}"
    return _tiles(images, captions, head, "Every image is read as what it is.")


@styled
def batch_grid(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """Images of a batch as the model sees them.

    Args:
        images: uint8 (H, W, 3) each.
        captions: one for each.
        title: what batch it is.
    """
    return _tiles(images, captions, title, "There is no image.")


def _tiles(images: Sequence[np.ndarray], captions: Sequence[str], title: str, nothing: str) -> Figure:
    # All tiles stand in one plot, whose unit is the width of a tile: dozens of plots would take seconds to lay out.
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    rows, gap, text = max(math.ceil(len(images) / TILES_ACROSS), 1), 0.06, 0.16 * lines + 0.06
    width, height = TILES_ACROSS * (1 + gap) - gap, rows * (1 + text)
    figure = new_figure(height=0.3 + height * COLUMN_INCHES / width, gap=0.02)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    axes = figure.add_subplot()
    axes.set_axis_off()
    if not images:
        axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes)
        return figure
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = place % TILES_ACROSS * (1 + gap), place // TILES_ACROSS * (1 + text)
        axes.imshow(image, interpolation="nearest", extent=(left, left + 1, top + 1, top))
        axes.text(left + 0.5, top + 1.05, caption, ha="center", va="top", fontsize=7.5)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    return figure


@styled
def per_class(metrics: Metrics, title: str = "Precision and recall of each class") -> Figure:
    """A dot for the precision and one for the recall of each class; the axis begins where the weakest lies."""
    width = len(metrics.classes)
    figure = new_figure(height=0.8 + 0.24 * width)
    axes = figure.add_subplot()
    series = (("recall", SERIES[0], "o", 0.12), ("precision", SERIES[1], "D", -0.12))
    least = 1.0
    for name, colour, marker, shift in series:
        # The precision of a class without an image says only that somebody named it.
        values = [(i, getattr(scores, name)) for i, scores in enumerate(metrics.per_class) if scores.support]
        dots = [(i, value) for i, value in values if value is not None]
        least = min([least, *(value for _, value in dots)])
        axes.plot(
            [100 * value for _, value in dots],
            [i - shift for i, _ in dots],
            marker,
            color=colour,
            markersize=5.5,
            markerfacecolor=colour if marker == "o" else "none",
            markeredgewidth=1.4,
            label=name,
            clip_on=False,
            zorder=3,
        )
    axes.set_xlim(_floor(100 * least), 100)
    for i, scores in enumerate(metrics.per_class):
        absent = "no image" if not scores.support else "never read" if not scores.predicted else ""
        if absent:
            axes.annotate(
                absent,
                (0, i),
                (6, 0),
                ("axes fraction", "data"),
                "offset points",
                va="center",
                fontsize=7.5,
                color=MUTED,
            )
    axes.set_ylim(width - 0.5, -0.5)
    axes.set_yticks(range(width), metrics.classes)
    axes.set_xlabel("%")
    axes.set_ylabel("class")
    axes.tick_params(length=0)
    axes.tick_params(axis="y", pad=8)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=2, borderaxespad=0, handletextpad=0.1)
    axes.set_title(title)
    return figure


def _floor(value: float) -> float:
    """A round number under `value` that leaves room for the differences between the classes."""
    for step in (99, 98, 95, 90, 80, 50):
        if value > step + (100 - step) * 0.1:
            return float(step)
    return 0.0


@styled
def calibration(bins: Sequence[CalibrationBin], error: float, title: str = "Calibration") -> Figure:
    """How often the model is right at each confidence, against how sure it was, and how many images that is.

    Args:
        bins: of `mnistm_dist.reporting.metrics.calibration_bins`.
        error: the expected calibration error, 0 to 1.
        title: what is calibrated.
    """
    figure = new_figure(height=3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in bins if row.count]
    wide = 100 / len(bins)
    upper.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1.0, label="as often right as sure")
    upper.bar(
        [100 * row.lower for row in filled],
        [100 * row.accuracy for row in filled],
        width=wide,
        align="edge",
        color=SERIES[0],
        alpha=0.25,
        edgecolor=SERIES[0],
        linewidth=0.8,
    )
    upper.plot(
        [100 * row.confidence for row in filled],
        [100 * row.accuracy for row in filled],
        "o",
        color=SERIES[0],
        markersize=5,
        clip_on=False,
        zorder=3,
    )
    upper.set_ylabel("right, %")
    upper.set_ylim(0, 100)
    upper.set_xlim(0, 100)
    upper.legend(loc="upper left")
    upper.set_title(f"{title}: error {100 * error:.2f} %")
    _counts(lower, filled, wide)
    return figure


def _counts(axes: Axes, filled: Sequence[CalibrationBin], wide: float) -> None:
    counts = [row.count for row in filled]
    axes.bar([100 * row.lower for row in filled], counts, width=wide, align="edge", color=MUTED, alpha=0.6)
    # Most images lie in the last bin, so that only a logarithmic axis shows the others; one image is seen, too.
    axes.set_yscale("log")
    axes.set_ylim(0.7, max(counts) * 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("images")
    axes.set_xlabel("confidence, %")
