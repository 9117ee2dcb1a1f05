"""Files of arrays: PyTorch's `.pt`, NumPy's `.npz`, HDF5 and MATLAB 5. Nothing in them is ever executed."""

from __future__ import annotations

import struct
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from mnistm_dist.data.layouts import mat5
from mnistm_dist.data.layouts.arrays import (
    ArraySplit,
    arrays_source,
    check_images,
    check_labels,
    held,
    need_library,
    reading,
)
from mnistm_dist.data.layouts.decompression import check_expansion
from mnistm_dist.data.samples import CLASSES, SPLITS, Source
from mnistm_dist.errors import UserError


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
