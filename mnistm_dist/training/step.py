"""One optimizer step: this rank's micro-batches, gradients summed over the ranks once, a finite loss or an end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World


class NonFiniteLoss(RuntimeError):
    """A training loss that is no number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the training loss of step {step} is not finite")
        self.step = step


def train_step(
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    augment: Augment,
    micro_batches: Sequence[Batch],
    *,
    image_size: int,
    label_smoothing: float,
    clip_norm: float,
) -> tuple[Tensor, Tensor | None]:
    """Trains on this rank's k micro-batches and steps once; gives their mean losses, float32 (k,), and where gradients
    are clipped their norm before that, float32 (), both on the device.

    The gradient is the mean over the step's W * k micro-batches: each loss is divided by k here, DDP averages over the
    W ranks. Only the last backward sends gradients. Nothing waits for the device. All ranks take part.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, batch in enumerate(micro_batches):
        sends = index == len(micro_batches) - 1
        with contextlib.nullcontext() if sends else world.accelerator.no_sync(model):
            # Outside autocast: an affine grid in bfloat16 would be off by a tenth of a pixel.
            images = augment(batch.images, batch.positions, image_size)
            with world.accelerator.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)
            world.accelerator.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    norm = world.accelerator.clip_grad_norm_(model.parameters(), clip_norm) if clip_norm else None
    optimizer.step()
    return torch.stack(losses), norm


def gradient_norm(model: nn.Module) -> float:
    """The norm of the gradient of the last step, over all parameters. Waits for the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


class LossWindow:
    """The losses of the steps since the last row of the log, left on the device until they are asked for."""

    def __init__(self, world: World, read: Sequence[float] = ()) -> None:
        self.world = world
        self.read = list(read)
        """Mean loss of each step that has been read, oldest first."""
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, step: int, losses: Tensor) -> None:
        """Takes the losses of this rank's micro-batches, float (k,), of ``step`` (from 0)."""
        self._waiting.append((step, losses))

    def fetch(self) -> None:
        """Reads what waits, from all ranks. All ranks take part. Raises `NonFiniteLoss` on all of them alike.

        A step's loss is the mean over its micro-batches in their order, in float64: the same at every world size.
        """
        if not self._waiting:
            return
        table = self.world.gather_stacked(torch.stack([losses for _, losses in self._waiting])).double().cpu().numpy()
        means = table.mean(axis=1)
        for (step, _), mean in zip(self._waiting, means, strict=True):
            if not np.isfinite(mean):
                raise NonFiniteLoss(step)
        self.read.extend(means.tolist())
        self._waiting.clear()

    def take(self) -> float:
        """The mean over the window, which is then empty. What waits is fetched first. All ranks take part."""
        self.fetch()
        mean = sum(self.read) / len(self.read)
        self.read.clear()
        return mean
