"""One optimizer step: this rank's micro-batches, one sum of the gradients over the ranks, one update."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnistm_dist.config import Config
from mnistm_dist.data.hashing import derive_key
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World
from mnistm_dist.training.train_state import TrainState

# Separates these keys from those of the order and of augmentation.
_TAG_MODEL = 6


def train_step(
    world: World,
    state: TrainState,
    augment: Augment,
    micro_batches: Sequence[Batch],
    image_size: int,
    learning_rate: float | Tensor,
    config: Config,
    draws: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """Train on this rank's k micro-batches at ``image_size`` pixels and update the parameters once.

    Return the mean loss of each micro-batch, float32 (k,), and, if gradients are clipped, their norm before clipping,
    float32 (); both on the device. The gradient is the mean over the M micro-batches of the step. Without a tree, each
    loss is divided by M / W here, DDP averages over the W ranks, and only the last backward communicates. Nothing waits
    for the device. ``draws``: the random numbers of each micro-batch, if torch's generators are seeded. All ranks take
    part.
    """
    model, optimizer, optim, tree = state.train_model, state.optimizer, config.optim, state.tree
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    divisor = 1.0 if tree else config.steps.batch_size / int(config.steps.micro_batch) / world.size
    if tree:
        tree.begin_step()
    losses = []
    for index, batch in enumerate(micro_batches):
        if not draws:
            seed_generators(config.steps.seed, batch)
        if tree:
            tree.begin_micro_batch()
        syncs = tree is not None or index == len(micro_batches) - 1
        with contextlib.nullcontext() if syncs else world.accelerator.no_sync(model):
            # Outside autocast: an affine grid in bfloat16 would be off by a tenth of a pixel.
            images = augment.apply(batch.images, draws[index] if draws else augment.draw(batch.positions), image_size)
            with world.accelerator.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), batch.labels, label_smoothing=optim.label_smoothing)
            world.accelerator.backward(loss / divisor)
        if tree:
            tree.end_micro_batch()
        losses.append(loss.detach())
    if tree:
        tree.reduce()
    norm = None
    if optim.max_grad_norm:
        norm = world.accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    optimizer.step()
    return torch.stack(losses), norm


def seed_generators(seed: int, batch: Batch) -> None:
    """Seed torch's generators with (seed, first position): what a model draws, as for dropout, depends on the step and
    the micro-batch alone."""
    key = int(derive_key(seed, _TAG_MODEL, batch.positions[:1])[0])
    torch.default_generator.manual_seed(key)
    if batch.images.is_cuda:
        torch.cuda.manual_seed(key)


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of the last step's gradient over all parameters. It waits for the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
