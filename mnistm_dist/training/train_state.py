"""The state that training changes: model, optimizer, averaged weights, steps done and history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from mnistm_dist.training.gradient_tree import GradientTree
from mnistm_dist.training.optim import WeightAverage


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
    layers: Sequence[Mapping[str, Any]] = ()
    """Of ``model``: the rows of ``architecture.json``."""
    new_tensors: Sequence[str] = ()
    """Those of the last layer, if the weights of ``init_from`` are of other classes."""
    steps_done: int = 0
    history: TrainingHistory = field(default_factory=TrainingHistory)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and to keep: the averaged weights if there are any, else ``model``."""
        return self.ema.model if self.ema else self.model
