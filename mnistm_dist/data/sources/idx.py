"""MNIST's own format: IDX files (Y. LeCun, http://yann.lecun.com/exdb/mnist), compressed or not."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.archives import Decompressed
from mnistm_dist.data.sources.base import check_labels
from mnistm_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Digits:
    """One split of MNIST."""

    images: np.ndarray
    """uint8 (n, height, width), ink on 0."""
    labels: np.ndarray
    """int64 (n,)."""


def read_digits(folder: Path, split: str) -> Digits:
    """Read one split, `train` or `test`, from a folder with MNIST's IDX files.

    Looks in ``folder`` and in torchvision's `MNIST/raw` below it, for names with `-idx` or `.idx`, with or without
    `.gz`. Raises `UserError` if a file is missing, is not IDX or has another size than its header says, and if images
    and labels do not match.
    """
    images = _read_idx(_find(folder, split, "images-idx3"), dimensions=3)
    labels_file = _find(folder, split, "labels-idx1")
    return Digits(
        images=images, labels=check_labels(str(labels_file), _read_idx(labels_file, dimensions=1), len(images))
    )


def _find(folder: Path, split: str, content: str) -> Path:
    names = [f"{'train' if split == 'train' else 't10k'}-{content}-ubyte{suffix}" for suffix in ("", ".gz")]
    names += [name.replace("-idx", ".idx") for name in names]
    for file in (place / name for place in (folder, folder / "MNIST" / "raw") for name in names):
        if file.is_file():
            return file
    raise UserError(f"{folder}: no {names[0]}(.gz); expected a folder with MNIST's four IDX files")


def _read_idx(file: Path, *, dimensions: int) -> np.ndarray:
    with explain_decode_errors(file, f"an IDX file of {dimensions} dimensions"):
        stream = Decompressed(file)
        header = np.frombuffer(stream.read(4 * (1 + dimensions)), ">u4")
        if header[0] != 0x800 + dimensions:
            raise ValueError(f"it starts with {header[0]:08x}")
        shape = tuple(header[1:].tolist())
        data = stream.read(prod(shape) + 1)
        if not data or len(data) != prod(shape):
            raise ValueError(f"its data do not fit its shape {shape}")
        return np.frombuffer(data, np.uint8).reshape(shape)
