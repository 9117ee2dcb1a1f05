"""Training steps in CUDA graphs, all but the capture, which a CPU cannot do: the step is called again instead."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mnistm_dist import config as configuration
from mnistm_dist.config import MachineConfig
from mnistm_dist.data.loader import Batch
from mnistm_dist.data.transforms import Augment, Preprocess
from mnistm_dist.errors import UserError
from mnistm_dist.training import step as steps
from mnistm_dist.training.hardware import check_cuda_graph
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import create_optimizer
from mnistm_dist.training.train_state import TrainState

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Of each step. The warm-up of a size is three steps, so two of each are replays, and the last size is captured anew.
SIZES = [*[28] * 5, *[32] * 5, *[28] * 5]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (8, 28, 28, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (8,), generator=generator)
    positions = np.arange(step * 8, step * 8 + 8)
    return Batch(images=images, labels=labels, positions=positions, ids=positions, count=8)


def train(recipe: str, *, graphed: bool, **given: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the losses and norms of some steps, and the tensors of the model."""
    config = configuration.build(
        recipe, {**configuration.read_recipe(recipe), "batch_size": 8, "micro_batch": 8, "cuda_graph": graphed, **given}
    )
    model = create_model(10, 0).train()
    model.fc[2] = nn.Sequential(model.fc[2], nn.Dropout(0.5))
    optimizer = create_optimizer(model, config.optim)
    state = TrainState(model=model, train_model=model, optimizer=optimizer, ema=None)
    accelerator = SimpleNamespace(
        autocast=contextlib.nullcontext, backward=torch.Tensor.backward, clip_grad_norm_=nn.utils.clip_grad_norm_
    )
    world = SimpleNamespace(accelerator=accelerator, size=1, rank=0, device=CPU)
    step = steps.create_step(world, state, Augment(config.augment, Preprocess((0.5,) * 3, (0.2,) * 3), seed=0), config)
    outputs = []
    for number, size in enumerate(SIZES):
        learning_rate = torch.tensor(0.01 / (1 + number))
        outputs.append(step([batch(number)], size, learning_rate))
    return [value for output in outputs for value in output if value is not None], list(model.state_dict().values())


@pytest.mark.parametrize("recipe", ["fast", "images", "baseline"])
@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
def test_a_graph_trains_the_same_as_its_steps(recipe, max_grad_norm, monkeypatch):
    captures = []
    monkeypatch.setattr(steps, "capture", lambda step: captures.append(step) or step)
    (outputs, tensors), (graphed, others) = (
        train(recipe, graphed=graphed, max_grad_norm=max_grad_norm) for graphed in (False, True)
    )
    assert len(captures) == 3
    assert len(outputs) == len(SIZES) * (2 if max_grad_norm else 1)
    assert all(map(torch.equal, outputs, graphed))
    assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize(
    ("machine", "precision", "device", "forwards", "named"),
    [
        (MachineConfig(), "bf16", CPU, 1, "it needs a GPU"),
        (MachineConfig(), "fp16", GPU, 1, "gradient scaler of fp16"),
        (MachineConfig(reproducible=True), "fp32", GPU, 1, "--reproducible"),
        (MachineConfig(), "bf16", GPU, 2, "a step has 2"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(machine, precision, device, forwards, named):
    with pytest.raises(UserError, match=f"cuda_graph: .*{named}.*use --no-cuda-graph"):
        check_cuda_graph(machine, precision, device, forwards)
    check_cuda_graph(MachineConfig(), "bf16", GPU, 1)
