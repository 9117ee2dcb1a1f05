"""The state that training changes: model, optimizer, averaged weights, steps done and history."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from mnistm_dist.config import Config
from mnistm_dist.training.distributed import World, prepare
from mnistm_dist.training.gradient_tree import GradientTree
from mnistm_dist.training.models import create_model, to_device
from mnistm_dist.training.optim import WeightAverage, create_optimizer


class Record(BaseModel):
    """A part of a checkpoint's ``state.json``."""

    model_config = ConfigDict(extra="forbid", strict=True)


class BestEvaluation(Record):
    """The best evaluation on val so far."""

    step: int = Field(gt=0)
    accuracy: float
    image_size: int = Field(gt=0)
    """Pixels."""


class TrainingHistory(Record):
    """What a run remembers of its past, over all launches."""

    train_seconds: float = 0.0
    """In training steps: without evaluation, saving and start-up."""
    evaluate_seconds: float = 0.0
    """In evaluations on val."""
    save_seconds: float = 0.0
    """In saving checkpoints; a checkpoint does not count itself."""
    best: BestEvaluation | None = None
    pending: list[float] = []
    """Losses of the steps since the last row of the log."""


@dataclass(kw_only=True)
class TrainState:
    """Everything that a step changes and a checkpoint saves."""

    model: nn.Module
    """Unwrapped and uncompiled; has the parameters that are trained."""
    train_model: nn.Module
    """``model`` in DDP and, if asked for, compiled: what a training step calls."""
    optimizer: torch.optim.Optimizer
    ema: WeightAverage | None
    """Moving average of the weights, if the recipe has one."""
    tree: GradientTree | None = None
    """Sums the gradients if the run is reproducible; None: DDP does."""
    steps_done: int = 0
    history: TrainingHistory = field(default_factory=TrainingHistory)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and to keep: the averaged weights if there are any, else ``model``."""
        return self.ema.model if self.ema else self.model


def create_train_state(config: Config, world: World, num_classes: int, shares: Sequence[range]) -> TrainState:
    """Return the state before the first step; initial weights depend on the seed alone. All ranks take part.

    ``shares``: the micro-batches of each rank.
    """
    model: nn.Module = create_model(num_classes, config.steps.seed)
    if config.machine.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Before DDP wraps it: DDP lays out its buckets by the strides of the parameters.
    model = to_device(model, world.device, config.machine.memory_format)
    optimizer = create_optimizer(model, config.optim, world.precision)
    train_model, optimizer = prepare(world, model, optimizer, config.machine)
    ema = WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None
    tree = GradientTree(model, world, shares) if config.machine.reproducible else None
    return TrainState(model=model, train_model=train_model, optimizer=optimizer, ema=ema, tree=tree)
