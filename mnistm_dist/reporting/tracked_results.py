"""What W&B gets at the end of a run: the figures, and the matrix and the mistakes as tables, from the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import Mistake, mistakes, read_predictions
from mnistm_dist.reporting.tracking import NullTracker, Tracker

MOST_MISTAKES = 500
"""Mistakes in the table of a split, at most, the most confident first."""


def log_results(tracker: NullTracker, run_dir: Path, step: int) -> None:
    """Logs the figures in a run folder, and the matrix and the mistakes of each split as tables.

    Args:
        tracker: any; nothing is read where it is a `NullTracker`.
        run_dir: the run folder, with its ``*.png`` and ``predictions_*.csv``.
        step: steps done.
    """
    if not isinstance(tracker, Tracker):
        return
    tracker.log_images({f"figures/{path.stem}": path for path in sorted(run_dir.glob("*.png"))}, step)
    for path in sorted(run_dir.glob("predictions_*.csv")):
        split = path.stem.removeprefix("predictions_")
        predictions = read_predictions(path)
        tracker.log_table(f"{split}/confusion_matrix", *matrix_table(predictions.measure()), step)
        tracker.log_table(f"{split}/mistakes", *mistakes_table(mistakes(predictions, MOST_MISTAKES)), step)


def matrix_table(metrics: Metrics) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the confusion matrix as a table: one row per cell that is not 0, exact counts."""
    rows = [
        [metrics.classes[i], metrics.classes[j], cell]
        for i, row in enumerate(metrics.confusion_matrix)
        for j, cell in enumerate(row)
        if cell
    ]
    return ["true", "predicted", "count"], rows


def mistakes_table(shown: Sequence[Mistake]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the mistakes as a table."""
    columns = ["key", "true", "predicted", "probability", "true probability"]
    return columns, [[row.key, row.true, row.predicted, row.probability, row.true_probability] for row in shown]
