"""Layouts of data files: PyTorch, NumPy, HDF5, MATLAB and pickle files with arrays of images, parquet with image files.

The readers of arrays find those of every split; `array_source` checks them and makes a source of them. Parquet is read
in batches of rows.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import MAX_SIDE, explain_decode_errors
from mnistm_dist.data.sources.archives import check_expansion, check_size
from mnistm_dist.data.sources.base import SPLITS, Sample, Source, check_labels
from mnistm_dist.data.sources.parsers import read_mat, read_pickle
from mnistm_dist.data.sources.synthesis import read_digits
from mnistm_dist.errors import UserError, import_optional

_CHUNK_BYTES = 4 << 20  # approximate size of the array images that are read together
_PARQUET_ROWS = 16  # decoded together: a few bytes of a file can stand for one large image in each of them
_IMAGE_TYPE = re.compile(r"(large_)?binary|struct<(.*, )?bytes: (large_)?binary.*>")
_LABEL_TYPE = re.compile(r"u?int\d+")


# One split: `FILE: NAME` for messages, images and labels. Images have a shape and a dtype and slice to uint8 (n,
# height, width, 3), in memory or not; labels as in `check_labels`.
Arrays = tuple[str, Any, Any]


def array_source(layout: str, splits: Mapping[str, Arrays]) -> Source:
    """Return a source of arrays. Raises `UserError` unless they are images and labels of the same number."""
    checked = {}
    for split, (origin, images, labels) in splits.items():
        with explain_decode_errors(origin, "arrays of images and labels", AttributeError):
            sides = images.shape[1:3] if images.ndim == 4 and images.shape[3] == 3 else (0,)
            if str(images.dtype) != "uint8" or not all(1 <= side <= MAX_SIDE for side in sides):
                raise UserError(
                    f"{origin}: {images.dtype} of shape {images.shape}; expected images uint8 (n, height, width, 3), "
                    f"1 to {MAX_SIDE:,} pixels a side"
                )
            checked[split] = origin, images, check_labels(origin, labels, len(images))

    def read() -> Iterator[Sample]:
        for split, (origin, images, labels) in checked.items():
            chunk = max(1, _CHUNK_BYTES // prod(images.shape[1:]))
            for start in range(0, len(labels), chunk):
                with explain_decode_errors(f"{origin}: from image {start} on", "images"):
                    block = np.ascontiguousarray(images[start : start + chunk])
                for index, pixels in enumerate(block, start):
                    name = f"{origin}: image {index}"
                    yield Sample(split=split, index=index, label=int(labels[index]), pixels=pixels, origin=name)

    return Source(
        layout=layout,
        description=", ".join(origin for origin, _, _ in checked.values()),
        counts={split: len(labels) for split, (_, _, labels) in checked.items()},
        read=read,
    )


def open_pt(files: Mapping[str, Sequence[Path]]) -> Source:
    """Open PyTorch files, one per split: a tuple (uint8 (n, height, width, 3), int64 (n,)).

    They are read with `weights_only=True`, and memory-mapped if their format allows it. Raises `UserError` for
    anything else.
    """
    return _open_each("pt", files, _load_pt, "a tuple of two tensors")


def _load_pt(file: Path) -> list[np.ndarray]:
    import torch

    mapped = zipfile.is_zipfile(file)
    return [tensor.numpy() for tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)]


def open_npz(files: Mapping[str, Sequence[Path]]) -> Source:
    """Open NumPy archives, one per split, with the arrays `images` and `labels`.

    Raises `UserError` for anything else.
    """
    return _open_each("npz", files, _load_npz, "the arrays images and labels")


def _load_npz(file: Path) -> list[np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        check_expansion(str(file), file.stat().st_size, sum(info.file_size for info in archive.infolist()))
    with np.load(file, allow_pickle=False) as arrays:
        return [arrays["images"], arrays["labels"]]


def _open_each(
    layout: str, files: Mapping[str, Sequence[Path]], load_arrays: Callable[[Path], list[np.ndarray]], expected: str
) -> Source:
    splits: dict[str, Arrays] = {}
    for split, (file, *others) in files.items():
        if others:
            raise UserError(f"{others[0]}: a second file of split {split} beside {file.name}; remove one of the two")
        with explain_decode_errors(file, expected, AssertionError, AttributeError):
            images, labels = load_arrays(file)
        splits[split] = str(file), images, labels
    return array_source(layout, splits)


def open_hdf5(file: Path) -> Source:
    """Open an HDF5 file with the groups `train` and `test` (or `val`), each with the datasets `X` and `Y`.

    Images are read in chunks. Raises `UserError` for anything else. Needs h5py.
    """
    h5py = import_optional("h5py", "layout hdf5", "formats")
    splits: dict[str, Arrays] = {}
    with explain_decode_errors(file, "groups train and test with datasets X and Y", AttributeError):
        opened = h5py.File(file, "r")
        for split in (split for split in SPLITS if split in opened):
            images, labels = opened[f"{split}/X"], opened[f"{split}/Y"]
            # Values that were never written take no room in the file.
            check_expansion(f"{file}: {split}/Y", file.stat().st_size, labels.nbytes)
            splits[split] = f"{file}: {split}", images, labels
    return array_source("hdf5", splits)


def open_mat(file: Path) -> Source:
    """Open a MATLAB 5 file with `train` and `label_train`, and the same for `test` (or `val`).

    Raises `UserError` for anything else.
    """
    with explain_decode_errors(file, "a MATLAB 5 file with train and label_train"):
        arrays = read_mat(file)
        splits = {s: (f"{file}: {s}", arrays[s], arrays[f"label_{s}"]) for s in SPLITS if s in arrays}
    return array_source("mat", splits)


def open_pickle(file: Path, mnist: Path) -> Source:
    """Open a pickle, compressed or not, of a dict with `train` and `test`: uint8 (n, height, width, 3) each.

    It is the layout of the Keras copies. The labels are those of MNIST's training and test set in the folder ``mnist``,
    in order. Keys may be bytes, as Python 2 wrote them. Raises `UserError` for anything else, and for a pickle that
    needs more than uint8 arrays.
    """
    with explain_decode_errors(file, "a pickled dict of uint8 arrays", AttributeError):
        arrays = {key.decode() if isinstance(key, bytes) else key: array for key, array in read_pickle(file).items()}
    for key in arrays.keys() - {"train", "test"}:
        raise UserError(f"{file}: key {key!r:.60}; accepted are train and test, whose labels MNIST has")
    return array_source(
        "pickle",
        {s: (f"{file}: {s}", arrays[s], read_digits(mnist, s)[1]) for s in SPLITS if s in arrays},
    )


def open_parquet(files: Mapping[str, Sequence[Path]]) -> Source:
    """Open the parquet files of each split, in the order given; images are read in batches of rows.

    The column `image` is a struct with the field `bytes`, or binary itself; `label` is an integer. Raises `UserError`
    for other columns, an empty cell and a damaged file. Needs pyarrow.
    """

    def read() -> Iterator[Sample]:
        for split, parts in files.items():
            rows = ((f"{file}: row {row}", *cells) for file in parts for row, cells in enumerate(_read_rows(file)))
            for index, (origin, image, label) in enumerate(rows):
                if not image.is_valid or label is None:
                    missing = "label" if image.is_valid else "image bytes"
                    raise UserError(f"{origin}: no {missing}; every row needs both")
                check_size(origin, image.as_buffer().size)
                yield Sample(split=split, index=index, label=label, png=image.as_py(), origin=origin)

    return Source(
        layout="parquet",
        description=", ".join(str(file) for parts in files.values() for file in parts),
        counts={split: sum(map(_count_rows, parts)) for split, parts in files.items()},
        read=read,
    )


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    pa, pq = (import_optional(name, "layout parquet", "formats") for name in ("pyarrow", "pyarrow.parquet"))
    # Without a buffer, pyarrow holds the images of a whole row group.
    with explain_decode_errors(file, "parquet", pa.ArrowException), pq.ParquetFile(file, buffer_size=1 << 20) as opened:
        yield opened


def _count_rows(file: Path) -> int:
    with _parquet(file) as opened:
        types = {name: str(opened.schema_arrow.field(name).type) for name in opened.schema_arrow.names}
        if not _IMAGE_TYPE.fullmatch(types.get("image", "")) or not _LABEL_TYPE.fullmatch(types.get("label", "")):
            found = ", ".join(f"{name} {kind}" for name, kind in types.items())[:120]
            raise UserError(f"{file}: columns {found}; expected image, a struct with bytes, and label, an integer")
        groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
        check_expansion(str(file), file.stat().st_size, sum(group.total_byte_size for group in groups))
        return int(opened.metadata.num_rows)


def _read_rows(file: Path) -> Iterator[tuple[Any, int | None]]:
    """Yield image and label of each row; the image is a pyarrow scalar, whose bytes are not copied yet."""
    with _parquet(file) as opened:
        for batch in opened.iter_batches(batch_size=_PARQUET_ROWS, columns=["image", "label"]):
            images = batch.column("image")
            if str(images.type).startswith("struct"):
                images = images.flatten()[images.type.get_field_index("bytes")]
            yield from zip(images, batch.column("label").to_pylist(), strict=True)
