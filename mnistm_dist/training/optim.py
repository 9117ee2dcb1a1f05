"""Optimizers, and the moving average of the weights."""

import copy
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from mnistm_dist.config import OptimConfig


def create_optimizer(model: nn.Module, config: OptimConfig, precision: str = "fp32") -> torch.optim.Optimizer:
    """Return the optimizer of ``config`` for a training in ``precision``.

    adam applies weight decay as L2 to every parameter, as torch does and the source report did. adamw and sgd do not
    decay one-dimensional parameters (BatchNorm, biases): He et al. 2019, arXiv 1812.01187, section 3.1. muon is `Muon`
    on the convolutions, with its iteration in bfloat16 if that is the precision, and adamw on everything else. adam,
    adamw and sgd use fused kernels if all parameters are on CUDA; muon does not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.is_cuda for p in parameters)
    betas = (config.momentum, config.beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=fused or None
        )
    weights = [p for p in parameters if p.ndim >= 2]
    free = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    if config.optimizer == "muon":
        convolutions, matrices = ([p for p in weights if (p.ndim == 4) is wanted] for wanted in (True, False))
        orthogonal = {"params": convolutions, "weight_decay": config.weight_decay, "orthogonal": True}
        decayed = {"params": matrices, "weight_decay": config.weight_decay}
        muon = Muon([orthogonal, decayed, free], lr=config.learning_rate, betas=betas)
        muon.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return muon
    groups = [{"params": weights, "weight_decay": config.weight_decay}, free]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused or None)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused or None
        )
    assert_never(config.optimizer)


class Muon(torch.optim.AdamW):
    """AdamW in which parameter groups with ``orthogonal: True`` take Muon's step: the orthogonalized momentum.

    A convolution counts as a matrix of shape (out_channels, everything else). The momentum is Nesterov's, with AdamW's
    beta1. The root mean square of an update is scaled to about 0.2 times the learning rate, as AdamW's typically is, so
    one learning rate and one weight decay serve all groups: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu
    et al. 2025, arXiv 2502.16982, section 2.2. torch.optim.Muon accepts matrices only.
    """

    dtype = torch.float32
    """Of the iteration that orthogonalizes."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all groups; ``closure``, if given, computes the gradients first."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                self._step_orthogonal(group)
        return loss

    @torch.no_grad()
    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        momentum, rate = group["betas"][0], group["lr"]
        parameters = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
        for shape, same_shape in groupby(parameters, key=lambda p: p.shape):
            alike = list(same_shape)
            gradients = torch.stack([p.grad for p in alike])
            for p, gradient in zip(alike, gradients, strict=True):
                state = self.state[p]
                if not state:
                    # AdamW.load_state_dict expects a step in every state.
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
                state["step"] += 1
                state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                gradient.lerp_(state["momentum_buffer"], momentum)
            rows, columns = shape[0], math.prod(shape[1:])
            steps = orthogonalize(gradients.reshape(len(alike), rows, columns), self.dtype).view_as(gradients)
            size = 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_mul_(alike, 1 - rate * group["weight_decay"])
            torch._foreach_add_(alike, list(steps.to(alike[0].dtype)), alpha=-rate * size)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T; ``matrices`` and the result are float (n, rows, columns).

    Five steps of the quintic Newton-Schulz iteration with Jordan's coefficients bring the singular values to between
    0.7 and 1.2, unless they are tiny beside the largest. It runs in ``dtype``: bfloat16 is precise enough.
    """
    transposed = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if transposed else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if transposed else x


class WeightAverage:
    """Exponential moving average of the parameters and buffers of a model, on the model's device.

    Once per step, ``average = decay * average + (1 - decay) * value``, with decay_t = min(decay, (1 + t) / (10 + t)) so
    that the initial weights fade (as TensorFlow's ExponentialMovingAverage). Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = _tensors(self.model), _tensors(model)
        floats = [i for i, value in enumerate(values) if value.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [values[i] for i in floats], 1 - decay)
        others = [i for i, value in enumerate(values) if not value.is_floating_point()]
        torch._foreach_copy_([averages[i] for i in others], [values[i] for i in others])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
