"""The two places where a console can appear: a terminal, drawn by rich, and a pipe or file, written in plain lines.

Both offer the same few methods (`Screen`); what stands in a row is decided in `mnistm_dist.reporting.console`.
"""

from __future__ import annotations

import errno
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from mnistm_dist.errors import escape_control
from mnistm_dist.reporting.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

PLAIN_WIDTH = 80
"""Columns that plain lines are wrapped to where they hold running text."""
WIDEST = 100
"""Columns that panels fill at most in a wide terminal."""
REFRESH_SECONDS = 0.5
"""Between two drawings of the live bars: each costs milliseconds, and a step may take no more than 0.1 s."""
FIRST_PLAIN_SECONDS = 5.0
"""Between two plain lines of a bar at first; it grows with the time that the bar has run."""
LAST_PLAIN_SECONDS = 60.0
"""Between two plain lines of a bar at most."""


class Screen(Protocol):
    """Where a console appears."""

    def panel(self, title: str, rows: dict[str, str]) -> None:
        """Names and values under a title."""

    def line(self, text: str) -> None:
        """One line of text."""

    def warn(self, text: str) -> None:
        """One line that must not be overlooked."""

    def text(self, text: str) -> None:
        """Running text, a paragraph per line."""

    def row(self, cells: Sequence[str], widths: Sequence[int], kind: str) -> None:
        """A row of a growing table; kind is ``head``, ``row`` or ``best``; a negative width sets left."""

    def due(self, progress: Progress) -> bool:
        """Whether an advance of this bar would be shown now."""

    def show(self, progress: Progress) -> None:
        """The bar has advanced and is due."""

    def bar(self, progress: Progress) -> AbstractContextManager[None]:
        """A context in which the bar is shown."""


def is_live(stream: TextIO) -> bool:
    """Whether bars can be redrawn in place: a terminal that knows how to move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


@contextmanager
def lasting(stream: TextIO) -> Iterator[None]:
    """Lets a run go on whose terminal was closed, whose reader has gone or whose disk is full: output is lost, no more.

    A stream that nobody will read again is led to the null device, or else its last flush would fail as the process
    ends, and with it the exit code (https://docs.python.org/3/library/signal.html#note-on-sigpipe).
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def cells_of(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells set right, or left where the width is negative, two blanks apart."""
    return "  ".join(
        cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in zip(cells, widths, strict=True)
    ).rstrip()


class PlainScreen:
    """Lines with the time of day in front, no control codes, each flushed, so that a killed job's log is complete."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: dict[Progress, float] = {}

    def panel(self, title: str, rows: dict[str, str]) -> None:
        self.line(escape_control(title))
        width = max((len(escape_control(name)) for name in rows), default=0)
        for name, value in rows.items():
            self.line(f"  {escape_control(name).ljust(width)}  {escape_control(value)}")

    def line(self, text: str) -> None:
        for part in text.splitlines() or [""]:
            self._write(f"{time.strftime('%H:%M:%S')} {escape_control(part)}".rstrip() + "\n")

    def warn(self, text: str) -> None:
        self.line(f"warning: {text}")

    def text(self, text: str) -> None:
        for paragraph in text.splitlines():
            # A number and its % stay on one line.
            for part in textwrap.wrap(paragraph.replace(" %", "\N{NO-BREAK SPACE}%"), PLAIN_WIDTH - len("00:00:00 ")):
                self.line(part.replace("\N{NO-BREAK SPACE}", " "))

    def row(self, cells: Sequence[str], widths: Sequence[int], kind: str) -> None:
        self.line(cells_of(cells, widths))

    def due(self, progress: Progress) -> bool:
        elapsed = progress.elapsed
        last = self._shown.get(progress, 0.0)
        return elapsed - last >= min(max(FIRST_PLAIN_SECONDS, elapsed / 50), LAST_PLAIN_SECONDS)

    def show(self, progress: Progress) -> None:
        self._shown[progress] = progress.elapsed
        parts = [f"{progress.description} {progress.counted()}", *progress.fields.values()]
        if not progress.fields:
            parts.append(progress.rate())
        self.line("  ".join(part for part in [*parts, progress.left()] if part))

    @contextmanager
    def bar(self, progress: Progress) -> Iterator[None]:
        try:
            yield
        finally:
            self._shown.pop(progress, None)

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        with lasting(self._stream):
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()


class TerminalScreen:
    """Colours, panels and bars that are redrawn in place, by rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole

        self._stream = stream
        self._rich = RichConsole(file=stream, highlight=False)
        self._bars: list[Progress] = []
        self._live: Live | None = None
        self._drawn = 0.0

    @property
    def _width(self) -> int:
        return min(self._rich.width, WIDEST)

    def _print(self, what: RenderableType, width: int | None = None) -> None:
        with lasting(self._stream):
            self._rich.print(what, width=width)

    def panel(self, title: str, rows: dict[str, str]) -> None:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(Text(escape_control(name)), Text(escape_control(value)))
        self._print(
            Panel(
                grid,
                title=Text(escape_control(title), style="bold"),
                title_align="left",
                width=self._width,
                border_style="cyan",
            )
        )

    def line(self, text: str) -> None:
        from rich.text import Text

        self._print(Text("\n".join(map(escape_control, text.splitlines()))))

    def warn(self, text: str) -> None:
        from rich.text import Text

        self._print(Text.assemble(("warning: ", "bold yellow"), escape_control(text)))

    def text(self, text: str) -> None:
        from rich.text import Text

        for paragraph in text.splitlines():
            self._print(Text(escape_control(paragraph)), width=self._width)

    def row(self, cells: Sequence[str], widths: Sequence[int], kind: str) -> None:
        from rich.text import Text

        style = {"head": "bold underline", "best": "green"}.get(kind, "")
        self._print(Text(escape_control(cells_of(cells, widths)), style=style, no_wrap=True, overflow="ellipsis"))

    def due(self, progress: Progress) -> bool:
        return time.monotonic() - self._drawn >= REFRESH_SECONDS

    def show(self, progress: Progress) -> None:
        self._drawn = time.monotonic()
        if self._live:
            with lasting(self._stream):
                self._live.refresh()

    @contextmanager
    def bar(self, progress: Progress) -> Iterator[None]:
        # One live display holds all bars: that of an evaluation stands under that of the training.
        from rich.live import Live

        self._bars.append(progress)
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=True, get_renderable=self._draw)
            with lasting(self._stream):
                self._live.start(refresh=True)
        try:
            yield
        finally:
            self._bars.remove(progress)
            if self._bars:
                self.show(progress)
            else:
                with lasting(self._stream):
                    self._live.stop()
                self._live = None

    def _draw(self) -> RenderableType:
        from rich.console import Group

        return Group(*(part for progress in self._bars for part in self._lines(progress)))

    def _lines(self, progress: Progress) -> list[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        words = Text("  ".join(part for part in (progress.counted(), progress.left()) if part))
        if not progress.fields and progress.rate():
            words = Text("  ".join(part for part in (progress.counted(), progress.rate(), progress.left()) if part))
        name = Text(progress.description, style="bold", no_wrap=True, overflow="ellipsis")
        room = self._width - name.cell_len - words.cell_len - 2
        bar = ProgressBar(
            total=progress.total, completed=progress.done, width=max(room, 4), pulse=progress.total is None
        )
        grid = Table.grid(padding=(0, 1), expand=False)
        grid.add_row(name, bar, words)
        lines: list[RenderableType] = [grid]
        if progress.fields:
            lines.append(
                Text("  " + "  ".join(progress.fields.values()), style="cyan", no_wrap=True, overflow="ellipsis")
            )
        return lines
