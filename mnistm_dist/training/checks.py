"""Two checks before a debug run trains: the first loss is that of a guess, and one batch can be learnt by heart.

Karpathy's "A Recipe for Training Neural Networks" (2019) asks for both: a wrong label column, a dead layer or a broken
normalisation shows here in seconds.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

FIRST_LOSS_TOLERANCE = 0.7
"""How far the first loss may be from ln(classes): BatchNorm in the head gives the untrained logits a spread."""
STEPS, LEARNT = 60, 0.05
"""Steps of Adam on one batch, and the loss below which it counts as learnt."""


class CheckFailed(RuntimeError):
    """A check before training did not hold."""


def check_model_learns(model: nn.Module, images: Tensor, labels: Tensor, classes: int) -> tuple[float, float]:
    """Gives the first loss and the last one after `STEPS` steps on one batch; ``model`` itself stays as it was.

    ``images`` float (B, 3, H, W), normalised; ``labels`` int64 (B,). Raises `CheckFailed` with the figure that is off.
    """
    pupil = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(pupil.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(pupil(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not abs(losses[0] - math.log(classes)) < FIRST_LOSS_TOLERANCE:
        raise CheckFailed(
            f"the first loss is {losses[0]:.3f}, a guess among {classes} classes has {math.log(classes):.3f}"
        )
    if not losses[-1] < LEARNT:
        raise CheckFailed(f"one batch could not be learnt by heart: loss {losses[-1]:.3f} after {STEPS} steps")
    return losses[0], losses[-1]
