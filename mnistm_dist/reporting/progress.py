"""How far a piece of work is, how fast it goes and how long it will take: numbers and their words, no output."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 30.0
"""The speed is measured over this much of the recent past, so that it follows a change of image size."""


class Progress:
    """The state of one bar.

    Args:
        description: what is being done.
        total: how much there is to do, None where that is unknown.
        unit: the plural noun of what is counted (``images``, ``steps``; ``bytes`` are shown as megabytes).
        start: what was done before this process began (a resumed run).
        clock: seconds that only grow.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = start
        self.fields: dict[str, str] = {}
        self._start = start
        self._clock = clock
        self._began = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._began, start)])

    def advance(self, done: int, fields: dict[str, str]) -> None:
        """Notes that `done` are done by now, with what else is to be shown beside it."""
        now = self._clock()
        self.done = done
        self.fields = fields
        # One point in a fiftieth of the window is enough, and bounds the queue.
        if now - self._recent[-1][0] >= WINDOW_SECONDS / 50 or len(self._recent) == 1:
            self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()

    def leave_out(self, seconds: float) -> None:
        """Notes that something else was done in the last `seconds`, which the recent speed is not to count."""
        self._recent = deque((then + seconds, done) for then, done in self._recent)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def speed(self) -> float | None:
        """Units per second over the recent past, None before anything is done."""
        then, done_then = self._recent[0]
        passed = self._clock() - then
        return (self.done - done_then) / passed if passed > 0 and self.done > done_then else None

    @property
    def overall_speed(self) -> float | None:
        """Units per second since the beginning, None before anything is done."""
        elapsed = self.elapsed
        return (self.done - self._start) / elapsed if elapsed > 0 and self.done > self._start else None

    @property
    def seconds_left(self) -> float | None:
        """What is left at the recent speed, None where it cannot be known."""
        if self.total is None or self.speed is None:
            return None
        return max(self.total - self.done, 0) / self.speed

    def counted(self) -> str:
        """``1,200/55,000 images``; bytes as megabytes."""
        of = f"/{self._amount(self.total)}" if self.total is not None else ""
        return f"{self._amount(self.done)}{of} {'MB' if self.unit == 'bytes' else self.unit}"

    def _amount(self, count: float) -> str:
        return f"{count / 1e6:,.1f}" if self.unit == "bytes" else f"{count:,.0f}"

    def _rate(self, speed: float) -> str:
        return f"{number(speed / 1e6)} MB/s" if self.unit == "bytes" else f"{number(speed)} {self.unit}/s"

    def left(self) -> str:
        """``4:05 left``, or nothing where it cannot be known."""
        seconds = self.seconds_left
        return "" if seconds is None else f"{duration(seconds)} left"

    def rate(self) -> str:
        """``1,204 images/s``, or nothing before anything is done."""
        speed = self.speed
        return "" if speed is None else self._rate(speed)

    def finished(self) -> str:
        """The one line that stays when the work is over."""
        speed = self.overall_speed
        rate = f" ({self._rate(speed)})" if speed is not None else ""
        return f"{self.description}: {self.counted()} in {duration(self.elapsed)}{rate}"


def number(value: float) -> str:
    """Three significant figures below 100, whole numbers with separators above."""
    return f"{value:.3g}" if abs(value) < 99.95 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``4:05`` (minutes), ``2:04:05`` (hours), ``3 d 2:04:05``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{second:02d}" if hours or days else f"{minutes}:{second:02d}"
    return f"{days} d {clock}" if days else clock
