"""Distributed training of an image classifier on MNIST-M: exact order, exact evaluation, exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mnistm_dist.data.sampler import OrderedSampler
    from mnistm_dist.inference import TrainedModel

__all__ = ["OrderedSampler", "load_model"]
__version__ = "0.1.0"


def load_model(
    run: str | Path, checkpoint: str | Path = "chosen", device: str | torch.device | None = None
) -> TrainedModel:
    """A trained model with its preprocessing: ``load_model("runs/NAME").predict("digit.png")``.

    `mnistm_dist.inference.load_model` says more. It is imported here, at the call: the package itself costs nothing.
    """
    from mnistm_dist import inference

    return inference.load_model(run, checkpoint, device)


def __getattr__(name: str) -> object:
    if name == "OrderedSampler":
        from mnistm_dist.data.sampler import OrderedSampler

        return OrderedSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
