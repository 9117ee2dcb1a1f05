"""``report.html``: run folders as one page that loads nothing.

The templates hold the markup; this module prepares the values that they show.
"""

import base64
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mnistm_dist import __version__
from mnistm_dist.config import Config, read_recipe
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors, write_atomic
from mnistm_dist.reporting import figures
from mnistm_dist.reporting.curves import learning_curve, learning_curves, machine_curve
from mnistm_dist.reporting.describe import describe, describe_checkpoint, duration, number, percent, plural
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Predictions, mistakes, paired_difference
from mnistm_dist.reporting.runs import SPLITS, RunRecord, differing_fields, flatten, read_runs, seed_groups
from mnistm_dist.reporting.style import to_svg

SPLIT_NAMES = {"val": "validation", "test": "test"}
BAR_STARTS = (0.99, 0.98, 0.95, 0.9, 0.8, 0.5)  # of the bars of precision and recall
LIKELIEST = 3  # classes that a mistake shows, besides the true one


def write_report(
    run_dirs: Sequence[Path], out: Path, predictions: Mapping[str, Predictions] | None = None
) -> list[str]:
    """Write the report of one run, or the comparison of several, atomically.

    Args:
        run_dirs: run folders.
        out: the file to write.
        predictions: of a single run, by split: predictions that need not be read again.

    Returns:
        What is missing, one sentence each; the page lists it too.

    Raises:
        UserError: a folder is no run folder, or ``out`` cannot be written.
    """
    runs = read_runs(run_dirs, __version__, predictions)
    environment = Environment(
        loader=PackageLoader("mnistm_dist.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "deviation": lambda values: statistics.stdev(values) if len(values) > 1 else None,
        "duration": duration,
        "mean": statistics.fmean,
        "moment": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)),
        "number": number,
        "percent": percent,
        "plural": plural,
        "points": lambda share: None if share is None else f"{100 * share:.2f}",
        "value": value_text,
    }
    several = len(runs) > 1
    missing = [f"{run.name}: {line}" if several else line for run in runs for line in run.missing]
    name, values = ("comparison", comparison_values(runs)) if several else ("run", run_values(runs[0]))
    values["links"] = {run.name: _links(run.path, out) for run in runs}
    page = environment.get_template(f"{name}.html.j2").render(values, missing=missing, version=__version__)
    with explain_os_errors(out, advice="free some space or choose another --out"):
        write_atomic(out, page)
    return missing


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    # A number and its % stay on one line.
    return "–" if value is None else str(value).replace(" %", "\N{NO-BREAK SPACE}%")


def value_text(value: object) -> str:
    """Return a value of a configuration or an environment as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _links(run_dir: Path, out: Path) -> dict[str, str]:
    """Return the address of every file of a run folder by its name, relative to the page."""
    files = sorted(
        path.relative_to(run_dir) for path in [*run_dir.glob("[!.]*.*"), *run_dir.glob("checkpoints/step-*")]
    )
    base = out.resolve().parent
    return {str(file): quote(os.path.relpath(run_dir.resolve() / file, base)) for file in files}


def run_values(run: RunRecord) -> dict[str, Any]:
    """Return the values of ``run.html.j2``."""
    evaluations = [row for row in run.rows if row["kind"] == "evaluation" and row.get("val/accuracy") is not None]
    wrong = [_mistakes(run, split) for split in run.predictions]
    times = [row["time"] for row in run.rows if "time" in row]
    resumes, processes = sum(row["kind"] == "resume" for row in run.rows), run.environment.get("world_size")
    sections = {
        "results": ("Results", run.metrics),
        "curve": ("Learning curve", run.rows),
        **{f"mistakes-{m['split']}": (f"Mistakes, {m['name']}", m["rows"]) for m in wrong},
        "run": ("Run", run.rows or run.environment),
        "config": ("Configuration", run.config),
        "architecture": ("Architecture", run.architecture),
        "data": ("Data", run.summary.data),
        "environment": ("Environment", run.environment),
    }
    return {
        "run": run,
        "title": run.name,
        "times": times,
        "resumes": resumes,
        "sections": {anchor: title for anchor, (title, content) in sections.items() if content},
        "checkpoint": run.summary.checkpoint and describe_checkpoint(run.summary.checkpoint.model_dump()),
        "splits": [_split(run, split) for split in run.metrics],
        "curve": to_svg(learning_curve(run.rows), "curve", "Learning curve") if run.rows else None,
        "machine_curve": to_svg(machine_curve(run.rows), "machine", "Throughput, gradient norm and memory")
        if run.rows
        else None,
        "evaluations": evaluations,
        "full_size": max((row.get("image_size") or 0 for row in evaluations), default=0),
        "mistakes": wrong,
        "config": _config(run.config, str(run.environment.get("command", ""))),
        "command_title": ("Command of the last launch" if resumes else "To reproduce this run")
        + (f", on {processes} processes" if isinstance(processes, int) and processes > 1 else ""),
    }


def _split(run: RunRecord, split: str) -> dict[str, Any]:
    metrics, name, results = run.metrics[split], SPLIT_NAMES[split], run.predictions.get(split)
    scores = [share for row in metrics.per_class for share in (row.precision, row.recall) if share is not None]
    calibration = figures.calibration(results, f"Calibration, {name}") if results else None
    return {
        "name": name,
        "metrics": metrics,
        "text": describe(metrics).splitlines(),
        "custom": scored.custom if (scored := getattr(run.summary, split)) else {},
        "split": split,
        "matrix": _matrix(metrics),
        # A round start of the bars that leaves space for the differences between the classes.
        "start": next((start for start in BAR_STARTS if min(scores) > start + (1 - start) / 10), 0),
        "calibration": calibration and to_svg(calibration, f"calibration-{split}", "Accuracy at each confidence"),
    }


def _mistakes(run: RunRecord, split: str) -> dict[str, Any]:
    predictions, rows = run.predictions[split], []
    wrong = mistakes(predictions)
    for row in wrong[: figures.MOST_MISTAKES]:
        probabilities = predictions.probabilities[row.id]
        likeliest = [int(i) for i in np.argsort(-probabilities, kind="stable")[:LIKELIEST]]
        shown = dict.fromkeys([*likeliest, int(predictions.labels[row.id])])
        classes = [(predictions.classes[i], float(probabilities[i])) for i in shown]
        file = run.path / "mistakes" / split / f"{row.key}.png"
        picture = base64.b64encode(file.read_bytes()).decode("ascii") if file.is_file() else None
        rows.append({"mistake": row, "picture": picture, "classes": classes})
    return {"split": split, "name": SPLIT_NAMES[split], "rows": rows, "total": len(wrong)}


def _matrix(metrics: Metrics) -> dict[str, Any]:
    """Return the classes, the counts, and the text and the shade, -1 to 1, of every cell of the classes that figures
    show: as counts, and in percent of its row and its column.

    The shades are those of `figures.shares_and_shades`.
    """
    counts = np.array(metrics.confusion_matrix)
    chosen = figures.most_confused(metrics)
    shown = np.ix_(chosen, chosen)
    modes: dict[str, list[list[tuple[str, float]]]] = {}
    for name, total in (("counts", 1), ("rows", counts.sum(axis=1, keepdims=True)), ("columns", counts.sum(axis=0))):
        shares, shades = figures.shares_and_shades(counts, np.array(total))
        texts = np.vectorize("{:,.0f}".format if name == "counts" else lambda share: f"{100 * share:.1f}")(
            shares[shown]
        )
        rows = zip(texts.tolist(), shades[shown].tolist(), strict=True)
        modes[name] = [list(zip(*row, strict=True)) for row in rows]
    return {
        "classes": [metrics.classes[i] for i in chosen],
        "counts": counts[shown].tolist(),
        "modes": modes,
        "note": figures.of_all(metrics, len(chosen)).strip(" ()"),
    }


def _config(config: Mapping[str, Any], command: str) -> dict[str, list[tuple[str, str, str]]]:
    """Return name, value and origin of every field, by section.

    The origin is ``yours`` (a flag), ``recipe``, ``auto`` (chosen at the launch), or empty: the default.
    """
    try:
        recipe = read_recipe(str(config.get("recipe")))
    except UserError:
        recipe = {}
    defaults = flatten(dataclasses.asdict(Config()))
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for name, value in config.items():
        section, _, field = name.rpartition(".")
        base = recipe.get(field, defaults.get(name, value))
        origin = "recipe" if field in recipe else ""
        if value_text(value) != value_text(base):
            origin = "auto" if base in ("auto", None) else "yours"
        if re.search(rf"--(no-)?{field.replace('_', '[-_]')}\b(?!-)", command):
            origin = "yours"
        sections.setdefault(section, []).append((field, value_text(value), origin))
    return sections


def comparison_values(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the values of ``comparison.html.j2``."""
    logged = {run.name: run.rows for run in runs if run.rows}
    epochs = {
        run.name: run.summary.epochs / run.summary.steps for run in runs if run.summary.epochs and run.summary.steps
    }
    values = {
        "fields": differing_fields(runs),
        "accuracy": [_accuracy(runs, split) for split in SPLITS if any(split in run.metrics for run in runs)],
        "seeds": [
            {
                "names": ", ".join(run.name for run in group),
                "split": split,
                "accuracies": [run.metrics[split].accuracy for run in group if split in run.metrics],
            }
            for group in seed_groups(runs)
            for split in SPLITS
            if len(group) > 1 and any(split in run.metrics for run in group)
        ],
        "curves": [
            to_svg(figure, f"curves-{i}", "Learning curves")
            for i, figure in enumerate(learning_curves(logged, epochs) if logged else ())
        ],
    }
    titles = {"fields": "Differences", "accuracy": "Accuracy", "seeds": "Seeds", "curves": "Learning curves"}
    sections = {anchor: title for anchor, title in titles.items() if anchor == "fields" or values[anchor]}
    return {
        **values,
        "runs": runs,
        "title": f"{len(runs)} runs",
        "sections": sections,
    }


def _accuracy(runs: Sequence[RunRecord], split: str) -> dict[str, Any]:
    """Return run, metrics and paired difference to the first run of each that has results on the split, and the names
    of those that differ from the first in their seed alone."""
    scored = [run for run in runs if split in run.metrics]
    reference, rows = scored[0], []
    for run in scored:
        both = split in run.predictions and split in reference.predictions and run is not reference
        difference = paired_difference(run.predictions[split], reference.predictions[split]) if both else None
        rows.append((run, run.metrics[split], difference))
    seeds = {run.name for group in seed_groups(runs) if reference in group for run in group}
    return {"name": SPLIT_NAMES[split], "reference": reference, "rows": rows, "seeds": seeds}
