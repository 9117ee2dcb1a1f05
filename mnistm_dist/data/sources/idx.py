"""MNIST in its own format: IDX files (Y. LeCun, http://yann.lecun.com/exdb/mnist), gzip'ed or not."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from mnistm_dist.data.sources.base import CLASSES
from mnistm_dist.errors import UserError

_PREFIXES: Mapping[str, str] = {"train": "train", "test": "t10k"}
_MAX_BYTES = 256 << 20
"""Of a file, and of what it unpacks to: MNIST's largest has 47 MB."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """One split of MNIST."""

    images: np.ndarray
    """uint8 (n, height, width), ink on 0."""
    labels: np.ndarray
    """int64 (n,), each a class."""


def read_digits(folder: Path | Traversable, split: str) -> Digits:
    """Reads one split, `train` or `test`, of a folder that holds MNIST's IDX files, each gzip'ed or not.

    Looks in `folder` and in torchvision's `MNIST/raw` below it, and takes names with `-idx` or `.idx`. Raises UserError
    where a file is missing, cut short, longer than it says or no IDX file, and where images and labels do not match.
    """
    images = _read_idx(_find(folder, split, "images", 3), dimensions=3)
    labels_file = _find(folder, split, "labels", 1)
    labels = _read_idx(labels_file, dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels; download them again")
    if labels.size and int(labels.max()) >= len(CLASSES):
        place = int(labels.argmax())
        raise UserError(f"{labels_file}: label {labels[place]} at place {place}; accepted are 0 to {len(CLASSES) - 1}")
    return Digits(images=images, labels=labels.astype(np.int64))


def _find(folder: Path | Traversable, split: str, what: str, dimensions: int) -> Path | Traversable:
    stem = f"{_PREFIXES[split]}-{what}"
    for place in (folder, folder / "MNIST" / "raw"):
        for joint in ("-", "."):
            for suffix in ("", ".gz"):
                file = place / f"{stem}{joint}idx{dimensions}-ubyte{suffix}"
                if file.is_file():
                    return file
    raise UserError(f"{folder}: no {stem}-idx{dimensions}-ubyte(.gz); a folder with MNIST's IDX files is needed here")


def _read_idx(file: Path | Traversable, *, dimensions: int) -> np.ndarray:
    with file.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(f"{file}: larger than {_MAX_BYTES >> 20} MiB, so none of MNIST's; download it again")
    if data[:2] == b"\x1f\x8b":
        data = _unzip(file, data)
    header = 4 * (1 + dimensions)
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{file}: no IDX file of bytes in {dimensions} dimension(s); download it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise UserError(
            f"{file}: {len(data)} bytes where its header promises {expected}; the file is damaged: download it again"
        )
    if 0 in shape:
        raise UserError(f"{file}: nothing in it, by its header {' x '.join(map(str, shape))}; download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _unzip(file: Path | Traversable, data: bytes) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(data, _MAX_BYTES)
    except zlib.error as error:
        raise UserError(f"{file}: not a whole gzip file ({error}); download it again") from error
    if not inflater.eof:
        raise UserError(f"{file}: not a whole gzip file (cut short, or larger than {_MAX_BYTES >> 20} MiB unpacked)")
    return plain
