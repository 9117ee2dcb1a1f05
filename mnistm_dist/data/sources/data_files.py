"""Arrays of images and labels: NumPy, PyTorch, HDF5, MATLAB, pickle and IDX files.

1. A loader lists the arrays of one file under their names.
2. `open_arrays` decides which array is the images or labels of which split, by the words of its name, of its file and
   of the folders around it, or by its shape.
3. Images of other forms (grey, channels first, floats from 0 to 1) are converted when they are read, with a note.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import MAX_SIDE, explain_decode_errors
from mnistm_dist.data.sources.archives import Tree, check_expansion
from mnistm_dist.data.sources.base import CLASSES, SPLITS, NoLabelsError, Table, check_labels, role_of, split_of
from mnistm_dist.data.sources.parsers import read_mat, read_pickle
from mnistm_dist.data.sources.synthesis import read_digits, read_idx
from mnistm_dist.errors import UserError, import_optional

_CHUNK_BYTES = 4 << 20  # approximate size of the array images that are read together
_CLASS_NAMES = ("class_names", "label_names", "classes", "names")

# The arrays of a file by their names; `/` joins those of groups and nested dicts. An array has a shape and a dtype and
# slices to numbers, in memory or not.
Arrays = Mapping[str, Any]


def load_npz(file: Path) -> Arrays:
    """Return the arrays of a NumPy archive."""
    with zipfile.ZipFile(file) as archive:
        check_expansion(str(file), file.stat().st_size, sum(info.file_size for info in archive.infolist()))
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def load_npy(file: Path) -> Arrays:
    """Return the array of a NumPy file, memory-mapped, under an empty name."""
    return {"": np.load(file, mmap_mode="r", allow_pickle=False)}


def load_pt(file: Path) -> Arrays:
    """Return the tensors and arrays of a PyTorch file: a tuple, a dict, or a TensorDataset; memory-mapped if its format
    allows it. It is read with `weights_only=True`."""
    import torch
    from torch.utils.data import TensorDataset

    # What rebuilds a NumPy array; each creates or fills an array and does nothing else.
    dtypes = [type(np.dtype(kind)) for kind in ("u1", "i1", "i2", "i4", "i8", "f4", "f8")]
    rebuild: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, *dtypes, TensorDataset]
    with torch.serialization.safe_globals(rebuild):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return _flatten(content.__dict__["tensors"] if isinstance(content, TensorDataset) else content)


def load_hdf5(file: Path) -> Arrays:
    """Return the datasets of an HDF5 file, in all groups; they are read in chunks. Needs h5py."""
    h5py = import_optional("h5py", "layout hdf5", "formats")
    arrays: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape:
            arrays[name] = node

    h5py.File(file, "r").visititems(visit)
    return arrays


def load_pickle(file: Path) -> Arrays:
    """Return the arrays of a pickled dict, without executing anything in it."""
    return _flatten(read_pickle(file))


def load_idx(file: Path) -> Arrays:
    """Return the array of an IDX file, MNIST's format, under an empty name."""
    return {"": read_idx(file)}


def _flatten(content: Any) -> Arrays:
    """Return the arrays in nested dicts and sequences; the names of those in a sequence are their places."""
    if hasattr(content, "numpy"):
        return {"": content.numpy()}
    if isinstance(content, np.ndarray):
        return {"": content}
    if isinstance(content, list | tuple) and all(isinstance(value, int | str) for value in content):
        return {"": np.asarray(content)}
    if isinstance(content, Mapping):
        items = [(key.decode() if isinstance(key, bytes) else str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [(str(place), value) for place, value in enumerate(content)]
    else:
        return {}
    flat = ((f"{key}/{name}".strip("/"), array) for key, value in items for name, array in _flatten(value).items())
    return dict(flat)


# The loader of each layout, and what it expects, for messages.
LOADERS: Mapping[str, tuple[Callable[[Path], Arrays], str]] = {
    "npz": (load_npz, "the arrays images and labels"),
    "npy": (load_npy, "an array of NumPy"),
    "pt": (load_pt, "a tuple of two tensors"),
    "hdf5": (load_hdf5, "groups train and test with datasets X and Y"),
    "mat": (read_mat, "a MATLAB 5 file with train and label_train"),
    "pickle": (load_pickle, "a pickled dict of arrays"),
    "idx": (load_idx, "an IDX file"),
}


@dataclass(frozen=True, kw_only=True)
class _Images:
    """An array of images, sliced to uint8 (n, height, width, 3)."""

    origin: str
    array: Any
    form: str = ""
    """How it differs from such an array, for a note."""
    channels_first: bool = False
    factor: int = 1

    @staticmethod
    def of(origin: str, array: Any) -> "_Images":
        """Find the form of an array. Raises `UserError` if it is not images."""
        shape, kind, forms, first, factor = tuple(array.shape), np.dtype(array.dtype).kind, [], False, 1
        if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
            first, shape, forms = True, (shape[0], *shape[2:], shape[1]), ["channels first"]
        if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
            shape, forms = (*shape[:3], 3), [*forms, "grey"]
        if kind == "f":
            blocks = (np.asarray(array[start : start + 1024]) for start in range(0, shape[0], 1024))
            limits = [(block.min(), block.max()) for block in blocks if block.size]
            low, high = (min(low for low, _ in limits), max(high for _, high in limits)) if limits else (0, 0)
            if not (low >= 0 and high <= 1):
                raise UserError(f"{origin}: floats from {low} to {high}; accepted are uint8, or floats from 0 to 1")
            forms, factor = [*forms, "floats from 0 to 1, times 255"], 255
        sides = shape[1:3] if len(shape) == 4 and shape[3] == 3 else (0,)
        if not ((array.dtype == np.uint8 or kind == "f") and all(1 <= side <= MAX_SIDE for side in sides)):
            raise UserError(
                f"{origin}: {array.dtype} of shape {tuple(array.shape)}; expected images uint8 (n, height, width, 3), "
                f"1 to {MAX_SIDE:,} pixels a side"
            )
        return _Images(origin=origin, array=array, form=", ".join(forms), channels_first=first, factor=factor)

    def read(self) -> Iterator[tuple[int, np.ndarray, str]]:
        count = len(self.array)
        chunk = max(1, _CHUNK_BYTES // prod(self.array.shape[1:]))
        for start in range(0, count, chunk):
            with explain_decode_errors(f"{self.origin}: from image {start} on", "images"):
                block = np.asarray(self.array[start : start + chunk])
                block = block.transpose(0, 2, 3, 1) if self.channels_first else block
                block = block if self.factor == 1 else np.rint(block.astype(np.float64) * self.factor).astype(np.uint8)
                block = block if block.shape[3:] == (3,) else np.repeat(block.reshape(*block.shape[:3], 1), 3, axis=3)
                block = np.ascontiguousarray(block)
            for index, pixels in enumerate(block, start):
                yield index, pixels, f"{self.origin}: image {index}"


def open_arrays(
    layout: str, tree: Tree, files: Sequence[str], mnist: Path | None
) -> tuple[list[Table], tuple[str, ...], Sequence[str] | None]:
    """Return the tables of the array files of one set, notes, and the class names if they are known.

    ``mnist`` is a folder of MNIST's files, whose labels a pickle without labels gets. Raises `UserError` for arrays
    that are no images and labels of the same number, and `NoLabelsError` for images without labels.
    """
    images: dict[str | None, _Images] = {}
    labels: dict[str | None, tuple[str, Any]] = {}
    unused, classes = [], None
    load, expected = LOADERS[layout]
    for file in files:
        origin, path = tree.origin(file), tree.local(file)
        with explain_decode_errors(origin, expected, AssertionError, AttributeError):
            arrays = load(path)
        around = tree.context(file)
        # Arrays whose names say what they are come first: another one may have the shape of labels.
        for name, array in sorted(arrays.items(), key=lambda item: role_of(item[0]) is None):
            full, key = f"{origin}: {name}" if name else origin, name or file.rpartition("/")[2].partition(".")[0]
            if not hasattr(array, "shape") or not array.shape:
                unused.append(full)
                continue
            # Values that were never written take no room in a file.
            if layout == "hdf5" and array.ndim < 3:
                check_expansion(full, path.stat().st_size, array.nbytes)
            split, role = split_of(name) or split_of(around), role_of(key)
            by_shape = "image" if len(array.shape) >= 3 else "label"
            if key.lower() in _CLASS_NAMES and array.dtype.kind in "SUO" and split_of(name) is None:
                classes = [str(text) for text in np.asarray(array).tolist()]
            elif role == "image" or (role is None and by_shape == "image"):
                if split in images:
                    raise UserError(
                        f"{full}: a second array of split {split or 'train'} beside {images[split].origin}; remove one "
                        "of the two"
                    )
                images[split] = _Images.of(full, array)
            elif split in labels:
                unused.append(full)
            else:
                labels[split] = full, array
    if not images:
        found = ", ".join(origin for origin, _ in labels.values()) or "no arrays"
        raise NoLabelsError(f"{tree.origin(files[0])}: found {found}; expected images and labels")
    if not labels and layout == "pickle":
        return _tables_with_mnist(images, mnist), (), CLASSES
    if mnist is not None and layout == "pickle":
        raise UserError(f"--mnist: {next(iter(labels.values()))[0]} are the labels already; leave out --mnist")
    tables, notes = [], [f"array {name} is left out" for name in unused]
    for split, one in sorted(images.items(), key=lambda item: SPLITS.index(item[0] or "train")):
        if split not in labels:
            raise NoLabelsError(f"{one.origin}: no labels beside it; expected an array labels, or y, of its split")
        with explain_decode_errors(labels[split][0], "labels"):
            values = check_labels(labels[split][0], labels[split][1], len(one.array))
        tables.append(Table(origin=one.origin, labels=values, splits=split, classes=classes, read=one.read))
    notes += [
        f"{origin}: no images for these labels; left out"
        for split, (origin, _) in labels.items()
        if split not in images
    ]
    forms = {found.form for found in images.values() if found.form}
    return tables, (*notes, *(f"images converted to uint8 RGB: {form}" for form in sorted(forms))), None


def _tables_with_mnist(images: Mapping[str | None, _Images], mnist: Path | None) -> list[Table]:
    """Return tables with MNIST's labels: test in order; val are the first training digits, train those after them."""
    origin = next(iter(images.values())).origin
    if unknown := images.keys() - {*SPLITS}:
        raise UserError(f"{images[unknown.pop()].origin}: no labels; accepted without labels are train, val and test")
    if mnist is None:
        raise NoLabelsError(f"{origin}: no labels in it: add --mnist DIR or --mnist auto, whose labels it has in order")
    tables = []
    for split, found in images.items():
        labels = read_digits(mnist, "test" if split == "test" else "train")[1]
        before = len(images["val"].array) if split == "train" and "val" in images else 0
        if split == "val" and "train" in images:
            expected = len(found.array) + len(images["train"].array)
            labels = labels[: len(found.array)] if expected == len(labels) else labels
        labels = check_labels(f"{found.origin}: labels of {mnist}", labels[before:], len(found.array))
        tables.append(Table(origin=found.origin, labels=labels, splits=split, read=found.read))
    return tables
