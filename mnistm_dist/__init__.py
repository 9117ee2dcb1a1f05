"""Distributed training of an image classifier on MNIST-M: exact order, exact evaluation, exact resume."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnistm_dist.data.sampler import OrderedSampler
    from mnistm_dist.inference import load_model
    from mnistm_dist.train import train_model as train

__all__ = ["OrderedSampler", "load_model", "train"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import what is used, at its first use: the package itself costs nothing."""
    if name == "train":
        # The command's module, which can be called: Python stores it under this name anyway.
        return import_module("mnistm_dist.train")
    homes = {"OrderedSampler": "mnistm_dist.data.sampler", "load_model": "mnistm_dist.inference"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
