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
    on the convolutions, with its iteration in bfloat16 if that is the precision, and adamw on everything else. If all
    parameters are on CUDA, kernels are fused, and Muon's iteration is one batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.is_cuda for p in parameters)
    adam: dict[str, Any] = {
        **{"lr": config.learning_rate, "betas": (config.momentum, config.beta2)},
        # Capturable: in a CUDA graph.
        **{"fused": fused or None, "capturable": fused},
    }
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, weight_decay=config.weight_decay, **adam)
    weights = [p for p in parameters if p.ndim >= 2]
    free = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    if config.optimizer == "muon":
        convolutions, matrices = ([p for p in weights if (p.ndim == 4) is wanted] for wanted in (True, False))
        muon = Muon(
            [
                {"params": convolutions, "weight_decay": config.weight_decay, "orthogonal": True},
                {"params": matrices, "weight_decay": config.weight_decay},
                free,
            ],
            **adam,
        )
        muon.dtype, muon.one_batch = torch.bfloat16 if precision == "bf16" else torch.float32, fused
        return muon
    groups = [{"params": weights, "weight_decay": config.weight_decay}, free]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam)
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
    one_batch = False
    """Iterate on all matrices at once, the smaller ones padded with zeros, which changes no result but its rounding: on
    a GPU, the calls would cost more than their work. Otherwise matrices of one shape are a batch."""

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
                parameters = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
                for _, batch in groupby(parameters, key=lambda p: None if self.one_batch else p.shape):
                    self._step_orthogonal(list(batch), group)
        return loss

    @torch.no_grad()
    def _step_orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters whose matrices are orthogonalized as one batch."""
        for p in parameters:
            if not self.state[p]:
                # AdamW.load_state_dict expects a step in every state.
                self.state[p].update(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1)
        momentum, rate = group["betas"][0], group["lr"]
        sizes = [(len(p), p[0].numel()) for p in parameters]
        matrices = parameters[0].new_zeros(len(sizes), *map(max, zip(*sizes, strict=True)))

        def views(batch: Tensor) -> list[Tensor]:
            parts = zip(batch, sizes, parameters, strict=True)
            return [matrix[:rows, :columns].view(p.shape) for matrix, (rows, columns), p in parts]

        gradients, buffers = views(matrices), [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_copy_(gradients, [p.grad for p in parameters if p.grad is not None])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)
        steps = views(orthogonalize(matrices, self.dtype).to(matrices.dtype))
        scales = [0.2 * math.sqrt(max(size)) for size in sizes]
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        if self.one_batch:
            torch._foreach_mul_(steps, scales)
            # In a CUDA graph the rate is a tensor, which ``alpha`` cannot be.
            torch._foreach_mul_(steps, rate)
            torch._foreach_sub_(parameters, steps)
        else:
            torch._foreach_add_(parameters, steps, alpha=-rate * scales[0])


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T; ``matrices`` and the result are float (n, rows, columns).

    Five steps of the quintic Newton-Schulz iteration with Jordan's coefficients bring the singular values to between
    0.7 and 1.2, unless they are tiny beside the largest. It runs in ``dtype``: bfloat16 is precise enough.
    """
    transposed = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if transposed else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if transposed else x


class WeightAverage:
    """Exponential moving average of the parameters and buffers of a model, on the model's device.

    Once per step, ``average = decay * average + (1 - decay) * value``, with decay_t = min(decay, (1 + t) / (10 + t)) so
    that the initial weights fade (as TensorFlow's ExponentialMovingAverage). Integer buffers are copied, and those that
    begin with an infinite value, such as the mask of an attention.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        tensors = _tensors(model)
        self._averaged = [i for i, value in enumerate(tensors) if value.is_floating_point() and value.isfinite().all()]
        self._copied = sorted(set(range(len(tensors))) - set(self._averaged))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_([averages[i] for i in self._averaged], [values[i] for i in self._averaged], 1 - decay)
        if self._copied:
            torch._foreach_copy_([averages[i] for i in self._copied], [values[i] for i in self._copied])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.detach() for p in model.parameters()), *model.buffers()]
