"""One optimizer step: this rank's micro-batches, one sum of the gradients over the ranks, one update.

With ``cuda_graph``, its kernels are recorded at each image size and then launched together. The pattern is that of
torch's documentation (CUDA semantics, "Whole-network capture" and "Usage with DistributedDataParallel"): DDP is
created, some steps are run and one is captured on a side stream, which is this process's (`join` sets it), and a
captured step reads tensors that do not move, the learning rate among them.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mnistm_dist.config import Config
from mnistm_dist.data.hashing import derive_key
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World
from mnistm_dist.training.train_state import TrainState

# Separates these keys from those of the order and of augmentation.
_TAG_MODEL = 6
StepResult = tuple[Tensor, Tensor | None]
# Steps before a capture: torch's documentation has 3, and 11 with DDP, which measures the first 10.
WARM_UP_STEPS, WARM_UP_STEPS_DDP = 3, 11


def train_step(
    world: World,
    state: TrainState,
    augment: Augment,
    micro_batches: Sequence[Batch],
    image_size: int,
    learning_rate: float | Tensor,
    config: Config,
    draws: Sequence[Tensor] = (),
) -> StepResult:
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
            loss = nn.functional.cross_entropy(logits.float(), batch.labels, label_smoothing=optim.label_smoothing)
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


def create_step(
    world: World, state: TrainState, augment: Augment, config: Config
) -> Callable[[Sequence[Batch], int, float], StepResult]:
    """Return `train_step` as a function of micro-batches, image size and learning rate, in CUDA graphs if so configured
    and with ``augment`` compiled if steps are compiled on a GPU."""
    if config.machine.compile and world.device.type == "cuda":
        augment.compile()
    step = functools.partial(train_step, world, state, augment, config=config)
    return GraphedStep(step, augment, config.steps.seed, world) if config.machine.cuda_graph else step


class GraphedStep:
    """Trains some steps at each image size, then captures one and replays it.

    It holds one graph: at a new image size, or one that returns, a step is captured again.
    """

    def __init__(self, step: Callable[..., StepResult], augment: Augment, seed: int, world: World) -> None:
        self.step, self.augment, self.seed, self.replay = step, augment, seed, step
        self.warm_up = WARM_UP_STEPS if world.size == 1 else WARM_UP_STEPS_DDP
        self.image_size, self.steps = 0, 0
        self.learning_rate, self.inputs = torch.zeros((), device=world.device), list[Tensor]()
        """What a captured step reads."""

    def __call__(self, micro_batches: Sequence[Batch], image_size: int, learning_rate: float) -> StepResult:
        """Train on one micro-batch as `train_step` does; the norm is overwritten by the next step."""
        (batch,) = micro_batches
        inputs = [batch.images, batch.labels, self.augment.draw(batch.positions)]
        seed_generators(self.seed, batch)
        self.learning_rate.fill_(learning_rate)
        self.steps = self.steps + 1 if image_size == self.image_size else 1
        self.image_size = image_size
        if self.steps <= self.warm_up:
            return self.step(micro_batches, image_size, self.learning_rate, draws=inputs[2:])
        if self.steps == self.warm_up + 1:
            self.inputs = [value.clone() for value in inputs]
            static = replace(batch, images=self.inputs[0], labels=self.inputs[1])
            self.replay = capture(lambda: self.step([static], image_size, self.learning_rate, draws=self.inputs[2:]))
        torch._foreach_copy_(self.inputs, inputs)
        losses, norm = self.replay()
        return losses.clone(), norm


def capture(step: Callable[[], StepResult]) -> Callable[[], StepResult]:
    """Record the kernels of ``step``, which does not run, and return a function that launches them.

    Meanwhile, other threads may use the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        results = step()

    def replay() -> StepResult:
        graph.replay()
        return results

    return replay
