"""The Keras copies of MNIST-M: a pickle of arrays, without labels, which are MNIST's in order.

A pickle is a program. The one that runs here may make numpy arrays and nothing else: each name that it asks for is
looked up in a table of stand-ins, and every other is refused by its name.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.sources.archives import unpack
from mnistm_dist.data.sources.arrays import ArraySplit, arrays_source, check_images, check_labels, held
from mnistm_dist.data.sources.base import SPLITS, Source
from mnistm_dist.data.sources.idx import read_digits
from mnistm_dist.errors import UserError

_BROKEN: tuple[type[Exception], ...] = (*UNREADABLE, AttributeError, ImportError)
"""What unpickling raises at bytes that make no sense."""


def open_pickle(file: Path, *, mnist: Path | None) -> Source:
    """Opens a pickle, gzip'ed or not, of a dict with `train`, `test` (`val`), uint8 (n, height, width, 3) each.

    Labels are taken from the folder `mnist`, in order: MNIST's train for train, its test for test, so the numbers of
    images must be MNIST's. Keys may be bytes, as Python 2 wrote them. Raises UserError for anything else, for a pickle
    that asks for more than arrays, and where `mnist` is None.
    """
    if mnist is None:
        raise UserError(
            f"{file}: a pickle holds images without labels; give --mnist DIR, with MNIST's IDX files, for them"
        )
    arrays = _load(file)
    splits: dict[str, ArraySplit] = {}
    for split in SPLITS:
        images = arrays.get(split)
        if images is None:
            continue
        if split == "val":
            raise UserError(
                f"{file}: val: images without labels that are not known to be any part of MNIST; "
                "accepted are train and test"
            )
        count = check_images(f"{file}: {split}", images.shape, images.dtype)
        labels = check_labels(f"{mnist}: {split} labels, for {file}", read_digits(mnist, split).labels, count)
        splits[split] = ArraySplit(origin=f"{file}: {split}", labels=labels, images=held(images))
    if not splits:
        raise UserError(
            f"{file}: a dict of {', '.join(arrays)[:60] or 'nothing'}; accepted are the keys train and test"
        )
    return arrays_source("pickle", f"{file}, pickled arrays, with MNIST's labels", splits)


def _load(file: Path) -> dict[str, np.ndarray]:
    with unpack(file) as stream:
        try:
            found = _ArraysOnly(cast(Any, stream), file).load()
        except _BROKEN as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{file}: no whole pickle of arrays ({reason}); fetch it again") from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str | bytes) and isinstance(value, _Array) for key, value in found.items()
    ):
        raise UserError(f"{file}: a {type(found).__name__}; accepted is a dict of arrays")
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value.array for key, value in found.items()}


def _load_bytearray(unpickler: Any) -> None:
    """Bytes of protocol 5. The stock reader makes room for as many as their size says, before it reads any."""
    (size,) = struct.unpack("<Q", unpickler.read(8))
    data = unpickler.read(size)
    if len(data) != size:
        raise EOFError(f"{len(data)} bytes where {size} are promised")
    unpickler.append(bytearray(data))


def _load_build(unpickler: Any) -> None:
    """The state of an object. The stock reader would set attributes of a stand-in itself: its defaults, its code."""
    if not isinstance(unpickler.stack[-2], _Array | _Dtype):
        raise pickle.UnpicklingError(f"a state for a {type(unpickler.stack[-2]).__name__}")
    pickle._Unpickler.load_build(unpickler)  # type: ignore[attr-defined]  # of the unpickler in Python


class _ArraysOnly(pickle._Unpickler):
    """Admits what numpy's own pickles of arrays ask for, by stand-ins that can do no more than hold one.

    It is the unpickler in Python: the one in C takes memory for as many memo entries as a few bytes ask for.
    """

    def __init__(self, stream: Any, file: Path) -> None:
        super().__init__(stream, encoding="bytes")
        self._origin = file

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.BUILD[0]: _load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise UserError(
                f"{self._origin}: asks for {f'{module}.{name}'!a} when it is unpickled; only numpy arrays are accepted"
            ) from None


class _Array:
    """Stands in for an array, from numpy's `_reconstruct` to its state."""

    array = np.empty((0,), np.uint8)
    """Of the class too: a pickle can make an object without calling its ``__init__``."""

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _array_of(raw, dtype, shape, "F" if is_fortran else "C").array


class _Dtype:
    """Stands in for a dtype; it has a state too, which says nothing of bytes."""

    def __init__(self, code: object, *ignored: object) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


def _array_of(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """What numpy's `_frombuffer` makes in protocol 5."""
    if not isinstance(dtype, _Dtype) or dtype.code != "u1":
        raise pickle.UnpicklingError(f"an array of {getattr(dtype, 'code', dtype)!r}; accepted is uint8")
    made = _Array()
    made.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if order == "F" else "C")
    return made


def _encode(text: str, encoding: str) -> bytes:
    """What `codecs.encode` makes, by which Python 3 writes bytes in old protocols."""
    return text.encode("latin-1")


_ADMITTED: Mapping[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _array_of,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
