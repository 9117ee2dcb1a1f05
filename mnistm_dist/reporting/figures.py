"""Figures of a set of predictions and of a batch; `mnistm_dist.reporting.style` saves them.

The learning curve has its own module, `mnistm_dist.reporting.curves`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from mnistm_dist.reporting.describe import percent, plural
from mnistm_dist.reporting.metrics import Metrics, calibration_bins
from mnistm_dist.reporting.predictions import Mistake, Predictions
from mnistm_dist.reporting.style import COLUMN_INCHES, GRID, INK, MUTED, SERIES, SMALL, PageFigure, new_figure, styled

TILES_ACROSS = 6
MOST_CLASSES, LONGEST_NAME = 30, 16  # classes in a figure, letters of their names
MOST_MISTAKES = 36  # that a figure shows
# Opacity of the lightest and the darkest cell: the text stays legible on both, in a light and in a dark theme.
WEAKEST_SHADE, STRONGEST_SHADE = 0.10, 0.60
CENTRED: Any = {"ha": "center", "va": "center"}


def most_confused(metrics: Metrics) -> list[int]:
    """Return the classes that figures show, in order: all, or of more than `MOST_CLASSES` those with the largest cells
    off the diagonal."""
    width = len(metrics.classes)
    cells = np.array(metrics.confusion_matrix) * ~np.eye(width, dtype=bool)
    order = np.argsort(-cells, axis=None, kind="stable")[: MOST_CLASSES**2]
    pairs = np.stack(np.unravel_index(order, cells.shape), axis=1).ravel().tolist()
    return sorted(list(dict.fromkeys([*pairs, *range(width)]))[:MOST_CLASSES])


def of_all(metrics: Metrics, shown: int) -> str:
    """Return `` (the 30 most confused of 1,000 classes)`` for a title, or an empty text if all are shown."""
    return f" (the {shown} most confused of {len(metrics.classes):,} classes)" if shown < len(metrics.classes) else ""


def shares_and_shades(counts: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return counts / totals of the cells of a confusion matrix, and their shades, -1 to 1.

    The shade of a cell on the diagonal is its share of the largest there; that of an error its share of the largest
    error, negative.
    """
    shares, right = counts / np.maximum(totals, 1), np.eye(len(counts), dtype=bool)
    return shares, np.where(right, shares / (shares[right].max() or 1), -shares / (shares[~right].max(initial=0) or 1))


@styled
def confusion_matrix(metrics: Metrics, title: str = "Confusion matrix") -> Figure:
    """Draw the confusion matrix with counts, shares of the true class off the diagonal, and recall in the margin.

    The diagonal (blue) is shaded by recall. Errors (orange) have a scale of their own, up to the largest error, so that
    they stay visible beside a strong diagonal.
    """
    chosen = most_confused(metrics)
    shown, width = np.ix_(chosen, chosen), len(chosen)
    matrix = np.array(metrics.confusion_matrix)
    shares, shades = (values[shown] for values in shares_and_shades(matrix, matrix.sum(axis=1, keepdims=True)))
    matrix = matrix[shown]
    names = [
        name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        for name in (metrics.classes[i] for i in chosen)
    ]
    size = (0.44 if width <= 12 else 0.38) * (width + 3.2)
    figure = new_figure(height=size * 0.92, width=max(size, COLUMN_INCHES))
    errors = plural(metrics.total - metrics.correct, "error")
    axes = figure.add_subplot(
        xlim=(-0.5, width + 1.0),
        ylim=(width - 0.5, -0.5),
        xticks=range(width),
        yticks=range(width),
        xticklabels=names,
        yticklabels=names,
        aspect="equal",
        title=f"{title}: {errors} in {plural(metrics.total, 'image')}{of_all(metrics, width)}",
    )
    axes.grid(False)
    count_size = {1: 8.5, 2: 8.5, 3: 8.5, 4: 8.0}.get(len(str(matrix.max())), 6.5)
    opacities = np.where(shades, WEAKEST_SHADE + (STRONGEST_SHADE - WEAKEST_SHADE) * abs(shades), 0)
    colours = [to_rgba(SERIES[0 if i == j else 1], opacity) for (i, j), opacity in np.ndenumerate(opacities)]
    borders = np.arange(width + 1) - 0.5
    axes.pcolormesh(borders, borders, np.reshape(colours, (width, width, 4)), edgecolors=GRID, linewidth=0.3)
    for (i, j), count in np.ndenumerate(matrix):
        is_error = bool(count) and i != j
        text, colour = (str(count), INK) if count or i == j else ("·", MUTED)
        axes.text(j, i - 0.14 * is_error, text, color=colour, fontsize=count_size, **CENTRED)
        if is_error:
            share = f"{100 * shares[i, j]:.{1 if shares[i, j] < 0.0995 else 0}f}%"
            axes.text(j, i + 0.27, share, fontsize=5.5, **CENTRED)
    axes.text(width - 0.3, -0.62, "recall", ha="left", va="bottom", fontsize=SMALL, color=MUTED)
    for i, scores in enumerate(metrics.per_class[row] for row in chosen):
        recall, colour = ("no images", MUTED) if scores.recall is None else (percent(scores.recall, 1), INK)
        axes.text(width - 0.3, i, recall, ha="left", va="center", fontsize=SMALL, color=colour)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    if max(map(len, names)) > 3:
        axes.tick_params(axis="x", labelrotation=90)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("predicted", loc="left")
    axes.set_ylabel("true", loc="top", labelpad=8)
    axes.spines[:].set_visible(False)
    return figure


@styled
def mistakes(images: Sequence[np.ndarray], shown: Sequence[Mistake], total: int, title: str = "Mistakes") -> Figure:
    """Draw mistakes with their images, the most confident first.

    Args:
        images: uint8 (H, W, 3) each, in the order of ``shown``.
        shown: the first mistakes, `MOST_MISTAKES` at most.
        total: number of all mistakes.
        title: what they are mistakes of.
    """
    assert len(images) == len(shown) <= MOST_MISTAKES
    captions = [f"{row.true} as {row.predicted}\n{percent(row.probability, 1)}" for row in shown]
    extent = f"all {total:,}" if len(shown) >= total else f"the {len(shown)} most confident of {total:,}"
    return batch_grid(images, captions, f"{title}: {extent if total else 'none'}")


@styled
def batch_grid(images: Sequence[np.ndarray], captions: Sequence[str], title: str) -> Figure:
    """Draw the images of a batch as the model sees them.

    Args:
        images: uint8 (H, W, 3) each.
        captions: one for each.
        title: which batch it is.
    """
    # All tiles are in one axes, in units of a tile's width: dozens of axes would take seconds to lay out.
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    rows, gap, text = max(math.ceil(len(images) / TILES_ACROSS), 1), 0.06, 0.16 * lines + 0.06
    width, height = TILES_ACROSS * (1 + gap) - gap, rows * (1 + text)
    figure = new_figure(height=0.3 + height * COLUMN_INCHES / width, gap=0.02, title=title)
    axes = figure.add_subplot(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % TILES_ACROSS * (1 + gap), i // TILES_ACROSS * (1 + text)
        axes.imshow(image, interpolation="nearest", extent=(left, left + 1, top + 1, top))
        axes.text(left + 0.5, top + 1.05, caption, ha="center", va="top", fontsize=SMALL)
    return figure


@styled
def calibration(predictions: Predictions, title: str = "Calibration") -> PageFigure:
    """Draw accuracy against confidence, and below it the number of images at each confidence."""
    bins = calibration_bins(predictions.labels, predictions.probabilities, predictions.predicted)
    figure = new_figure(height=3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled, error = [row for row in bins if row.count], 100 * predictions.metrics.calibration_error
    left, accuracy = [100 * row.lower for row in filled], [100 * row.accuracy for row in filled]
    bars: Any = {"width": 100 / len(bins), "align": "edge"}
    upper.plot([0, 100], [0, 100], color=MUTED, linestyle="--", linewidth=1.0, label="perfect calibration")
    upper.bar(left, accuracy, color=SERIES[0], alpha=0.25, edgecolor=SERIES[0], linewidth=0.8, **bars)
    upper.plot(
        [100 * row.confidence for row in filled], accuracy, "o", color=SERIES[0], markersize=5, clip_on=False, zorder=3
    )
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %", title=f"{title}: ECE {error:.2f} %")
    upper.legend(loc="upper left")
    over = blended_transform_factory(upper.transData, figure.transFigure)
    for row in filled:
        text = f"{plural(row.count, 'image')}: confidence {percent(row.confidence)}, accuracy {percent(row.accuracy)}"
        figure.tips.append((over, (100 * row.lower, 0, 100 * row.lower + 100 / len(bins), 1), text))
    counts = [row.count for row in filled]
    lower.bar(left, counts, color=MUTED, alpha=0.6, **bars)
    # Most images are in the last bin: only a logarithmic axis shows the others, and a bin of one image.
    lower.set(yscale="log", ylim=(0.7, max(counts) * 2), xlabel="confidence, %", ylabel="images")
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.minorticks_off()
    return figure
