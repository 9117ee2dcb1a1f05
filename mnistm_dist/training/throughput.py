"""How fast a run trains: a clock that runs in training steps only."""

from __future__ import annotations

import time


class Throughput:
    """Seconds in training steps, without what stands between them: evaluation and saving."""

    def __init__(self, steps_done: int) -> None:
        self._lap_seconds, self._lap_start = 0.0, steps_done
        self._since = time.perf_counter()

    def go(self) -> None:
        """From here on it counts."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """Counts no more; the seconds since `go`."""
        seconds = time.perf_counter() - self._since
        self._lap_seconds += seconds
        return seconds

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap, the running ``step`` (from 0) with them."""
        now = self._lap_seconds + time.perf_counter() - self._since
        steps, self._lap_start = step + 1 - self._lap_start, step + 1
        # The running step's remainder, until `stop`, belongs to the next lap.
        self._lap_seconds -= now
        return steps, now
