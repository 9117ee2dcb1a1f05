"""The output of a command: a header, bars, a table of evaluations, the result.

One console per process. On ranks other than 0 it is made with ``enabled=False`` and discards everything. In a terminal
rich draws panels and bars in place; a pipe, a file or a dumb terminal gets plain lines with the time and no control
codes.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from mnistm_dist.errors import escape_control
from mnistm_dist.reporting.describe import describe, describe_accuracy, describe_checkpoint, duration, number
from mnistm_dist.reporting.predictions import Predictions

WIDEST = 100  # columns that panels and bars fill at most
TEXT_WIDTH = 71  # columns that paragraphs are wrapped to: 80 with the time
LONGEST_WARNING = 300  # characters of a library's warning that are shown
REFRESH_SECONDS = 0.5  # between two drawings of a bar in a terminal; each costs milliseconds
# Between two plain lines of a bar, at first and at most; it grows with the time that the bar is open.
FIRST_LINE_SECONDS, LAST_LINE_SECONDS = 5.0, 60.0
EVALUATION = "{:>5}  {:>8}  {:>10}  {:>8}  {:>12}  {}"  # a row of the table of evaluations


class LossyStream:
    """A text stream that never raises: a closed terminal, a reader that has gone or a full disk must not stop a run.

    Characters that the encoding lacks are escaped; output that cannot be written is lost. Everything is flushed at
    once, so that the log of a killed job is complete.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                # Python flushes standard output when it exits, and would fail again, with another exit code:
                # https://docs.python.org/3/library/signal.html#note-on-sigpipe
                with Path(os.devnull).open("w") as null:
                    os.dup2(null.fileno(), self._stream.fileno())
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""


class Bars(Progress):
    """The open bars, one above the other, each with its text below it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield Constrain(self.make_tasks_table([task]), WIDEST)
            yield Text(f"  {bar_text(task)}", style="cyan", no_wrap=True, overflow="ellipsis")


def bar_text(task: Task) -> str:
    """Return ``1,200/55,000 images  1,204 images/s``, or the note of the bar instead of the speed."""
    return f"{_amount(task)}  {task.fields['note'] or _rate(task, task.speed or 0.0)}".rstrip()


def finished_text(task: Task) -> str:
    """Return the line that stays when a bar is closed: ``pack: 1,200 images in 1.0 s (1,200 images/s)``."""
    elapsed, done = task.elapsed or 0.0, task.completed - task.fields["first"]
    rate = f" ({_rate(task, done / elapsed)})" if elapsed and done > 0 else ""
    return f"{task.description}: {_amount(task)} in {duration(elapsed)}{rate}"


def _amount(task: Task) -> str:
    scale, digits, unit = task.fields["unit"]
    counts = [count for count in (task.completed, task.total) if count is not None]
    return f"{'/'.join(f'{scale * count:,.{digits}f}' for count in counts)} {unit}"


def _rate(task: Task, speed: float) -> str:
    scale, _, unit = task.fields["unit"]
    return f"{number(scale * speed)} {unit}/s" if speed else ""


class Bar:
    """A bar, which is a callback ``progress(done, total)``. Calls are cheap: it is drawn only now and then."""

    def __init__(self, console: Console, task: Task) -> None:
        self._console, self._task, self._drawn = console, task, time.monotonic()

    def __call__(self, done: int, total: int = 0, note: str = "", left: float | None = None) -> None:
        """Set how much is done of ``total``; 0: as before, or unknown.

        ``note`` is shown instead of the speed; ``left``: seconds, instead of what follows from the speed.
        """
        console, task, now = self._console, self._task, time.monotonic()
        console.bars.update(task.id, total=total or None, completed=done, note=note)
        seconds = task.time_remaining if left is None else left
        task.fields["left"] = f"{duration(seconds)} left" if seconds else ""
        line_seconds = min(max(FIRST_LINE_SECONDS, (task.elapsed or 0.0) / 50), LAST_LINE_SECONDS)
        if now - self._drawn < (REFRESH_SECONDS if console.live else line_seconds):
            return
        self._drawn = now
        if console.live:
            console.bars.refresh()
        else:
            share = f" {task.percentage:.0f} %" if task.total else ""
            console.line(f"{task.description}{share}  {bar_text(task)}  {task.fields['left']}".rstrip())


class Console:
    """The console of a command.

    Args:
        enabled: False on ranks other than 0: nothing is written.
        stream: where to write; by default standard output.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        # Whether bars are redrawn in place.
        self.live = enabled and stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
        self._rich = RichConsole(
            file=cast(TextIO, LossyStream(stream)),
            highlight=False,
            quiet=not enabled,
            force_terminal=self.live,
            color_system="auto" if self.live else None,
        )
        self.bars = Bars(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[left]}", style="cyan"),
            console=self._rich,
            auto_refresh=False,
            transient=True,
            expand=True,
            speed_estimate_period=30.0,
            get_time=lambda: time.monotonic(),
            disable=not self.live,
        )
        self._has_evaluations = False

    def header(self, title: str, rows: Mapping[str, str]) -> None:
        """Show names and values under a title."""
        if self.live:
            grid = Table.grid(Column(style="cyan", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
            for name, value in rows.items():
                grid.add_row(Text(escape_control(name)), Text(escape_control(value)))
            head, width = Text(escape_control(title), style="bold"), min(self._rich.width, WIDEST)
            self._rich.print(Panel(grid, title=head, title_align="left", width=width, border_style="cyan"))
        else:
            width = max(map(len, rows), default=0)
            for line in (title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())):
                self.line(line)

    def line(self, text: str, style: str = "") -> None:
        """Show a text line by line; in a terminal, in one of rich's styles."""
        for part in text.splitlines() or [""]:
            shown = (
                escape_control(part) if self.live else f"{time.strftime('%H:%M:%S')} {escape_control(part)}".rstrip()
            )
            self._rich.print(Text(shown, style), soft_wrap=not self.live)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self.line(f"warning: {text}", "yellow")

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str = "images", start: int = 0) -> Iterator[Bar]:
        """Show a bar inside the context, ``start`` of ``total`` done. Bytes are shown as MB.

        If the context exits without an error and no other bar is open, one line with time and speed is left.
        """
        self.bars.start()
        self.bars.add_task(
            escape_control(description),
            total=total,
            completed=start,
            # Its scale, decimals and name.
            unit=(1e-6, 1, "MB") if unit == "bytes" else (1, 0, unit),
            first=start,
            note="",
            left="",
        )
        task = self.bars.tasks[-1]
        try:
            yield Bar(self, task)
        finally:
            self.bars.remove_task(task.id)
            self.bars.refresh()
            if self.live and not self.bars.tasks:
                self.bars.stop()
        if not self.bars.tasks:
            self.line(finished_text(task))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Add a row to the table of evaluations.

        Args:
            row: ``epoch``, ``step``, ``val/loss``, ``val/accuracy``; optional: ``train/loss``, ``image_size`` and
                ``full_image_size`` (pixels; a smaller size is noted), ``best`` (whether it is the best so far).
        """
        if not self._has_evaluations:
            self._has_evaluations = True
            head = EVALUATION.format("epoch", "step", "train loss", "val loss", "val accuracy", "")
            self.line(head.rstrip(), "bold underline")
        size, train_loss = row.get("image_size"), row.get("train/loss")
        at_size = f"at {size} px" if size is not None and size < row.get("full_image_size", size) else ""
        text = EVALUATION.format(
            row["epoch"],
            f"{row['step']:,}",
            "" if train_loss is None else f"{train_loss:.4f}",
            f"{row['val/loss']:.4f}",
            f"{100 * row['val/accuracy']:.2f} %",
            f"{'best' if row.get('best') else ''} {at_size}".lstrip(),
        )
        self.line(text.rstrip(), "green" if row.get("best") else "")

    def result(
        self,
        folder: Path | None,
        summary: Mapping[str, Any],
        results: Mapping[str, Predictions],
        commands: Mapping[str, str],
        *,
        report: bool,
    ) -> None:
        """Show the result: accuracy of each split with its interval, the time, the most common confusions.

        Args:
            folder: where the results were written, if they were; in a terminal, links lead there.
            summary: as in ``summary.json``.
            results: the predictions of each split.
            commands: what to do next, quoted for a shell; never wrapped, so that they can be copied.
            report: whether the report was written, too.
        """
        text = "\n\n".join(f"{split}: {describe(predictions.metrics)}" for split, predictions in results.items())
        names = {"report": "report.html"} if report else {}
        names |= {f"predictions, {split}": f"predictions_{split}.csv" for split in results}
        paths = {name: folder / file for name, file in names.items()} if folder else {}
        rows = {
            split: describe_accuracy(score["correct"], score["total"], score["interval95"])
            for split in ("val", "test")
            if (score := summary.get(split))
        }
        if summary.get("checkpoint"):
            rows["checkpoint"] = describe_checkpoint(summary["checkpoint"])
        if summary.get("train_seconds") and summary.get("images_per_second"):
            rows["training"] = f"{duration(summary['train_seconds'])}, {number(summary['images_per_second'])} images/s"
        self.header("result", rows)
        for paragraph in text.splitlines():
            # A number and its % stay on one line.
            for line in textwrap.wrap(paragraph.replace(" %", "\N{NO-BREAK SPACE}%"), TEXT_WIDTH):
                self.line(line.replace("\N{NO-BREAK SPACE}", " "))
        width = max(map(len, [*paths, *commands]), default=0)
        for title, lines in (("written", paths), ("next", commands)):
            for i, (name, value) in enumerate(lines.items()):
                link = f"link {value.resolve().as_uri()}" if isinstance(value, Path) and self.live else ""
                head = f"{'' if i else title:<9}{name:<{width}}  "
                clock = "" if self.live else f"{time.strftime('%H:%M:%S')} "
                self._rich.print(Text(clock + head).append(escape_control(str(value)), link), soft_wrap=True)

    @contextmanager
    def library_warnings(self) -> Iterator[None]:
        """Show Python warnings inside the context as one line each, equal ones once."""
        warn_once = functools.cache(self.warn)

        def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
            warn_once(f"{category.__name__}: {textwrap.shorten(str(message), LONGEST_WARNING, placeholder=' ...')}")

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
