"""A trace of a few training steps by torch's profiler, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM_UP = 4, 1
"""Steps of a launch before the traced ones: without the profiler (first allocations, compilation), and with it
(its own start)."""
OPERATORS_SHOWN = 40


@contextmanager
def traced(folder: Path | None, *, steps: int, first_step: int) -> Iterator[Callable[[], None]]:
    """Gives what the loop calls at the end of each step; traces ``steps`` of them into ``folder``.

    Written there once they are done, named by the first traced step: ``trace-step-00000005.json.gz`` and
    ``operators-step-00000005.txt``, the operators by their own time. ``first_step`` (from 0) is the launch's first.
    With no steps, or on a rank without a folder, nothing happens. A run that is too short leaves what it has; one that
    ends before the traced steps begin leaves nothing.
    """
    if not steps or folder is None:
        yield lambda: None
        return
    activities, by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, by = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    name = f"step-{first_step + SKIPPED + WARM_UP:08d}"

    def write(profiler: profile) -> None:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-{name}.json.gz"))
        table = profiler.key_averages().table(sort_by=by, row_limit=OPERATORS_SHOWN)
        (folder / f"operators-{name}.txt").write_text(table, encoding="utf-8")

    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
