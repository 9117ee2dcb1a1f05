"""Diagnostics of a run: sanity checks before the first step, and a profiler trace."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from mnistm_dist.errors import UserError

# Accepted distance of the initial loss from ln(classes): BatchNorm in the head spreads the untrained logits.
INITIAL_LOSS_TOLERANCE = 0.7
# Steps of Adam on one batch, and the loss that they must reach.
OVERFIT_STEPS, OVERFIT_LOSS = 60, 0.05
# Steps of a launch before the traced ones: without the profiler (first allocations, compilation), and with it.
SKIPPED_STEPS, WARM_UP_STEPS = 4, 1
OPERATORS_SHOWN = 40


def check_model_learns(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> tuple[float, float]:
    """Check that the initial loss is ln(classes) and that one batch can be overfitted; ``model`` is not changed.

    A wrong label column, a dead layer or a broken normalisation shows here in seconds: Karpathy, "A Recipe for Training
    Neural Networks" (2019). ``images`` float (B, 3, H, W), normalised; ``labels`` int64 (B,). Return the first and the
    last loss. Raise `UserError` with the value that is off.
    """
    probe_model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(probe_model.parameters(), lr=2e-3)
    losses = []
    for _ in range(OVERFIT_STEPS):
        loss = nn.functional.cross_entropy(probe_model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not abs(losses[0] - math.log(num_classes)) < INITIAL_LOSS_TOLERANCE:
        raise UserError(
            f"sanity checks: the initial loss is {losses[0]:.3f}, expected about ln({num_classes}) = "
            f"{math.log(num_classes):.3f}; check the model, the labels and the normalisation, or use --no-sanity-checks"
        )
    if not losses[-1] < OVERFIT_LOSS:
        raise UserError(
            f"sanity checks: one batch cannot be overfitted: loss {losses[-1]:.3f} after {OVERFIT_STEPS} steps; check "
            "the model and the labels, or use --no-sanity-checks"
        )
    return losses[0], losses[-1]


@contextmanager
def profile_steps(folder: Path | None, *, steps: int, first_step: int) -> Iterator[Callable[[], None]]:
    """Trace ``steps`` training steps with torch.profiler; call the yielded function at the end of each step.

    Writes ``trace-step-00000005.json.gz`` (for https://ui.perfetto.dev) and ``operators-step-00000005.txt`` into
    ``folder``, named by the first traced step. ``first_step`` (from 0) is the first of the launch. With no steps or no
    folder, nothing is traced.
    """
    if not steps or folder is None:
        yield lambda: None
        return
    activities, sort_by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if torch.cuda.is_available():
        activities, sort_by = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    name = f"step-{first_step + SKIPPED_STEPS + WARM_UP_STEPS:08d}"

    def write(profiler: profile) -> None:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-{name}.json.gz"))
        table = profiler.key_averages().table(sort_by=sort_by, row_limit=OPERATORS_SHOWN)
        (folder / f"operators-{name}.txt").write_text(table, encoding="utf-8")

    plan = schedule(wait=SKIPPED_STEPS, warmup=WARM_UP_STEPS, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
