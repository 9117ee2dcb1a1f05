"""The training step in a CUDA graph: its kernels are recorded at each image size and then launched together.

The pattern is that of torch's documentation (CUDA semantics, "Whole-network capture" and "Usage with
DistributedDataParallel"): DDP is created, some steps are run and one is captured on a side stream, which is this
process's (`join` sets it), and a captured step reads tensors that do not move, the learning rate among them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mnistm_dist.config import Config
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment
from mnistm_dist.training.distributed import World
from mnistm_dist.training.step import seed_generators, train_step
from mnistm_dist.training.train_state import TrainState

StepResult = tuple[Tensor, Tensor | None]
# Steps before a capture: torch's documentation has 3, and 11 with DDP, which measures the first 10.
WARM_UP_STEPS, WARM_UP_STEPS_DDP = 3, 11


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
