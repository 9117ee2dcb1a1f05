"""The learning curve of a run, and those of several runs over one another, from the rows of ``log.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mnistm_dist.reporting.style import GRID, INK, LINES, MARKERS, MUTED, SERIES, new_figure, styled

Row = Mapping[str, Any]
POINTS = 300
"""Points that a training curve is drawn with: more steps are put together, their mean and their extremes shown."""
NAMED_EPOCHS = 12
"""Epochs named on the upper axis, at most."""


def series(rows: Sequence[Row], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values (float64) of one quantity, in the order of the log."""
    found = [(row["step"], row[key]) for row in rows if row.get("kind") == kind and row.get(key) is not None]
    pairs = np.array([pair for pair in found if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@styled
def learning_curve(rows: Sequence[Row], title: str = "Learning curve") -> Figure:
    """Training and val loss, val accuracy and learning rate over the steps; epochs, restarts and image sizes marked."""
    figure = new_figure(height=6.2)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    _training_line(loss, *series(rows, "train", "train/loss"), SERIES[0], "training")
    steps, values = series(rows, "evaluation", "val/loss")
    if len(steps):
        loss.plot(steps, values, "--D", color=SERIES[1], markersize=4, label="val")
    loss.set_ylabel("loss")
    _from_zero_if_near(loss)
    if loss.lines:
        loss.legend(loc="upper right", ncols=2)
    else:
        _nothing(loss, "no loss is logged")
    _accuracy(accuracy, rows)
    steps, values = series(rows, "train", "train/learning_rate")
    if len(steps):
        rate.plot(steps, values, color=SERIES[2])
    else:
        _nothing(rate, "no learning rate is logged")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rate.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rate.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _mark_epochs(loss, rows)
    _mark_sizes((loss, accuracy, rate), rows)
    _mark_restarts((loss, accuracy, rate), rows)
    return figure


@styled
def learning_curves(
    runs: Mapping[str, Sequence[Row]], title: str = "Learning curves", ended: Mapping[str, float | None] | None = None
) -> Figure:
    """Training loss and val accuracy of several runs over one another, by epoch where all have one, else by step.

    `ended` has the epochs per step of the runs that say it. The log of the others gives it: their last evaluation came
    at an epoch's end, since one that ``--max-steps`` cut within an epoch has ended.
    """
    figure = new_figure(height=5.2 + 0.16 * len(runs))
    loss, accuracy = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    scales = {name: (ended or {}).get(name) or _epochs_per_step(rows) for name, rows in runs.items()}
    by_epoch = all(scales.values())
    for place, (run, rows) in enumerate(runs.items()):
        # matplotlib leaves a name that begins with _ out of a legend.
        name = f" {run}" if run.startswith("_") else run
        scale = (scales[run] or 1.0) if by_epoch else 1.0
        colour, line = SERIES[place % len(SERIES)], LINES[place % len(LINES)]
        steps, values = series(rows, "train", "train/loss")
        _training_line(loss, steps * scale, values, colour, name, line)
        steps, values = series(rows, "evaluation", "val/accuracy")
        marker = MARKERS[place % len(MARKERS)]
        accuracy.plot(steps * scale, 100 * values, line, marker=marker, color=colour, markersize=4, label=name)
    loss.set_ylabel("training loss")
    _from_zero_if_near(loss)
    accuracy.set_ylabel("val accuracy, %")
    accuracy.set_xlabel("epochs" if by_epoch else "step")
    _close_to_the_top(accuracy)
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=1)
    return figure


def _training_line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, name: str, line: str = "-") -> None:
    if not len(x):
        return
    if len(x) <= POINTS:
        axes.plot(x, y, line, color=colour, label=name)
        return
    parts = np.array_split(np.arange(len(x)), POINTS)
    middle = [x[part].mean() for part in parts]
    axes.fill_between(
        middle,
        [y[part].min() for part in parts],
        [y[part].max() for part in parts],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(middle, [y[part].mean() for part in parts], line, color=colour, label=name)


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_ylabel("val accuracy, %")
    evaluations = [row for row in rows if row.get("kind") == "evaluation" and row.get("val/accuracy") is not None]
    if not evaluations:
        _nothing(axes, "no evaluation is logged")
        return
    steps, values = series(rows, "evaluation", "val/accuracy")
    axes.plot(steps, 100 * values, "--", color=SERIES[1])
    full = max((row.get("image_size") or 0) for row in evaluations)
    for row in evaluations:
        smaller = (row.get("image_size") or full) < full
        # A point scored at a smaller size than the last is hollow: it says less about the final model.
        fill = "none" if smaller else SERIES[1]
        axes.plot(row["step"], 100 * row["val/accuracy"], "D", color=SERIES[1], markerfacecolor=fill, markersize=4.5)
    _close_to_the_top(axes)
    best = int(values.argmax())
    axes.annotate(
        f"{100 * values[best]:.2f}",
        (steps[best], 100 * values[best]),
        xytext=(0, -6),
        textcoords="offset points",
        ha="right" if best else "left",
        va="top",
        fontsize=8.5,
    )


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)


def _from_zero_if_near(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if low < 0.4 * high:
        axes.set_ylim(bottom=0)


def _close_to_the_top(axes: Axes) -> None:
    low, high = axes.get_ylim()
    reach = max(high - low, 0.5)
    # Room at the foot for the names of the image sizes, and for a whole marker at 100 %.
    axes.set_ylim(max(low - 0.15 * reach, 0), min(high, 100 + 0.03 * reach))


def _epochs_per_step(rows: Sequence[Row]) -> float | None:
    ends = [(row["step"], row["epoch"]) for row in rows if row.get("kind") == "evaluation" and row.get("step")]
    return (ends[-1][1] + 1) / ends[-1][0] if ends else None


def _mark_epochs(axes: Axes, rows: Sequence[Row]) -> None:
    ends = {row["epoch"] + 1: row["step"] for row in rows if row.get("kind") == "evaluation" and "epoch" in row}
    if not ends:
        return
    every = math.ceil(len(ends) / NAMED_EPOCHS)
    named = [epoch for epoch in ends if epoch % every == 0] or list(ends)[-1:]
    top = axes.secondary_xaxis("top")
    top.set_xticks([ends[epoch] for epoch in named], [str(epoch) for epoch in named], fontsize=7.5)
    top.tick_params(length=2, pad=1, color=MUTED)
    top.spines["top"].set_visible(False)
    top.set_xlabel("epoch", fontsize=7.5, loc="left", labelpad=2)


def _mark_sizes(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Bands of another ground where the image size changes, and its name at the foot of the first panel."""
    sizes = [
        (row["step"], row["train/image_size"])
        for row in rows
        if row.get("kind") == "train" and row.get("train/image_size") is not None
    ]
    if not sizes:
        return
    starts = [sizes[0], *(after for before, after in pairwise(sizes) if before[1] != after[1])]
    if len(starts) == 1:
        return
    for place, (start, size) in enumerate(starts):
        end = starts[place + 1][0] if place + 1 < len(starts) else sizes[-1][0]
        for axes in panels:
            if place % 2 == 0:
                axes.axvspan(start, end, color=GRID, alpha=0.4, linewidth=0, zorder=0)
        panels[1].text(
            (start + end) / 2,
            0.03,
            f"{size} px",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=INK,
            transform=panels[1].get_xaxis_transform(),
        )


def _mark_restarts(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
    for row in rows:
        if row.get("kind") == "resume":
            for axes in panels:
                axes.axvline(row["step"], color=INK, linestyle=":", linewidth=1.0)
            panels[0].text(
                row["step"], 0.97, " resumed", fontsize=7.5, va="top", transform=panels[0].get_xaxis_transform()
            )
