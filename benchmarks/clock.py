"""Time of a device: a CPU's by the host's clock, a GPU's by CUDA events on its stream."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Runs from its making to `stop`. What was queued on a GPU before does not count; what was queued since does."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._begin.record()
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the start by the host's clock: does not wait for the GPU."""
        return time.perf_counter() - self._start

    def stop(self) -> float:
        """Seconds from the start until all work that was given to the device is done."""
        if not self._on_gpu:
            return self.elapsed()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1000


class Gaps:
    """The time in which a GPU's stream stands still between one step's work and the next one's. Nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin_step(self) -> None:
        """Before the first work of a step is given to the GPU."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._events.append((begin, end))

    def end_step(self) -> None:
        """After the last work of the step was given to the GPU."""
        if self._on_gpu:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """All gaps together. Waits for the GPU.

        Where the host is ahead of the GPU, a step's first event stands right behind the last step's work and the gap
        is that of two events; where the host is late, with data or with work, the gap is what the GPU waited.
        """
        if not self._events:
            return 0.0
        self._events[-1][1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return sum(before[1].elapsed_time(after[0]) for before, after in pairs) / 1000
