"""The Keras copies of MNIST-M: a pickle of arrays without labels, which are MNIST's in the same order.

A pickle is a program that may call any function. Here calls of numpy's array constructors are recorded, and every other
name is refused, so nothing is executed.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.archives import Decompressed
from mnistm_dist.data.sources.base import Source
from mnistm_dist.data.sources.data_files import Arrays, array_source
from mnistm_dist.data.sources.idx import read_digits
from mnistm_dist.errors import UserError


def open_pickle(file: Path, *, mnist: Path | None = None) -> Source:
    """Open a pickle, compressed or not, of a dict with `train` and `test`: uint8 (n, height, width, 3) each.

    The labels are those of MNIST's training and test set in the folder ``mnist``, in order. Keys may be bytes, as
    Python 2 wrote them. Raises `UserError` for anything else, and for a pickle that needs more than uint8 arrays.
    """
    if mnist is None:
        raise UserError(f"{file}: a pickle of images without labels; add --mnist DIR, with MNIST's IDX files")
    splits: dict[str, Arrays] = {}
    with explain_decode_errors(file, "a pickled dict of uint8 arrays", AttributeError):
        found = _Unpickler(io.BytesIO(Decompressed(file).read()), encoding="bytes").load()
        arrays = {key.decode() if isinstance(key, bytes) else key: _to_array(call) for key, call in found.items()}
    for split in sorted(arrays, key=str, reverse=True):
        if split not in ("train", "test"):
            raise UserError(f"{file}: key {split!r:.60}; accepted are train and test, whose labels MNIST has")
        splits[split] = f"{file}: {split}", arrays[split], read_digits(mnist, split).labels
    return array_source("pickle", splits)


class _Call:
    """A call that a pickle makes: recorded, not executed."""

    state: tuple[Any, ...] | None = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Call,
    ("numpy.core.numeric", "_frombuffer"): _Call,
    ("numpy", "ndarray"): _Call,
    ("numpy", "dtype"): _Call,
    ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in protocols 0 to 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}") from None


def _to_array(call: _Call) -> np.ndarray:
    """Return the array that numpy's `_reconstruct`, with a state, or `_frombuffer` (protocol 5) would return."""
    if call.state is None:
        data, dtype, shape, order = call.args
    else:
        _, shape, dtype, is_fortran, data = call.state
        order = "F" if is_fortran else "C"
    if dtype.args[0] not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of {dtype.args[0]!r}")
    return np.frombuffer(data, np.uint8).reshape(shape, order=order)
