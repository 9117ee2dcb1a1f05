"""Distributed training of an image classifier on MNIST-M: exact order, exact evaluation, exact resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mnistm_dist.data.sampler import OrderedSampler
    from mnistm_dist.inference import TrainedModel
    from mnistm_dist.train import train_model as train

__all__ = ["OrderedSampler", "load_model", "train"]
__version__ = "0.2.0"


def load_model(
    run: str | Path, checkpoint: str | Path = "chosen", device: str | torch.device | None = None
) -> TrainedModel:
    """A trained model with its preprocessing: ``load_model("runs/NAME").predict("digit.png")``.

    `mnistm_dist.inference.load_model` says more. It is imported here, at the call: the package itself costs nothing.
    """
    from mnistm_dist import inference

    return inference.load_model(run, checkpoint, device)


def __getattr__(name: str) -> Any:
    if name == "OrderedSampler":
        from mnistm_dist.data.sampler import OrderedSampler

        return OrderedSampler
    if name == "train":
        # The command's module, which can be called: Python stores it under this name anyway.
        return importlib.import_module("mnistm_dist.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
