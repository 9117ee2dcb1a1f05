"""What the layouts of arrays have in common: shapes and labels checked at the opening, images read afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from mnistm_dist.data.damage import UNREADABLE
from mnistm_dist.data.png import MAX_SIDE
from mnistm_dist.data.samples import CLASSES, Sample, Source
from mnistm_dist.errors import UserError

_CHUNK_BYTES = 4 << 20
"""Of images that are read together, about."""


@dataclass(frozen=True, kw_only=True)
class ArraySplit:
    """One split held as arrays."""

    origin: str
    """`file: name`, for messages."""
    labels: np.ndarray
    """int64 (n,), each a class."""
    images: Callable[[], Any]
    """Gives what slices to uint8 (n, height, width, 3); it may read a file to do so, and raise UserError."""


def arrays_source(layout: str, description: str, splits: Mapping[str, ArraySplit]) -> Source:
    """A source of arrays that have been checked; one split's images are held at a time."""
    return Source(
        layout=layout,
        description=description,
        counts={split: len(part.labels) for split, part in splits.items()},
        read=partial(_read, splits),
    )


def held(images: Any) -> Callable[[], Any]:
    """The ``images`` of an `ArraySplit` that need no further reading."""
    return lambda: images


def check_images(origin: str, shape: Sequence[int], dtype: object) -> int:
    """How many images an array holds. Raises UserError unless it is uint8 (n, height, width, 3) of sides that PNGs may
    have."""
    fits = len(shape) == 4 and shape[3] == 3 and all(1 <= side <= MAX_SIDE for side in shape[1:3])
    if not fits or str(dtype) not in ("uint8", "torch.uint8"):
        raise UserError(
            f"{origin}: {dtype} of shape {tuple(shape)}; accepted are images uint8 (n, height, width, 3), "
            f"1 to {MAX_SIDE:,} pixels a side"
        )
    return int(shape[0])


def check_labels(origin: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Labels as int64 (count,), from integers (count,), (count, 1) or (1, count), or one-hot (count, classes).

    Raises UserError where they are something else, too few or too many, or no classes.
    """
    values = np.asarray(labels)
    if values.shape == (count, len(CLASSES)):
        if not (np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()):
            raise UserError(
                f"{origin}: rows that are not one-hot; accepted is a single 1 in each, in its class's column"
            )
        values = values.argmax(axis=1)
    elif values.ndim == 2 and 1 in values.shape:
        values = values.reshape(-1)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UserError(f"{origin}: {values.dtype} of shape {values.shape}; accepted are integers (n,), one a label")
    if len(values) != count:
        raise UserError(f"{origin}: {len(values)} labels for {count} images; each needs one")
    wrong = np.flatnonzero((values < 0) | (values >= len(CLASSES)))
    if wrong.size:
        place = int(wrong[0])
        raise UserError(f"{origin}: label {values[place]} at place {place}; accepted are 0 to {len(CLASSES) - 1}")
    return values.astype(np.int64)


def need_library(name: str, layout: str) -> ModuleType:
    """Imports a library that only some layouts need. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = name.partition(".")[0]
        raise UserError(f'the layout {layout} needs {wanted}: pip install "mnistm-dist[formats]"') from error


@contextmanager
def reading(origin: str, holds: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what torch, numpy, h5py and pyarrow raise at a file that is damaged, or not of their kind, into a
    UserError; `holds` says what it should hold, and `also` are more exceptions of a library's own.
    """
    try:
        yield
    except UserError:
        raise
    except (*UNREADABLE, *also) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{origin}: damaged, or something else than {holds} ({reason})") from error


def _read(splits: Mapping[str, ArraySplit]) -> Iterator[Sample]:
    for split, part in splits.items():
        images = part.images()
        chunk = max(1, _CHUNK_BYTES // prod(images.shape[1:]))
        for start in range(0, len(part.labels), chunk):
            labels = part.labels[start : start + chunk].tolist()
            with reading(f"{part.origin}: images from {start} on", "images"):
                block = np.ascontiguousarray(images[start : start + chunk])
            for index, (label, pixels) in enumerate(zip(labels, block, strict=True), start):
                origin = f"{part.origin}: image {index}"
                yield Sample(split=split, index=index, label=label, pixels=pixels, origin=origin)
