"""Models as a user has them, for ``--model own_models:NAME``."""

import torch
from torch import Tensor, nn

from mnistm_dist.training.models import PrunedResNet18


def with_dropout(num_classes: int) -> nn.Module:
    """The package's own model, with dropout of half of its features."""
    model = PrunedResNet18(num_classes)
    model.fc[2] = nn.Sequential(model.fc[2], nn.Dropout(0.5))
    return model


def small(num_classes: int) -> nn.Module:
    """Convolutions with dropout, without BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Dropout2d(0.2), nn.Conv2d(8, 16, 3, stride=2), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, num_classes)),
    )


class Odd(nn.Module):
    """All kinds of parameters and buffers: tied, frozen, scalar, an embedding, a mask of infinities, integers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.positions = nn.Embedding(16, 8)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(nn.functional.interpolate(images, (16, 16))).flatten(2).mT
        x = self.frozen * x + self.positions(torch.arange(4, device=x.device))
        x = self.attention(x, x, x, attn_mask=self.mask)[0]
        return self.head(self.scale * self.second(self.first(x).relu()).mean(dim=1) @ self.first.weight)


def no_module(num_classes: int) -> int:
    return num_classes


def raises(num_classes: int) -> nn.Module:
    raise KeyError("layers")


CONSTANT = 3


class Misspelt(nn.Module):
    """Calls a layer that it does not have: torch's code raises."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = small(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.boddy(images)  # type: ignore[operator]


def no_parameters(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def too_wide(num_classes: int) -> nn.Module:
    return small(num_classes + 1)


def for_32_pixels(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


class Returns(nn.Module):
    """Returns its logits in some form."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = small(num_classes)

    def forward(self, images: Tensor) -> object:
        return {"logits": self.body(images)}


class Classes(Returns):
    """Returns the class, not the logits."""

    def forward(self, images: Tensor) -> object:
        return self.body(images).round().long()


class Squeezed(Returns):
    """Loses the dimension of a batch of one."""

    def forward(self, images: Tensor) -> object:
        return self.body(images).squeeze()


class Unused(Returns):
    """Has a layer that it does not use."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.extra = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> object:
        return self.body(images)


class Detached(Returns):
    """Has no way back for the gradient."""

    def forward(self, images: Tensor) -> object:
        return self.body(images).detach()
