"""The output of a command: a header, bars, a table of evaluations, the result.

One console per process. On ranks other than 0 it is made with ``enabled=False`` and discards everything. In a terminal
rich draws it; a pipe, a file or a dumb terminal gets a few plain lines with the time
(`mnistm_dist.reporting.terminal`).
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, cast

from rich.progress import Task

from mnistm_dist.reporting.describe import describe_accuracy, describe_checkpoint, duration, number
from mnistm_dist.reporting.terminal import NullStream, PlainScreen, TerminalScreen, finished_text, is_live

LONGEST_WARNING = 300
"""Characters of a library's warning that are shown."""
TEXT_WIDTH = 71
"""Columns that paragraphs are wrapped to: 80 with the time."""
EVALUATION = "{:>5}  {:>6}  {:>5}  {:>10}  {:>6}  {:>8}  {}"
"""A row of the table of evaluations."""


MEASURED = {
    "epoch": lambda epoch: f"epoch {epoch + 1}",
    "loss": "loss {:.4f}".format,
    "lr": "lr {:.2e}".format,
    "images_per_second": lambda speed: f"{number(speed)} images/s",
    "image_size": "{} px".format,
}
"""How a bar shows what was measured."""


class Bar:
    """A bar. Updates are cheap: it is drawn only now and then. It is a callback ``progress(done, total)``, too."""

    def __init__(self, screen: PlainScreen, task: Task) -> None:
        self._screen = screen
        self._task = task

    def update(self, done: int, **measured: float) -> None:
        """Set how much is done.

        Args:
            done: of a training: steps, over all launches of the run.
            measured: shown instead of the speed: ``epoch`` (from 0, shown from 1), ``loss``, ``lr``,
                ``images_per_second`` (over all processes), ``image_size`` (pixels).
        """
        note = "  ".join(MEASURED[name](value) for name, value in measured.items())
        self._screen.advance(self._task, done, None, note)

    def leave_out(self, seconds: float) -> None:
        """Do not count the last ``seconds``, which were spent on something else."""
        self._screen.left_out += seconds

    def __call__(self, done: int, total: int) -> None:
        """Set how much is done of ``total``; 0: unknown."""
        self._screen.advance(self._task, done, total or None, "")


class Console:
    """The console of a command.

    Args:
        enabled: False on ranks other than 0: nothing is written.
        stream: where to write; by default standard output.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        stream = (stream or sys.stdout) if enabled else cast(TextIO, NullStream())
        self._screen = TerminalScreen(stream) if is_live(stream) else PlainScreen(stream)
        self._has_evaluations = False

    def header(self, title: str, rows: Mapping[str, str]) -> None:
        """Show names and values under a title."""
        self._screen.panel(title, rows)

    def line(self, text: str) -> None:
        """Show one line."""
        self._screen.line(text)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._screen.line(f"warning: {text}", "yellow")

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str = "images", start: int = 0) -> Iterator[Bar]:
        """Show a bar inside the context.

        If the context exits without an error and no other bar is open, one line with time and speed is left.
        """
        task = self._screen.open_bar(description, total, unit, start)
        try:
            yield Bar(self._screen, task)
        finally:
            self._screen.close_bar(task)
        if not self._screen.bars.tasks:
            self._screen.line(finished_text(task))

    def training(self, total_steps: int, start_step: int = 0) -> AbstractContextManager[Bar]:
        """Show the bar of a training inside the context."""
        return self.progress("train", total_steps, "steps", start_step)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Add a row to the table of evaluations.

        Args:
            row: ``epoch`` (from 0, shown from 1), ``step``, ``split`` (default: val), ``SPLIT/loss``,
                ``SPLIT/accuracy``; optional: ``train/loss``, ``image_size`` and ``full_image_size`` (pixels; a smaller
                size is noted), ``best`` (whether it is the best so far).
        """
        if not self._has_evaluations:
            self._has_evaluations = True
            head = EVALUATION.format("epoch", "step", "split", "train loss", "loss", "accuracy", "")
            self._screen.line(head.rstrip(), "bold underline")
        split, size, train_loss = row.get("split", "val"), row.get("image_size"), row.get("train/loss")
        note = "best" if row.get("best") else ""
        if size is not None and size < row.get("full_image_size", size):
            note = f"{note} at {size} px".lstrip()
        text = EVALUATION.format(
            row["epoch"] + 1,
            f"{row['step']:,}",
            split,
            "" if train_loss is None else f"{train_loss:.4f}",
            f"{row[f'{split}/loss']:.4f}",
            f"{100 * row[f'{split}/accuracy']:.2f} %",
            note,
        )
        self._screen.line(text.rstrip(), "green" if row.get("best") else "")

    def result(self, summary: Mapping[str, Any], text: str, paths: Mapping[str, str]) -> None:
        """Show the result: accuracy of each split with its interval, the time, a text, and what was written."""
        rows = {
            split: describe_accuracy(score["correct"], score["total"], score["interval95"])
            for split in ("val", "test")
            if (score := summary.get(split))
        }
        if summary.get("checkpoint"):
            rows["checkpoint"] = describe_checkpoint(summary["checkpoint"])
        if summary.get("train_seconds") and summary.get("images_per_second"):
            rate = number(summary["images_per_second"])
            rows["training"] = f"{duration(summary['train_seconds'])}, {rate} images/s"
        self._screen.panel("result", rows)
        for paragraph in text.splitlines():
            # A number and its % stay on one line.
            for line in textwrap.wrap(paragraph.replace(" %", "\N{NO-BREAK SPACE}%"), TEXT_WIDTH):
                self._screen.line(line.replace("\N{NO-BREAK SPACE}", " "))
        if paths:
            self._screen.panel("written", paths)

    @contextmanager
    def library_warnings(self) -> Iterator[None]:
        """Show Python warnings inside the context as one line each, equal ones once."""
        shown: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            text = textwrap.shorten(str(message), LONGEST_WARNING, placeholder=" ...")
            if text not in shown:
                shown.add(text)
                self.warn(f"{category.__name__}: {text}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
