"""Arrays of images and labels: NumPy, PyTorch, HDF5, MATLAB, pickle and IDX files.

1. A loader lists the arrays of one file under their names.
2. `open_arrays` decides which array is the images or labels of which split, by the words of its name, of its file and
   of the folders around it, or by its shape.
3. Images of other forms (grey, channels first, floats from 0 to 1) are converted when they are read, with a note.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import MAX_SIDE, explain_decode_errors
from mnistm_dist.data.sources.archives import Tree, check_expansion
from mnistm_dist.data.sources.base import (
    CLASSES,
    SPLITS,
    ImageSet,
    NoLabelsError,
    Table,
    check_labels,
    key_of,
    list_some,
    role_of,
    split_of,
    texts_of,
)
from mnistm_dist.data.sources.parsers import read_mat, read_pickle
from mnistm_dist.data.sources.synthesis import read_digits, read_idx
from mnistm_dist.errors import UserError, import_optional

_CHUNK_BYTES = 4 << 20  # approximate size of the array images that are read together
_CLASS_NAMES = re.compile(r"(.*/)?((list|class|label)_)?(names|classes)", re.IGNORECASE)

# The arrays of a file by their names; `/` joins those of groups and nested dicts. An array has a shape and a dtype and
# slices to numbers, in memory or not.
Arrays = Mapping[str, Any]


def load_npz(file: Path) -> Arrays:
    """Return the arrays of a NumPy archive."""
    with zipfile.ZipFile(file) as archive:
        check_expansion(str(file), file.stat().st_size, sum(info.file_size for info in archive.infolist()))
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


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
    nodes: dict[str, Any] = {}
    h5py.File(file, "r").visititems(lambda name, node: nodes.update({name: node}))
    return {name: node for name, node in nodes.items() if isinstance(node, h5py.Dataset)}


def _flatten(content: Any) -> Arrays:
    """Return the values in nested dicts and sequences; the names of those in a sequence are their places."""
    if isinstance(content, list | tuple) and all(isinstance(value, int | str | bytes) for value in content):
        return {"": np.asarray(content)}
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        return {"": content.numpy() if hasattr(content, "numpy") else content}
    items = [(key.decode() if isinstance(key, bytes) else str(key), value) for key, value in content.items()]
    flat = ((f"{key}/{name}".strip("/"), array) for key, value in items for name, array in _flatten(value).items())
    return dict(flat)


# The loader of each layout, and what it expects, for messages.
LOADERS: Mapping[str, tuple[Callable[[Path], Arrays], str]] = {
    "npz": (load_npz, "the arrays images and labels"),
    "npy": (lambda file: {"": np.load(file, mmap_mode="r", allow_pickle=False)}, "an array of NumPy"),
    "pt": (load_pt, "a tuple of two tensors"),
    "hdf5": (load_hdf5, "groups train and test with datasets X and Y"),
    "mat": (read_mat, "a MATLAB 5 file with train and label_train"),
    "pickle": (lambda file: _flatten(read_pickle(file)), "a pickled dict of arrays"),
    "idx": (lambda file: {"": read_idx(file)}, "an IDX file"),
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


def open_arrays(layout: str, tree: Tree, files: Sequence[str], mnist: Path | None) -> ImageSet:
    """Return the arrays of a set of files as tables.

    ``mnist`` is a folder of MNIST's files, whose labels a pickle without labels gets. Raises `UserError` for arrays
    that are no images and labels of the same number, and `NoLabelsError` for images without labels.
    """
    images: dict[str | None, _Images] = {}
    labels: dict[str | None, tuple[str, Any]] = {}
    notes: list[str] = []
    classes = None
    for file in files:
        around, (load, expected) = tree.context(file), LOADERS[layout]
        with explain_decode_errors(tree.origin(file), expected, AssertionError, AttributeError):
            arrays = load(tree.local(file))
        # Arrays whose names say what they are come first: another one may have the shape of labels.
        for name, array in sorted(arrays.items(), key=lambda item: role_of(item[0]) is None):
            origin = f"{tree.origin(file)}: {name}" if name else tree.origin(file)
            shape, kind = getattr(array, "shape", ()), getattr(getattr(array, "dtype", None), "kind", "")
            # Values that were never written take no room in a file.
            if layout == "hdf5" and len(shape) in (1, 2):
                check_expansion(origin, tree.local(file).stat().st_size, array.nbytes)
            split = split_of(name) or split_of(around)
            role = role_of(name or key_of(file)) or ("image" if len(shape) >= 3 else "label")
            if shape and kind in "SUO" and _CLASS_NAMES.fullmatch(name):
                with explain_decode_errors(origin, "class names in UTF-8"):
                    classes = texts_of(array)
            elif not shape or (role == "label" and split in labels):
                notes.append(f"array {origin} is left out")
            elif role == "label":
                labels[split] = origin, array
            elif split in images:
                first = images[split].origin
                raise UserError(f"{origin}: a second array of split {split or 'train'} beside {first}; remove one")
            else:
                images[split] = _Images.of(origin, array)
    place = list_some(list(map(tree.origin, files)))
    if not images:
        found = ", ".join(origin for origin, _ in labels.values()) or "no arrays"
        raise NoLabelsError(f"{tree.origin(files[0])}: found {found}; expected images and labels")
    if layout == "pickle" and not labels:
        labels, classes = _labels_of_mnist(images, mnist), list(CLASSES)
    elif mnist is not None and layout == "pickle":
        raise UserError(f"--mnist: {next(iter(labels.values()))[0]} are the labels already; leave out --mnist")
    tables = []
    for split, one in sorted(images.items(), key=lambda item: SPLITS.index(item[0] or "train")):
        if split not in labels:
            raise NoLabelsError(f"{one.origin}: no labels beside it; expected an array labels, or y, of its split")
        origin, array = labels.pop(split)
        with explain_decode_errors(origin, "labels"):
            values = check_labels(origin, array, len(one.array))
        splits = [split] * len(values)
        tables.append(Table(origin=one.origin, labels=values, splits=splits, classes=classes, read=one.read))
    notes += [f"{origin}: no images for these labels; left out" for origin, _ in labels.values()]
    notes += [f"images converted to uint8 RGB: {form}" for form in sorted({one.form for one in images.values()} - {""})]
    return ImageSet(layout=layout, place=place, tables=tables, used=files, notes=notes)


def _labels_of_mnist(
    images: Mapping[str | None, _Images], mnist: Path | None
) -> dict[str | None, tuple[str, np.ndarray]]:
    """Return MNIST's labels: test in order; val are the first training digits, train those after them."""
    origin = next(iter(images.values())).origin
    if unknown := images.keys() - {*SPLITS}:
        raise UserError(f"{images[unknown.pop()].origin}: no labels; accepted without labels are train, val and test")
    if mnist is None:
        raise NoLabelsError(f"{origin}: no labels in it: add --mnist DIR or --mnist auto, whose labels it has in order")
    found: dict[str | None, tuple[str, np.ndarray]] = {}
    counts = {split: len(one.array) for split, one in images.items()}
    for split in images:
        labels = read_digits(mnist, "test" if split == "test" else "train")[1]
        if split == "train":
            labels = labels[counts.get("val", 0) :]
        elif split == "val" and sum(counts[name] for name in ("train", "val") if name in counts) == len(labels):
            labels = labels[: counts["val"]]
        found[split] = f"{images[split].origin}: labels of {mnist}", labels
    return found
