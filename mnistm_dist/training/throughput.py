"""Training throughput: a clock that runs during training steps only."""

from __future__ import annotations

import time


class Throughput:
    """Seconds spent in training steps, without evaluation and saving."""

    def __init__(self, steps_done: int) -> None:
        self._window_seconds, self._window_start = 0.0, steps_done
        self._started = time.perf_counter()

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Stop the clock; return the seconds since `start`."""
        seconds = time.perf_counter() - self._started
        self._window_seconds += seconds
        return seconds

    def next_window(self, step: int) -> tuple[int, float]:
        """Return the steps, including the running ``step`` (from 0), and the seconds since the last call."""
        seconds = self._window_seconds + time.perf_counter() - self._started
        steps, self._window_start = step + 1 - self._window_start, step + 1
        # What remains of the running step, until `stop`, belongs to the next window.
        self._window_seconds -= seconds
        return steps, seconds
