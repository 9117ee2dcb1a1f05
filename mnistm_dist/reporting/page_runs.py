"""The report of several runs: what differs in their configurations first, then by how much they differ, then how."""

from __future__ import annotations

from collections.abc import Sequence

from mnistm_dist.reporting import markup
from mnistm_dist.reporting.comparison import (
    PairedDifference,
    SeedGroup,
    differing_fields,
    mean_and_spread,
    paired_difference,
    seed_groups,
)
from mnistm_dist.reporting.curves import learning_curves
from mnistm_dist.reporting.describe import percent
from mnistm_dist.reporting.markup import Cell, Markup
from mnistm_dist.reporting.page_run import SPLIT_NAMES, Section, shown_value
from mnistm_dist.reporting.progress import duration
from mnistm_dist.reporting.runs import SPLITS, RunRecord


def top(runs: Sequence[RunRecord]) -> Markup:
    """Title, names, and what is missing."""
    missing = [f"{run.name}: {line}" for run in runs for line in run.missing]
    names = ", ".join(run.name for run in runs)
    return markup.join(
        [
            Markup(f"<h1>{len(runs)} runs</h1>"),
            Markup(f'<p class="sub">{markup.escape(names)}</p>'),
            markup.note("Not everything could be read. What is missing:", missing),
        ]
    )


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """Every part that there is something for."""
    parts = [
        ("What differs", "differs", _differs(runs)),
        ("Accuracy", "accuracy", _accuracy(runs)),
        ("Seeds", "seeds", _seeds(runs)),
        ("Learning curves", "curves", _curves(runs)),
    ]
    return [(name, anchor, content) for name, anchor, content in parts if content is not None]


def _differs(runs: Sequence[RunRecord]) -> Markup:
    fields = differing_fields(runs)
    if not fields:
        return markup.paragraphs("Nothing: the configurations, the sets and the numbers of processes are the same.")
    rows: list[list[Cell]] = [[name, *(shown_value(value) for value in values)] for name, values in fields.items()]
    return markup.table(["field", *(run.name for run in runs)], rows)


def _accuracy(runs: Sequence[RunRecord]) -> Markup | None:
    parts: list[Markup | None] = []
    for split in SPLITS:
        scored = [run for run in runs if split in run.metrics]
        if not scored:
            continue
        reference = scored[0]
        rows: list[list[Cell]] = []
        sentences = []
        for run in scored:
            metrics = run.metrics[split]
            low, high = metrics.interval95
            difference: Cell = "the reference"
            if run is not reference:
                found = _difference(run, reference, split)
                difference = "not on the same images" if found is None else _points(found)
                sentences.append(_sentence(run, reference, found))
            seconds = run.summary.get("train_seconds")
            rows.append(
                [
                    run.name,
                    f"{metrics.correct:,} of {metrics.total:,}",
                    percent(metrics.accuracy),
                    f"{100 * low:.2f} to {100 * high:.2f}",
                    difference,
                    duration(float(seconds)) if seconds else None,
                ]
            )
        head = ["run", "right", "accuracy", "95 % interval, %", f"against {reference.name}, points", "training"]
        parts += [
            markup.heading(SPLIT_NAMES[split].capitalize()),
            markup.table(head, rows, numbers=(1, 2, 3, 5)),
            *(markup.paragraphs(sentence) for sentence in sentences),
        ]
    if not parts:
        return None
    method = (
        "Differences are paired: both runs were asked about the same images. Interval: Agresti and Min 2005; "
        "p: McNemar's exact test. An interval does not cover the chance of the seed: train several."
    )
    return markup.join([*parts, markup.paragraphs(method)])


def _difference(run: RunRecord, reference: RunRecord, split: str) -> PairedDifference | None:
    if split not in run.predictions or split not in reference.predictions:
        return None
    return paired_difference(run.predictions[split], reference.predictions[split])


def _points(found: PairedDifference) -> str:
    low, high = found.interval95
    return f"{100 * found.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _sentence(run: RunRecord, reference: RunRecord, found: PairedDifference | None) -> str:
    if found is None:
        return f"{run.name} and {reference.name} cannot be paired: their predictions are not there, or of other images."
    counts = (
        f"{run.name} alone reads {found.only_right:,} images right, {reference.name} alone "
        f"{found.only_reference_right:,} (p = {found.p_value:.2g})"
    )
    if not found.decided:
        return f"{counts}: no difference is shown between the two."
    better, worse = (run, reference) if found.difference > 0 else (reference, run)
    return f"{counts}: {better.name} is better than {worse.name}."


def _seeds(runs: Sequence[RunRecord]) -> Markup | None:
    groups = [group for group in seed_groups(runs) if len(group.runs) > 1]
    if not groups:
        return None
    rows = [row for group in groups for row in _group_rows(group)]
    head = ["runs", "split", "seeds", "mean %", "standard deviation", "lowest %", "highest %"]
    words = "Runs that differ in nothing but their seed. The standard deviation is that of the sample, in points."
    return markup.join([markup.paragraphs(words), markup.table(head, rows, numbers=(2, 3, 4, 5, 6))])


def _group_rows(group: SeedGroup) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    names = ", ".join(run.name for run in group.runs)
    for split in SPLITS:
        values = group.accuracies(split)
        if values:
            mean, spread = mean_and_spread(values)
            rows.append(
                [
                    names,
                    split,
                    len(values),
                    f"{100 * mean:.2f}",
                    None if spread is None else f"{100 * spread:.2f}",
                    f"{100 * min(values):.2f}",
                    f"{100 * max(values):.2f}",
                ]
            )
    return rows


def _curves(runs: Sequence[RunRecord]) -> Markup | None:
    logged = {run.name: run.rows for run in runs if run.rows}
    if not logged:
        return None
    ended = {run.name: _epochs_per_step(run) for run in runs}
    return markup.drawn(learning_curves(logged, ended=ended), "curves", "Training loss and val accuracy of all runs")


def _epochs_per_step(run: RunRecord) -> float | None:
    epochs, steps = run.summary.get("epochs"), run.summary.get("steps")
    return epochs / steps if epochs and steps else None
