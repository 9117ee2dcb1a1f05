"""Optimizer, learning rate and the average of the weights. Learning rates are closed forms of the step: nothing to
restore."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from mnistm_dist.config import OptimConfig


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config``, with torch's own choice of kernels: fused on a GPU, for each tensor on CPU.

    adam takes weight decay as L2 on every parameter, as torch does and the source report did. adamw and sgd leave
    one-dimensional parameters (BatchNorm, biases) undecayed: He et al. 2019, arXiv 1812.01187, section 3.1. muon is
    `Muon` on the convolutions and adamw on all else.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.is_cuda for p in parameters)
    betas = (config.momentum, config.beta2)
    # A tensor learning rate is not needed: it is set on the host once per step.
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
        return Muon([orthogonal, decayed, free], lr=config.learning_rate, betas=betas)
    groups = [{"params": weights, "weight_decay": config.weight_decay}, free]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused or None)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused or None
        )
    assert_never(config.optimizer)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``orthogonal`` step by Muon: by the nearest orthogonal matrix to the momentum.

    A convolution is the matrix of its output channels against all else. Momentum is Nesterov's, with beta1 of AdamW;
    a step's root mean square is about 0.2 of the learning rate, which is what AdamW's steps have in the middle of a
    training, so that one learning rate and one weight decay serve all groups.
    Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982, section 2.2. torch's own
    Muon takes no convolutions.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups, after ``closure``, if any, has made the gradients."""
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
                    # AdamW's loading asks for a step in every state.
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
                state["step"] += 1
                state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                gradient.lerp_(state["momentum_buffer"], momentum)
            rows, columns = shape[0], math.prod(shape[1:])
            steps = orthogonalize(gradients.reshape(len(alike), rows, columns)).view_as(gradients)
            size = 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_mul_(alike, 1 - rate * group["weight_decay"])
            torch._foreach_add_(alike, list(steps.to(alike[0].dtype)), alpha=-rate * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, float (n, rows, columns): its singular values brought near 1, to
    between 0.7 and 1.2 unless they are tiny beside the largest.

    Five steps of a quintic Newton-Schulz iteration with Jordan's coefficients; in bfloat16 on a GPU, which bears it.
    """
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if turned else x


def learning_rate(config: OptimConfig, *, step: int, total_steps: int, batch_size: int, epoch: int) -> float:
    """The learning rate of ``step`` (from 0) of ``total_steps``, in ``epoch`` (from 0).

    exponential: decay ** epoch. one-cycle: linear from 0 to 1 over the share ``warmup`` of the steps, then (1 + cos) /
    2 down to 0 (Smith and Topin 2017, arXiv 1708.07120, with Loshchilov and Hutter's cosine, arXiv 1608.03983).
    Scaling with the batch: linear (Goyal et al. 2017, arXiv 1706.02677) or by the square root (Krizhevsky 2014, arXiv
    1404.5997).
    """
    ratio = batch_size / config.base_batch_size
    peak = config.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]
    if config.lr_schedule == "constant":
        return peak
    if config.lr_schedule == "exponential":
        return peak * config.decay**epoch
    done = (step + 1) / (total_steps + 1)
    if done < config.warmup:
        return peak * done / config.warmup
    return peak * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))) / 2


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers, beside it on the same device.

    ``average = decay * average + (1 - decay) * value`` once per step, with decay_t = min(decay, (1 + t) / (10 + t)) so
    that the initial weights fade (torch's and TensorFlow's ExponentialMovingAverage). Counters (int64 buffers) are
    copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = _tensors(self.model), _tensors(model)
        floats = [i for i, value in enumerate(values) if value.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [values[i] for i in floats], 1 - decay)
        for average, value in zip(averages, values, strict=True):
            if not value.is_floating_point():
                average.copy_(value)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
