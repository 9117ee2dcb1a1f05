"""The report of one run: its parts, in the order in which a reader asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mnistm_dist.config import Config
from mnistm_dist.reporting import figures, markup
from mnistm_dist.reporting.curves import learning_curve
from mnistm_dist.reporting.describe import describe, percent, plural
from mnistm_dist.reporting.markup import Cell, Markup
from mnistm_dist.reporting.metrics import Metrics, calibration_bins
from mnistm_dist.reporting.predictions import mistakes
from mnistm_dist.reporting.progress import duration, number
from mnistm_dist.reporting.runs import SPLITS, RunRecord, flatten

SPLIT_NAMES = {"val": "validation", "test": "test"}
LISTED_MISTAKES = 20
"""Mistakes in the table, at most."""
Section = tuple[str, str, Markup]


def top(run: RunRecord) -> Markup:
    """Title, how the run ended, the numbers that count, and what is missing."""
    return markup.join(
        [
            Markup(f"<h1>{markup.escape(run.name)}</h1>"),
            Markup(f'<p class="sub">{markup.escape(_state(run))}</p>'),
            markup.tiles(_numbers(run)),
            markup.note("Not everything could be read. What is missing:", run.missing),
        ]
    )


def sections(run: RunRecord) -> list[Section]:
    """Every part that there is something for."""
    parts = [
        ("Results", "results", _results(run)),
        ("Learning curve", "curve", _curve(run)),
        *((f"Mistakes, {SPLIT_NAMES[split]}", f"mistakes-{split}", _mistakes(run, split)) for split in SPLITS),
        ("Recipe", "recipe", _recipe(run)),
        ("Architecture", "architecture", _architecture(run)),
        ("Data", "data", _data(run)),
        ("Environment", "environment", _environment(run)),
    ]
    return [(name, anchor, content) for name, anchor, content in parts if content is not None]


def _state(run: RunRecord) -> str:
    state, step = run.state.get("state") or "unknown", run.state.get("step")
    if state == "running":
        # A run writes its summary, then this page, and then that it is finished.
        state, step = ("finished", run.summary["steps"]) if "steps" in run.summary else ("running, or killed", step)
    words = [f"recipe {run.summary.get('recipe') or run.config.get('recipe', 'unknown')}", state]
    if step is not None:
        words.append(f"step {step:,}")
    if run.state.get("reason"):
        words.append(str(run.state["reason"]))
    resumed = sum(row.get("kind") == "resume" for row in run.rows)
    if resumed:
        words.append(f"resumed {resumed} time{'s' if resumed > 1 else ''}")
    return " · ".join(words)


def _numbers(run: RunRecord) -> list[tuple[str, str]]:
    values = []
    for split, metrics in run.metrics.items():
        low, high = metrics.interval95
        name = f"{SPLIT_NAMES[split]} accuracy, 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
        values.append((percent(metrics.accuracy), name))
    summary = run.summary
    if summary.get("train_seconds"):
        images = (summary.get("epochs"), "epochs") if summary.get("epochs") else (summary.get("steps"), "steps")
        values.append(
            (duration(float(summary["train_seconds"])), f"training, {number(float(images[0] or 0))} {images[1]}")
        )
    if summary.get("images_per_second"):
        world = summary.get("world_size")
        name = "images/s" + (f" on {world:,} process{'' if world == 1 else 'es'}" if world else "")
        values.append((number(float(summary["images_per_second"])), name))
    if summary.get("parameters"):
        values.append((f"{summary['parameters']:,}", "parameters"))
    return values


def _results(run: RunRecord) -> Markup | None:
    if not run.metrics:
        return None
    parts: list[Markup | None] = []
    if run.summary.get("checkpoint"):
        parts.append(markup.paragraphs(_checkpoint(run.summary["checkpoint"])))
    for split, metrics in run.metrics.items():
        name = SPLIT_NAMES[split]
        matrix = figures.confusion_matrix(metrics, f"Confusion matrix, {name}")
        classes = figures.per_class(metrics)
        parts += [
            markup.heading(f"{name.capitalize()}: {plural(metrics.total, 'image')}"),
            markup.paragraphs(describe(metrics)),
            markup.paragraphs(_probabilities(metrics)),
            markup.pair(
                markup.drawn(matrix, f"matrix-{split}", f"Confusion matrix of {name}", wide=True),
                _class_table(metrics),
            ),
            markup.pair(
                markup.drawn(classes, f"classes-{split}", f"Precision and recall of each class, {name}"),
                _calibration(run, split, metrics),
            ),
        ]
    return markup.join(parts)


def _checkpoint(checkpoint: Mapping[str, Any] | str) -> str:
    if not isinstance(checkpoint, Mapping):
        return f"Scored: the checkpoint {checkpoint}."
    words = f"Scored: the checkpoint of step {checkpoint.get('step', 'unknown')}"
    if checkpoint.get("chosen"):
        words += f" ({checkpoint['chosen']})"
    words += ", averaged weights" if checkpoint.get("averaged") else ""
    words += f", at {checkpoint['image_size']} px" if checkpoint.get("image_size") else ""
    return words + "."


def _class_table(metrics: Metrics) -> Markup:
    def share(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.2f}"

    rows: list[list[Cell]] = [
        [row.name, f"{row.support:,}", share(row.precision), share(row.recall), share(row.f1)]
        for row in metrics.per_class
    ]
    return markup.table(["class", "images", "precision %", "recall %", "F1 %"], rows, numbers=(1, 2, 3, 4))


def _probabilities(metrics: Metrics) -> str:
    return (
        f"Log loss {metrics.log_loss:.4f} nats. Expected calibration error {percent(metrics.calibration_error)}: "
        "how far, on average, the confidence is from the share that is right."
    )


def _calibration(run: RunRecord, split: str, metrics: Metrics) -> Markup | None:
    predictions = run.predictions.get(split)
    if predictions is None:
        return None
    bins = calibration_bins(predictions.labels, predictions.probabilities, predictions.predicted)
    drawn = figures.calibration(bins, metrics.calibration_error, f"Calibration, {SPLIT_NAMES[split]}")
    return markup.drawn(drawn, f"calibration-{split}", "Share that is right at each confidence")


def _curve(run: RunRecord) -> Markup | None:
    if not run.rows:
        return None
    evaluations = [row for row in run.rows if row.get("kind") == "evaluation" and row.get("val/accuracy") is not None]
    full = max((row.get("image_size") or 0 for row in evaluations), default=0)
    rows: list[list[Cell]] = []
    for row in evaluations:
        size = row.get("image_size")
        label = None if size is None else f"{size} px" + (" (smaller)" if size < full else "")
        loss = row.get("val/loss")
        rows.append(
            [
                row.get("epoch", -1) + 1,
                f"{row['step']:,}",
                label,
                None if loss is None else f"{loss:.4f}",
                f"{100 * row['val/accuracy']:.2f}",
            ]
        )
    head = ["epoch", "step", "scored at", "val loss", "val accuracy %"]
    return markup.pair(
        markup.drawn(learning_curve(run.rows), "curve", "Loss, accuracy and learning rate over the steps"),
        markup.table(head, rows, numbers=(0, 1, 3, 4)) if rows else None,
    )


def _mistakes(run: RunRecord, split: str) -> Markup | None:
    path = run.path / f"mistakes_{split}.png"
    found = mistakes(run.predictions[split]) if split in run.predictions else []
    parts: list[Markup | None] = []
    if path.is_file():
        parts.append(markup.picture(path, f"Images of {split} that the model reads wrong"))
    if found:
        rows: list[list[Cell]] = [
            [row.key, row.true, row.predicted, percent(row.probability, 1), percent(row.true_probability, 1)]
            for row in found[:LISTED_MISTAKES]
        ]
        head = ["key", "true", "read as", "probability", "true class"]
        parts.append(
            markup.join(
                [
                    markup.table(head, rows, numbers=(3, 4)),
                    markup.paragraphs(f"The {len(rows)} most confident of {plural(len(found), 'mistake')}.")
                    if len(found) > len(rows)
                    else None,
                ]
            )
        )
    return markup.pair(*parts) if parts else None


def _recipe(run: RunRecord) -> Markup | None:
    if not run.config:
        return None
    defaults = flatten(dataclasses.asdict(Config()))
    groups: dict[str, list[tuple[str, Cell]]] = {}
    for name, value in run.config.items():
        group, _, field = name.rpartition(".")
        shown = markup.escape(shown_value(value))
        if name in defaults and shown_value(defaults[name]) != shown_value(value):
            shown = f"<b>{shown}</b>"
        groups.setdefault(group, []).append((field, Markup(shown)))
    blocks = "".join(
        f"<section>{markup.heading(group).html if group else ''}{markup.facts(rows).html}</section>"
        for group, rows in groups.items()
    )
    return markup.join(
        [markup.paragraphs("What is not the default stands in bold."), Markup(f'<div class="columns">{blocks}</div>')]
    )


def shown_value(value: object) -> str:
    """A value of a configuration or an environment, as a person reads it."""
    if isinstance(value, list | tuple):
        return ", ".join(
            f"{part!r:.120}" if isinstance(part, list | tuple | dict) else shown_value(part) for part in value
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _architecture(run: RunRecord) -> Markup | None:
    if not run.architecture:
        return None
    rows: list[list[Cell]] = [
        [
            row["name"],
            Markup(f"<code>{markup.escape(row['layer'])}</code>"),
            " × ".join(map(str, row["output_shape"])),
            f"{row['parameters']:,}",
        ]
        for row in run.architecture
    ]
    total = sum(int(row["parameters"]) for row in run.architecture)
    return markup.join(
        [
            markup.table(["name", "layer", "output", "parameters"], rows, numbers=(2, 3)),
            markup.paragraphs(f"{total:,} parameters in all. Output shapes: channels × height × width of one image."),
        ]
    )


def _data(run: RunRecord) -> Markup | None:
    data = run.summary.get("data")
    if not isinstance(data, Mapping):
        return None
    rows: list[tuple[str, Cell]] = [(name, str(data[name])) for name in ("lineage", "path") if data.get(name)]
    rows += [(f"{split} images", f"{count:,}") for split, count in dict(data.get("counts") or {}).items()]
    if data.get("identity"):
        rows.append(("identity of the packed set", markup.checksum(data["identity"])))
    for split, value in dict(data.get("pixels_sha256") or {}).items():
        rows.append((f"sha256 of the pixels, {split}", markup.checksum(value)))
    return markup.facts(rows)


def _environment(run: RunRecord) -> Markup | None:
    if not run.environment:
        return None
    rows: list[tuple[str, Cell]] = [
        (name.replace("_", " "), shown_value(value))
        for name, value in run.environment.items()
        if name != "command" and value is not None
    ]
    command = run.environment.get("command")
    processes = run.environment.get("world_size")
    by = f", on {processes} processes" if isinstance(processes, int) and processes > 1 else ""
    resumed = any(row.get("kind") == "resume" for row in run.rows)
    heading = "The command of its last launch" if resumed else "To repeat this run"
    repeat = [markup.heading(f"{heading}{by}"), markup.code(str(command))] if command else []
    return markup.join([*repeat, markup.facts(rows)])
