"""What a person reads while a door runs: a header, bars, a table of evaluations, the result.

One console per process, made by the door; on every rank but 0 it is made with ``enabled=False`` and does nothing. In a
terminal it is drawn by rich; in a pipe, a file or a dumb terminal it writes plain lines with the time.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from mnistm_dist.reporting.progress import Progress, duration, number
from mnistm_dist.reporting.schema import is_number
from mnistm_dist.reporting.terminal import PlainScreen, Screen, TerminalScreen, is_live

LONGEST_WARNING = 300
"""Characters of a library's warning that are shown."""
EVALUATION_HEAD = ("epoch", "step", "split", "train loss", "loss", "accuracy", "")
EVALUATION_WIDTHS = (5, 6, 5, 10, 6, 8, -15)


class Bar:
    """A handle on one bar; cheap to call at every step, since it draws only now and then.

    It can be handed on as a callback ``progress(done, total)``.
    """

    def __init__(self, screen: Screen | None, progress: Progress) -> None:
        self._screen = screen
        self._progress = progress

    def update(self, done: int, **fields: str) -> None:
        """Says that `done` are done, and what else to show beside it, in this order."""
        self._progress.advance(done, fields)
        if self._screen and self._screen.due(self._progress):
            self._screen.show(self._progress)

    def leave_out(self, seconds: float) -> None:
        """Says that the last `seconds` went into something else: the time left does not count them."""
        self._progress.leave_out(seconds)

    def __call__(self, done: int, total: int) -> None:
        """Says that `done` of `total`, 0 where nobody knows how many, are done."""
        self._progress.total = total or None
        self.update(done)


class TrainingBar:
    """The bar of a training: steps, and what was measured at the last one."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def update(
        self,
        step: int,
        *,
        epoch: int,
        loss: float,
        lr: float,
        images_per_second: float,
        image_size: int | None = None,
    ) -> None:
        """Says what is known after a step.

        Args:
            step: steps done, over all launches of the run.
            epoch: the epoch that the step belongs to, from 0; shown from 1.
            loss: of the training.
            lr: the learning rate.
            images_per_second: over all processes.
            image_size: pixels of a side, shown where it is given.
        """
        fields = {"epoch": f"epoch {epoch + 1}", "loss": f"loss {loss:.4f}", "lr": f"lr {lr:.2e}"}
        fields["speed"] = f"{number(images_per_second)} images/s"
        if image_size is not None:
            fields["size"] = f"{image_size} px"
        self._bar.update(step, **fields)

    def leave_out(self, seconds: float) -> None:
        """Says that the last ``seconds`` went into something else, an evaluation or a save."""
        self._bar.leave_out(seconds)


class Console:
    """The console of a door.

    Args:
        enabled: False on every rank but 0; then every method does nothing.
        stream: where to write; by default standard output.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        self._screen: Screen | None = None
        if enabled:
            self._screen = TerminalScreen(stream) if is_live(stream) else PlainScreen(stream)
        self._head_shown = False
        self._depth = 0

    def header(self, title: str, rows: Mapping[str, str]) -> None:
        """A panel of names and values, in the order given."""
        if self._screen:
            self._screen.panel(title, dict(rows))

    def line(self, text: str) -> None:
        """One line."""
        if self._screen:
            self._screen.line(text)

    def warn(self, text: str) -> None:
        """One line that must not be overlooked."""
        if self._screen:
            self._screen.warn(text)

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
        """A bar while the context lasts; when it ends well, and within no other, one line with the time and speed."""
        progress = Progress(description, total, unit)
        with self._shown(progress):
            yield Bar(self._screen, progress)

    @contextmanager
    def training(self, total_steps: int, start_step: int = 0) -> Iterator[TrainingBar]:
        """The bar of a training from `start_step` to `total_steps`, and one line when it ends well."""
        progress = Progress("train", total_steps, "steps", start_step)
        with self._shown(progress):
            yield TrainingBar(Bar(self._screen, progress))

    @contextmanager
    def _shown(self, progress: Progress) -> Iterator[None]:
        if self._screen is None:
            yield
            return
        self._depth += 1
        try:
            with self._screen.bar(progress):
                yield
        finally:
            self._depth -= 1
        if not self._depth:
            self._screen.line(progress.finished())

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the table of evaluations; the first one brings the head.

        Args:
            row: ``epoch`` (from 0, shown from 1), ``step``, ``split``, ``val/loss`` and ``val/accuracy`` (or of the
                split that it names); and where known ``train/loss``, ``image_size`` and ``full_image_size`` (pixels; a
                row scored at less than the full size is labelled) and ``best`` (whether it is the best so far).
        """
        if not self._screen:
            return
        if not self._head_shown:
            self._head_shown = True
            self._screen.row(EVALUATION_HEAD, EVALUATION_WIDTHS, "head")
        split, size, full = row.get("split", "val"), row.get("image_size"), row.get("full_image_size")
        note = "best" if row.get("best") else ""
        if size is not None and full is not None and size < full:
            note = f"{note or 'scored'} at {size} px"
        train_loss = row.get("train/loss")
        cells = (
            str(row["epoch"] + 1),
            f"{row['step']:,}",
            split,
            "" if train_loss is None else f"{train_loss:.4f}",
            f"{row[f'{split}/loss']:.4f}",
            f"{100 * row[f'{split}/accuracy']:.2f} %",
            note,
        )
        self._screen.row(cells, EVALUATION_WIDTHS, "best" if row.get("best") else "row")

    def result(self, summary: Mapping[str, Any], words: str, paths: Mapping[str, str]) -> None:
        """What came out: accuracy of each split with its 95 % interval, the time, the text, the paths."""
        if not self._screen:
            return
        rows: dict[str, str] = {}
        for split in ("val", "test"):
            if summary.get(split):
                rows[split] = _accuracy(summary[split])
        if summary.get("checkpoint"):
            rows["checkpoint"] = _checkpoint(summary["checkpoint"])
        if is_number(summary.get("train_seconds")):
            rows["training"] = duration(float(summary["train_seconds"]))
            if is_number(summary.get("images_per_second")):
                rows["training"] += f", {number(float(summary['images_per_second']))} images/s"
        self._screen.panel("result", rows)
        self._screen.text(words)
        if paths:
            self._screen.panel("written", {name: str(path) for name, path in paths.items()})

    @contextmanager
    def library_warnings(self) -> Iterator[None]:
        """Python warnings become one line each while the context lasts, the same text once; none on the other ranks."""
        seen: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
            text = textwrap.shorten(str(message), LONGEST_WARNING, placeholder=" ...")
            if text not in seen:
                seen.add(text)
                self.warn(f"{category.__name__}: {text}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield


def _accuracy(split: Mapping[str, Any]) -> str:
    text = f"{100 * split['accuracy']:.2f} % ({split['correct']:,} of {split['total']:,}"
    if "interval95" in split:
        low, high = split["interval95"]
        text += f"; 95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    return f"{text})"


def _checkpoint(checkpoint: Mapping[str, Any]) -> str:
    text = f"step {checkpoint['step']:,}"
    if "chosen" in checkpoint:
        text += f" ({checkpoint['chosen']})"
    if checkpoint.get("averaged"):
        text += ", averaged weights"
    if checkpoint.get("image_size"):
        text += f", {checkpoint['image_size']} px"
    return text
