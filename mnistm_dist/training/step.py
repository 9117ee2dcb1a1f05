"""One optimizer step: this rank's micro-batches, one gradient all-reduce over the ranks, one update."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnistm_dist.config import OptimConfig
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World
from mnistm_dist.training.train_state import TrainState


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
