"""What the layouts of arrays have in common: shapes and labels checked at the opening, images read afterwards."""

from __future__ import annotations

import importlib
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.image_io import MAX_SIDE
from mnistm_dist.data.sources import matlab as mat5
from mnistm_dist.data.sources.archives import check_expansion
from mnistm_dist.data.sources.base import CLASSES, SPLITS, Sample, Source
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


def open_pt(files: Mapping[str, Path]) -> Source:
    """Opens PyTorch files, one a split: a tuple (uint8 (n, height, width, 3), int64 (n,)).

    They are read with `weights_only=True`, and mapped where their format allows. Raises UserError for anything else.
    """
    import torch

    splits: dict[str, ArraySplit] = {}
    for split, file in files.items():
        with reading(str(file), "a tuple of two tensors", AssertionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle, which is refused or read all the same
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(found, tuple | list) or len(found) != 2 or not all(map(torch.is_tensor, found)):
            raise UserError(f"{file}: a {type(found).__name__}; accepted is a tuple of two tensors, images and labels")
        count = check_images(str(file), found[0].shape, found[0].dtype)
        images = found[0].numpy()
        labels = check_labels(str(file), found[1].numpy(), count)
        splits[split] = ArraySplit(origin=str(file), labels=labels, images=held(images))
    return arrays_source("pt", f"{_names(files)}, PyTorch tensors", splits)


def open_npz(files: Mapping[str, Path]) -> Source:
    """Opens NumPy archives, one a split, with the arrays `images` and `labels`. Raises UserError for anything else."""
    splits: dict[str, ArraySplit] = {}
    for split, file in files.items():
        with reading(str(file), "the arrays images and labels"):
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    check_expansion(f"{file}: {info.filename}", info.compress_size, info.file_size)
                with archive.open("images.npy") as stream:
                    count = check_images(f"{file}: images", *_npy_header(stream))
            with np.load(file, allow_pickle=False) as arrays:
                labels = check_labels(f"{file}: labels", arrays["labels"], count)
        splits[split] = ArraySplit(origin=f"{file}: images", labels=labels, images=partial(_load_npz, file))
    return arrays_source("npz", f"{_names(files)}, NumPy arrays", splits)


def open_hdf5(file: Path) -> Source:
    """Opens an HDF5 file with the groups `train` and `test` (`val` too), each with the datasets `X` and `Y`.

    Images are read by chunks. Raises UserError for anything else. Needs h5py.
    """
    h5py = need_library("h5py", "hdf5")
    splits: dict[str, ArraySplit] = {}
    with reading(str(file), "groups train and test with datasets X and Y"):
        opened = h5py.File(file, "r")
        for split in (split for split in SPLITS if split in opened):
            images, labels = opened[f"{split}/X"], opened[f"{split}/Y"]
            if not isinstance(images, h5py.Dataset) or not isinstance(labels, h5py.Dataset):
                raise UserError(f"{file}: {split}: X and Y are not both datasets; accepted are groups of two datasets")
            count = check_images(f"{file}: {split}/X", images.shape, images.dtype)
            # What was never written takes no room in the file, and a label may stand for as many as its shape says.
            check_expansion(f"{file}: {split}/Y", file.stat().st_size, labels.size * labels.dtype.itemsize)
            if labels.size not in (count, count * len(CLASSES)):
                raise UserError(f"{file}: {split}/Y: {labels.size} labels for {count} images; each needs one")
            checked = check_labels(f"{file}: {split}/Y", labels[()], count)
            splits[split] = ArraySplit(origin=f"{file}: {split}/X", labels=checked, images=held(images))
    return arrays_source("hdf5", f"{file}, HDF5", splits)


def open_mat(file: Path) -> Source:
    """Opens a MATLAB 5 file with `train`, `label_train`, and for `test` (`val`) likewise; MATLAB 7.3 is another format.

    The images of one split are read at a time. Raises UserError for anything else.
    """
    splits: dict[str, ArraySplit] = {}
    with reading(str(file), "variables train and label_train in MATLAB 5", struct.error):
        variables = mat5.variables(file)
        for split in (split for split in SPLITS if split in variables):
            images = variables[split]
            count = check_images(f"{file}: {split}", images.shape, images.dtype)
            labels = _whole(mat5.read(file, variables[f"label_{split}"]))
            checked = check_labels(f"{file}: label_{split}", labels, count)
            load = partial(_load_mat, file, split, images)
            splits[split] = ArraySplit(origin=f"{file}: {split}", labels=checked, images=load)
    return arrays_source("mat", f"{file}, MATLAB", splits)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _load_npz(file: Path) -> np.ndarray:
    with reading(str(file), "the arrays images and labels"), np.load(file, allow_pickle=False) as arrays:
        return np.asarray(arrays["images"])


def _load_mat(file: Path, split: str, images: mat5.Variable) -> np.ndarray:
    with reading(f"{file}: {split}", "an array in MATLAB 5"):
        return mat5.read(file, images)


def _whole(labels: np.ndarray) -> np.ndarray:
    """MATLAB's numbers are floats by default; those that are whole become integers."""
    return labels.astype(np.int64) if labels.dtype.kind == "f" and (labels == np.trunc(labels)).all() else labels


def _names(files: Mapping[str, Path]) -> str:
    return ", ".join(str(file) for file in files.values())
