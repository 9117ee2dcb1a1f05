"""What a training logs: its rows go to ``log.jsonl``, the console and the tracker; its results go to the tracker."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.reporting.console import Bar, Console
from mnistm_dist.reporting.describe import number
from mnistm_dist.reporting.metrics import CustomMetrics, measure, measure_custom
from mnistm_dist.reporting.predictions import Predictions, mistakes
from mnistm_dist.reporting.time_left import TimeLeft
from mnistm_dist.reporting.tracking import Table, Tracker

MOST_MISTAKES = 500  # rows of a tracker's table of mistakes, at most

# After so many steps: the images that are left to train and to evaluate, by image size in pixels.
ImagesLeft = Callable[[int], tuple[Mapping[int, int], Mapping[int, int]]]


class RunLogger:
    """Logs the rows of a training.

    Args:
        console: of this process; on ranks other than 0 it does nothing.
        tracker: of this process; on ranks other than 0 it does nothing.
        write_row: appends a row to ``log.jsonl``.
        classes: names of the classes.
        images_left: for the time left; by default it follows from the steps alone.
        metrics: of the user's own, measured at each evaluation.
    """

    def __init__(
        self,
        console: Console,
        tracker: Tracker,
        write_row: Callable[[dict[str, Any]], None],
        classes: tuple[str, ...],
        images_left: ImagesLeft | None = None,
        metrics: CustomMetrics | None = None,
    ) -> None:
        self.metrics = metrics or {}
        self.console, self.tracker, self.write_row, self.classes = console, tracker, write_row, classes
        self._images_left, self._time_left, self._evaluation_seconds = images_left, TimeLeft(), 0.0

    @contextmanager
    def training(self, last_step: int, steps_done: int) -> Iterator[None]:
        """Show the progress of the training while the block runs, and log its rows."""
        with self.console.progress("train", last_step, "steps", steps_done) as self._bar:
            yield

    def train_row(self, row: dict[str, Any]) -> None:
        """Log the steps since the last row: ``step``, ``epoch`` and ``train/...``; None stands for no value."""
        self.write_row({"kind": "train", **row})
        scalars = {name: value for name, value in row.items() if "/" in name and value is not None}
        self.tracker.log(scalars, step=row["step"])
        self._time_left.add("train", row["train/image_size"], 1 / row["train/images_per_second"])
        left = self._time_left.seconds(*self._images_left(row["step"])) if self._images_left else None
        note = (
            f"epoch {row['epoch']}  loss {row['train/loss']:.4f}  lr {row['train/learning_rate']:.2e}  "
            f"{number(row['train/images_per_second'])} images/s  {row['train/image_size']} px"
        )
        self._bar(row["step"], note=note, left=left)

    def evaluation_row(self, row: dict[str, Any], labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Log an evaluation.

        Args:
            row: ``step``, ``epoch``, ``split``, ``image_size``, and for the console ``train/loss``,
                ``full_image_size`` and ``best``.
            labels: int64 (N,).
            probabilities: float (N, C).
        """
        metrics, split = measure(labels, probabilities, self.classes), row["split"]
        scores: dict[str, float | None] = {
            f"{split}/loss": metrics.log_loss,
            f"{split}/accuracy": metrics.accuracy,
            **{f"{split}/{n}": value for n, value in measure_custom(self.metrics, probabilities, labels).items()},
        }
        logged = {name: row[name] for name in ("step", "epoch", "split", "image_size")}
        self.write_row({"kind": "evaluation", **logged, **scores})
        self.tracker.log({name: value for name, value in scores.items() if value is not None}, step=row["step"])
        self._time_left.add("evaluate", row["image_size"], self._evaluation_seconds / len(labels))
        self.console.evaluation({**row, **scores})

    @contextmanager
    def evaluating(self, split: str, count: int) -> Iterator[Bar]:
        """Show the progress of an evaluation of ``count`` images while the block runs."""
        started = time.monotonic()
        with self.console.progress(f"evaluating {split}", count) as bar:
            yield bar
        self._evaluation_seconds = time.monotonic() - started

    def message(self, text: str) -> None:
        """Print a line."""
        self.console.line(text)


def log_results(
    tracker: Tracker,
    summary: Mapping[str, Any],
    figures: Iterable[Path],
    predictions: Mapping[str, Predictions],
    step: int,
) -> None:
    """Log summary and figures of a run, and per split confusion matrix (exact counts) and mistakes as tables."""
    tables: dict[str, Table] = {}
    for split, results in predictions.items():
        cells = [
            [results.classes[i], results.classes[j], count]
            for i, row in enumerate(results.metrics.confusion_matrix)
            for j, count in enumerate(row)
            if count
        ]
        rows = [
            [row.key, row.true, row.predicted, row.probability, row.true_probability]
            for row in mistakes(results, MOST_MISTAKES)
        ]
        tables[f"{split}/confusion_matrix"] = ["true", "predicted", "count"], cells
        tables[f"{split}/mistakes"] = ["key", "true", "predicted", "p(predicted)", "p(true)"], rows
    tracker.log_results(summary, {f"figures/{path.stem}": path for path in figures}, tables, step)
