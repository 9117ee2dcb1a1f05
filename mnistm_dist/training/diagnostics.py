"""Two checks before a debug run trains: the first loss is that of a guess, and one batch can be learnt by heart.

Karpathy's "A Recipe for Training Neural Networks" (2019) asks for both: a wrong label column, a dead layer or a broken
normalisation shows here in seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, schedule

FIRST_LOSS_TOLERANCE = 0.7
"""How far the first loss may be from ln(classes): BatchNorm in the head gives the untrained logits a spread."""
STEPS, LEARNT = 60, 0.05
"""Steps of Adam on one batch, and the loss below which it counts as learnt."""


class CheckFailed(RuntimeError):
    """A check before training did not hold."""


def check_model_learns(model: nn.Module, images: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """Gives the first loss and the last one after `STEPS` steps on one batch; ``model`` itself stays as it was.

    ``images`` float (B, 3, H, W), normalised; ``labels`` int64 (B,). Raises `CheckFailed` with the figure that is off.
    """
    probe_model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(probe_model.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(probe_model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not abs(losses[0] - math.log(classes)) < FIRST_LOSS_TOLERANCE:
        raise CheckFailed(
            f"the first loss is {losses[0]:.3f}, a guess among {classes} classes has {math.log(classes):.3f}"
        )
    if not losses[-1] < LEARNT:
        raise CheckFailed(f"one batch could not be learnt by heart: loss {losses[-1]:.3f} after {STEPS} steps")
    return losses[0], losses[-1]


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
