"""Distributed training of an image classifier on MNIST-M: exact order, exact evaluation, exact resume."""

__version__ = "0.1.0"
