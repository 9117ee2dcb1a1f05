"""One optimizer step: this rank's micro-batches, one gradient all-reduce over the ranks, one update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnistm_dist.config import OptimConfig
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World
from mnistm_dist.training.train_state import TrainState


class NonFiniteLoss(RuntimeError):
    """A training loss that is NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the training loss of step {step} is not finite")
        self.step = step


def train_step(
    world: World,
    state: TrainState,
    augment: Augment,
    micro_batches: Sequence[Batch],
    image_size: int,
    optim: OptimConfig,
) -> tuple[Tensor, Tensor | None]:
    """Train on this rank's k micro-batches at ``image_size`` pixels and update the parameters once.

    Return the mean loss of each micro-batch, float32 (k,), and, if gradients are clipped, their norm before clipping,
    float32 (); both on the device. The gradient is the mean over the W * k micro-batches of the step: each loss is
    divided by k here, and DDP averages over the W ranks. Only the last backward communicates. Nothing waits for the
    device. All ranks take part.
    """
    model, optimizer = state.train_model, state.optimizer
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else world.accelerator.no_sync(model):
            # Outside autocast: an affine grid in bfloat16 would be off by a tenth of a pixel.
            images = augment(batch.images, batch.positions, image_size)
            with world.accelerator.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), batch.labels, label_smoothing=optim.label_smoothing)
            world.accelerator.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    norm = None
    if optim.max_grad_norm:
        norm = world.accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    optimizer.step()
    return torch.stack(losses), norm


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of the last step's gradient over all parameters. It waits for the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


class LossWindow:
    """The losses of the steps since the last row of the log. They stay on the device until `fetch`."""

    def __init__(self, world: World, fetched: Sequence[float] = ()) -> None:
        self.world = world
        self.fetched = list(fetched)
        """Mean loss of each fetched step, oldest first."""
        self._on_device: list[tuple[int, Tensor]] = []

    def add(self, step: int, losses: Tensor) -> None:
        """Add the losses of this rank's micro-batches, float (k,), of ``step`` (from 0)."""
        self._on_device.append((step, losses))

    def fetch(self) -> None:
        """Gather the losses from all ranks. Raise `NonFiniteLoss` on all of them. All ranks take part.

        The loss of a step is the mean over its micro-batches in canonical order, in float64: the same at every world
        size.
        """
        if not self._on_device:
            return
        table = torch.stack([losses for _, losses in self._on_device])
        means = self.world.gather_columns(table).double().cpu().numpy().mean(axis=1)
        for (step, _), mean in zip(self._on_device, means, strict=True):
            if not np.isfinite(mean):
                raise NonFiniteLoss(step)
        self.fetched.extend(means.tolist())
        self._on_device.clear()

    def take_mean(self) -> float:
        """Return the mean over the fetched steps and empty the window."""
        mean = sum(self.fetched) / len(self.fetched)
        self.fetched.clear()
        return mean
