"""Where a console writes: a terminal, drawn by rich, or a pipe or file, in plain lines with the time."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnistm_dist.errors import escape_control
from mnistm_dist.reporting.describe import duration, number

WIDEST = 100
"""Columns that panels and bars fill at most."""
REFRESH_SECONDS = 0.5
"""Between two drawings of a bar in a terminal; each costs milliseconds."""
FIRST_LINE_SECONDS, LAST_LINE_SECONDS = 5.0, 60.0
"""Between two plain lines of a bar, at first and at most; it grows with the time that the bar is open."""


def is_live(stream: TextIO) -> bool:
    """Return whether bars can be redrawn: on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


class NullStream(io.TextIOBase):
    """Discards what is written."""

    def write(self, text: str) -> int:
        return len(text)


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
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""


class Bars(Progress):
    """The open bars, one above the other, each with its text below it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for bar in self.tasks:
            yield Constrain(self.make_tasks_table([bar]), WIDEST)
            yield Text(f"  {bar_text(bar)}", style="cyan", no_wrap=True, overflow="ellipsis")


class PlainScreen:
    """Lines with the time of day and no control codes."""

    live = False

    def __init__(self, stream: TextIO) -> None:
        self.stream = cast(TextIO, LossyStream(stream))
        self.rich = RichConsole(file=self.stream, highlight=False, quiet=not self.live)
        self.left_out = 0.0
        """Seconds that the bars do not count."""
        self.bars = Bars(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            console=self.rich,
            auto_refresh=False,
            transient=True,
            expand=True,
            speed_estimate_period=30.0,
            get_time=lambda: time.monotonic() - self.left_out,
            disable=not self.live,
        )

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """Write names and values under a title."""
        width = max(map(len, rows), default=0)
        for line in (title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())):
            self.line(line)

    def line(self, text: str, style: str = "") -> None:
        """Write a line; the style is one of rich's."""
        for part in text.splitlines() or [""]:
            self.stream.write(f"{time.strftime('%H:%M:%S')} {escape_control(part)}".rstrip() + "\n")

    def open_bar(self, description: str, total: int | None, unit: str, start: int) -> Task:
        """Open a bar, ``start`` of ``total`` done."""
        amount = (1e-6, 1, "MB") if unit == "bytes" else (1, 0, unit)
        fields: Any = {"amount": amount, "first": start, "note": "", "drawn": time.monotonic()}
        self.bars.start()
        self.bars.add_task(escape_control(description), total=total, completed=start, **fields)
        return self.bars.tasks[-1]

    def advance(self, bar: Task, done: int, total: int | None, note: str) -> None:
        """Update a bar; it is drawn only now and then. ``note`` is shown instead of the speed."""
        self.bars.update(bar.id, total=total, completed=done, note=note)
        now = time.monotonic()
        interval = min(max(FIRST_LINE_SECONDS, (bar.elapsed or 0.0) / 50), LAST_LINE_SECONDS)
        if now - bar.fields["drawn"] >= (REFRESH_SECONDS if self.live else interval):
            bar.fields["drawn"] = now
            self.draw(bar)

    def draw(self, bar: Task) -> None:
        """Draw a bar."""
        left = "" if bar.time_remaining is None else f"  {duration(bar.time_remaining)} left"
        self.line(f"{bar.description} {bar_text(bar)}{left}")

    def close_bar(self, bar: Task) -> None:
        """Remove a bar."""
        self.bars.remove_task(bar.id)
        self.bars.refresh()
        if not self.bars.tasks:
            self.bars.stop()


class TerminalScreen(PlainScreen):
    """Panels, colours and bars that are redrawn in place."""

    live = True

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(Text(escape_control(name)), Text(escape_control(value)))
        head = Text(escape_control(title), style="bold")
        width = min(self.rich.width, WIDEST)
        self.rich.print(Panel(grid, title=head, title_align="left", width=width, border_style="cyan"))

    def line(self, text: str, style: str = "") -> None:
        for part in text.splitlines() or [""]:
            self.rich.print(Text(escape_control(part), style=style))

    def draw(self, bar: Task) -> None:
        self.bars.refresh()


def bar_text(bar: Task) -> str:
    """Return ``1,200/55,000 images  1,204 images/s``, or the note of the bar instead of the speed."""
    return f"{_amount(bar)}  {bar.fields['note'] or _rate(bar, bar.speed or 0.0)}".rstrip()


def finished_text(bar: Task) -> str:
    """Return the line that stays when a bar is closed: ``pack: 1,200 images in 1.0 s (1,200 images/s)``."""
    elapsed, rate = bar.elapsed or 0.0, ""
    if elapsed and bar.completed > bar.fields["first"]:
        rate = f" ({_rate(bar, (bar.completed - bar.fields['first']) / elapsed)})"
    return f"{bar.description}: {_amount(bar)} in {duration(elapsed)}{rate}"


def _amount(bar: Task) -> str:
    scale, digits, unit = bar.fields["amount"]
    counts = [count for count in (bar.completed, bar.total) if count is not None]
    return f"{'/'.join(f'{scale * count:,.{digits}f}' for count in counts)} {unit}"


def _rate(bar: Task, speed: float) -> str:
    scale, _, unit = bar.fields["amount"]
    return f"{number(scale * speed)} {unit}/s" if speed else ""
