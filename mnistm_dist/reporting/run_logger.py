"""The logger of a training: one row goes to ``log.jsonl``, to the console and to the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from mnistm_dist.reporting.console import Bar, Console
from mnistm_dist.reporting.metrics import measure
from mnistm_dist.reporting.tracking import Tracker


class Outputs(Protocol):
    """The outputs of a model for a split."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""

    @property
    def probabilities(self) -> np.ndarray:
        """float (N, C)."""


class RunLogger:
    """Logs the rows of a training.

    Args:
        console: of this process; on ranks other than 0 it does nothing.
        tracker: of this process; on ranks other than 0 it does nothing.
        write_row: appends a row to ``log.jsonl``.
        classes: names of the classes.
    """

    def __init__(
        self,
        console: Console,
        tracker: Tracker,
        write_row: Callable[[dict[str, Any]], None],
        classes: tuple[str, ...],
    ) -> None:
        self.console, self.tracker, self.write_row, self.classes = console, tracker, write_row, classes
        self._bar: Bar | None = None

    @contextmanager
    def training(self, last_step: int, steps_done: int) -> Iterator[None]:
        """Show the progress of the training while the block runs."""
        with self.console.training(last_step, steps_done) as self._bar:
            yield

    def train_row(self, row: dict[str, Any]) -> None:
        """Log the steps since the last row: ``step``, ``epoch`` and ``train/...``; None stands for no value."""
        self.write_row({"kind": "train", **row})
        self.tracker.log(
            {name: value for name, value in row.items() if "/" in name and value is not None}, step=row["step"]
        )
        if self._bar is not None:
            self._bar.update(
                row["step"],
                epoch=row["epoch"],
                loss=row["train/loss"],
                lr=row["train/learning_rate"],
                images_per_second=row["train/images_per_second"],
                image_size=row["train/image_size"],
            )

    def evaluation_row(self, row: dict[str, Any], outputs: Outputs) -> None:
        """Log an evaluation.

        ``row``: ``step``, ``epoch``, ``split``, ``image_size``, and for the console ``train/loss``, ``full_image_size``
        and ``best``.
        """
        metrics = measure(outputs.labels, outputs.probabilities, self.classes)
        split = row["split"]
        scores = {f"{split}/loss": metrics.log_loss, f"{split}/accuracy": metrics.accuracy}
        shown_only = ("train/loss", "full_image_size", "best")
        self.write_row({"kind": "evaluation", **{k: v for k, v in row.items() if k not in shown_only}, **scores})
        self.tracker.log(scores, step=row["step"])
        self.console.evaluation({**row, **scores})

    def evaluating(self, split: str, count: int) -> AbstractContextManager[Bar]:
        """Show the progress of an evaluation of ``count`` images while the block runs."""
        return self.console.progress(f"evaluating {split}", count)

    def exclude_time(self, seconds: float) -> None:
        """Exclude the last ``seconds`` from the estimated time left."""
        if self._bar is not None:
            self._bar.leave_out(seconds)

    def header(self, rows: Mapping[str, str]) -> None:
        """Print the header of the run."""
        self.console.header("mnistm_dist", rows)

    def message(self, text: str) -> None:
        """Print a line."""
        self.console.line(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.warn(text)
