"""The learning curve of a run, and those of several runs in one figure, from the rows of ``log.jsonl``."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from mnistm_dist.reporting.style import GRID, INK, LINES, MARKERS, MUTED, SERIES, SMALL, PageFigure, new_figure, styled

Row = Mapping[str, Any]
# Points of a training curve. More steps are binned; the curve shows the mean of a bin, a band its extremes.
POINTS = 300
NAMED_EPOCHS = 12  # epochs that the upper axis names, at most
TIPS = 100  # of a curve, at most
# What a tip of a run shows, and how.
QUANTITIES = {
    "train/loss": "training loss {:.4f}",
    "val/loss": "val loss {:.4f}",
    "val/accuracy": "val accuracy {:.2%}",
    "train/learning_rate": "learning rate {:.2e}",
    "train/images_per_second": "{:,.0f} images/s",
    "train/gradient_norm": "gradient norm {:.3g}",
    "train/peak_memory_gb": "peak memory {:.2f} GB",
    "train/image_size": "{} px",
}


def series(rows: Sequence[Row], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the finite values (float64) of one quantity, in the order of the log."""
    values = [(row["step"], row[key]) for row in rows if row["kind"] == kind and row.get(key) is not None]
    pairs = np.array([pair for pair in values if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@styled
def learning_curve(rows: Sequence[Row], title: str = "Learning curve") -> PageFigure:
    """Draw training and val loss, val accuracy and learning rate over the steps, with epochs, resumes and image
    sizes."""
    figure = new_figure(height=6.2, title=title)
    loss, accuracy, rate = panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
    _training_line(loss, *series(rows, "train", "train/loss"), SERIES[0], "training")
    loss.plot(*series(rows, "evaluation", "val/loss"), "--D", color=SERIES[1], markersize=4, label="val")
    loss.legend(handles=[line for line in loss.lines if len(line.get_xdata())], loc="upper right", ncols=2)
    _accuracy(accuracy, rows)
    rate.plot(*series(rows, "train", "train/learning_rate"), color=SERIES[2])
    # The default formatter writes powers of ten as mathtext, which `STYLE` does not parse.
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    loss.set_ylim(bottom=0)
    rate.set_ylim(0, None)
    _finish(figure, panels, ("loss", "val accuracy, %", "learning rate"), rows, sizes_in=1)
    return figure


@styled
def machine_curve(rows: Sequence[Row], title: str = "Throughput, gradient and memory") -> PageFigure:
    """Draw images per second, norm of the gradient and peak memory over the steps, like `learning_curve`."""
    figure = new_figure(height=6.2, title=title)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, key, colour in zip(
        panels, ("images_per_second", "gradient_norm", "peak_memory_gb"), SERIES, strict=False
    ):
        _training_line(axes, *series(rows, "train", f"train/{key}"), colour, key)
        axes.set_ylim(bottom=0)
    _finish(figure, panels, ("images/s", "gradient norm", "peak memory, GB"), rows, sizes_in=2)
    return figure


def _finish(
    figure: PageFigure, panels: Sequence[Axes], names: Sequence[str], rows: Sequence[Row], sizes_in: int
) -> None:
    """Name the panels of a run over its steps, mark epochs, image sizes and resumes, and add the tips.

    ``sizes_in``: the panel that names the image sizes.
    """
    for axes, name in zip(panels, names, strict=True):
        axes.set_ylabel(name)
        if not any(np.size(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", color=MUTED, transform=axes.transAxes)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _mark_epochs(panels[0], rows)
    _mark_sizes(panels, rows, panels[sizes_in])
    for step in (row["step"] for row in rows if row["kind"] == "resume"):
        for axes in panels:
            axes.axvline(step, color=INK, linestyle=":", linewidth=1.0)
        panels[0].text(step, 0.97, " resumed", fontsize=SMALL, va="top", transform=panels[0].get_xaxis_transform())
    trained, evaluated = ([row for row in rows if row["kind"] == kind] for kind in ("train", "evaluation"))
    every, before = math.ceil(len(trained) / TIPS) or 1, 0
    for row in trained[(len(trained) - 1) % every :: every]:
        # With the evaluations since the tip before.
        since = [evaluation for evaluation in evaluated if before < evaluation["step"] <= row["step"]]
        shown = {name: value for logged in (row, *since) for name, value in logged.items()}
        texts = [form.format(shown[name]) for name, form in QUANTITIES.items() if shown.get(name) is not None]
        head = f"step {row['step']:,}, epoch {row['epoch']}" if "epoch" in row else f"step {row['step']:,}"
        over = blended_transform_factory(panels[0].transData, figure.transFigure)
        figure.tips.append((over, (before, 0, row["step"], 1), "\n".join([head, *texts])))
        before = row["step"]


@styled
def learning_curves(
    runs: Mapping[str, Sequence[Row]], epochs_per_step: Mapping[str, float | None] | None = None
) -> tuple[PageFigure, PageFigure]:
    """Draw training loss and val accuracy of several runs, by epoch if it is known for all of them, else by step.

    ``epochs_per_step`` is known for finished runs. For others it follows from the evaluations in the log.
    """
    scales = {
        name: (epochs_per_step or {}).get(name)
        or max((epoch / step for epoch, step in _evaluated_epochs(rows).items()), default=None)
        for name, rows in runs.items()
    }
    by_epoch = all(scales.values())
    drawn = []
    for kind, key, label, factor in (
        ("train", "train/loss", "training loss", 1),
        ("evaluation", "val/accuracy", "val accuracy, %", 100),
    ):
        figure = new_figure(height=3.6 + 0.16 * len(runs))
        axes = figure.add_subplot(xlabel="epoch" if by_epoch else "step", ylabel=label)
        for i, (run, rows) in enumerate(runs.items()):
            # matplotlib leaves a name that begins with _ out of a legend.
            name, scale = f" {run}" if run.startswith("_") else run, (scales[run] or 1.0) if by_epoch else 1.0
            steps, values = series(rows, kind, key)
            marker = MARKERS[i % len(MARKERS)] if kind == "evaluation" else ""
            line = LINES[i % len(LINES)]
            _training_line(axes, steps * scale, factor * values, SERIES[i % len(SERIES)], name, line, marker)
        axes.set_ylim(bottom=0) if kind == "train" else _limit_to_100(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=1)
        _add_tips_of_lines(figure, axes)
        drawn.append(figure)
    return drawn[0], drawn[1]


def _add_tips_of_lines(figure: PageFigure, axes: Axes) -> None:
    """Add tips that show every line of a panel at a place."""
    lines = [(str(line.get_label()), *np.asarray(line.get_data())) for line in axes.lines if np.size(line.get_xdata())]
    places = np.unique([x for _, xs, _ in lines for x in xs])
    if len(places) > TIPS:
        places = np.linspace(places[0], places[-1], TIPS)
    borders = [*places[:1], *(places[1:] + places[:-1]) / 2, *places[-1:]]
    for place, left, right in zip(places, borders, borders[1:], strict=False):
        texts = [f"{name.strip()}: {ys[abs(xs - place).argmin()]:.4g}" for name, xs, ys in lines if place <= xs[-1]]
        head = f"{axes.get_ylabel()}, {axes.get_xlabel()} {place:.3g}"
        figure.tips.append((axes.get_xaxis_transform(), (left, 0, right, 1), "\n".join([head, *texts])))


def _training_line(
    axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, name: str, line: str = "-", marker: str = ""
) -> None:
    if len(x) > POINTS:
        bins = np.array_split(np.arange(len(x)), POINTS)
        low, high = [y[part].min() for part in bins], [y[part].max() for part in bins]
        x, y = np.array([x[part].mean() for part in bins]), np.array([y[part].mean() for part in bins])
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, y, line, marker=marker, markersize=4, color=colour, label=name)


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    evaluations = [row for row in rows if row["kind"] == "evaluation" and row.get("val/accuracy") is not None]
    if not evaluations:
        return
    steps, values = series(evaluations, "evaluation", "val/accuracy")
    axes.plot(steps, 100 * values, "--", color=SERIES[1])
    sizes = [row.get("image_size") or 0 for row in evaluations]
    # Hollow: evaluated at a smaller image size than the final model.
    fills = ["none" if 0 < size < max(sizes) else SERIES[1] for size in sizes]
    axes.scatter(steps, 100 * values, 20, marker="D", facecolors=fills, edgecolors=SERIES[1], zorder=2)
    _limit_to_100(axes)
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


def _limit_to_100(axes: Axes) -> None:
    low, high = axes.get_ylim()
    reach = max(high - low, 0.5)
    # Space at the bottom for the image sizes, and for a whole marker at 100 %.
    axes.set_ylim(max(low - 0.15 * reach, 0), min(high, 100 + 0.03 * reach))


def _evaluated_epochs(rows: Sequence[Row]) -> dict[int, int]:
    """Return the epochs after which the run was evaluated, and the step of each."""
    return {row["epoch"]: row["step"] for row in rows if row["kind"] == "evaluation" and "epoch" in row}


def _mark_epochs(axes: Axes, rows: Sequence[Row]) -> None:
    """Add an upper axis that names epochs at the steps of their evaluations."""
    ends = _evaluated_epochs(rows)
    if not ends:
        return
    every = math.ceil(len(ends) / NAMED_EPOCHS)
    named = [epoch for epoch in ends if epoch % every == 0] or list(ends)[-1:]
    top = axes.secondary_xaxis("top")
    top.set_xticks([ends[epoch] for epoch in named], [str(epoch) for epoch in named], fontsize=SMALL)
    top.tick_params(length=2, pad=1, color=MUTED)
    top.spines["top"].set_visible(False)
    top.set_xlabel("epoch", fontsize=SMALL, loc="left", labelpad=2)


def _mark_sizes(panels: Sequence[Axes], rows: Sequence[Row], named_in: Axes) -> None:
    """Shade the parts of a run with different image sizes, and name the sizes in one of the panels."""
    sizes = [
        (row["step"], row["train/image_size"])
        for row in rows
        if row["kind"] == "train" and row.get("train/image_size") is not None
    ]
    starts = [*sizes[:1], *(after for before, after in pairwise(sizes) if before[1] != after[1])]
    if len(starts) < 2:
        return
    for i, ((start, size), (end, _)) in enumerate(pairwise([*starts, sizes[-1]])):
        if i % 2 == 0:
            for axes in panels:
                axes.axvspan(start, end, color=GRID, alpha=0.4, linewidth=0, zorder=0)
        named_in.text(
            (start + end) / 2,
            0.03,
            f"{size} px",
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=INK,
            transform=named_in.get_xaxis_transform(),
        )
