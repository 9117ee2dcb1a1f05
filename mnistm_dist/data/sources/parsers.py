"""Arrays from MATLAB 5 files and from pickles, which may come from anywhere.

The libraries for both are not fit for that: scipy 1.17.1 crashed (segmentation fault) on damaged MATLAB files, and a
pickle is a program that may call any function. `read_mat` checks every size first. `read_pickle` records calls of
numpy's array constructors and refuses every other name, so nothing is executed.
"""

import io
import pickle
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.sources.archives import Decompressed, max_unpacked

_MATRIX, _COMPRESSED = 14, 15
# Types of the numbers in a file; MATLAB stores the narrowest that fits.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# How text is encoded, by the type of its letters.
_ENCODINGS = {2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
_CELL, _TEXT = 1, 4
# Types of numeric arrays; the others are cells, text, structures and sparse arrays.
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x800


def read_mat(file: Path) -> dict[str, np.ndarray | None]:
    """Read the arrays of a MATLAB 5 file by name: real numbers, text, and cells of text; None stands for any other.

    The format is "MAT-File Format" (The MathWorks, version R2016b), chapter 1: a header of 128 bytes, then elements of
    a type, a size and data, padded to 8 bytes. A matrix is an element of elements (flags, dimensions, name, numbers),
    compressed by zlib or not. Text is an array of one dimension, an element for each row. Raises ValueError, KeyError,
    struct.error or zlib.error for a truncated or damaged file and a decompression bomb.
    """
    arrays: dict[str, np.ndarray | None] = {}
    length = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(128)
        if header.startswith(b"MATLAB 7.3"):
            raise ValueError("MATLAB 7.3; save it with -v7, which writes MATLAB 5")
        order = {b"IM": "<", b"MI": ">"}[header[126:]]
        while tag := stream.read(8):
            kind, size = struct.unpack(f"{order}II", tag)
            # Compressed elements are not padded.
            data = stream.read(min(length, size if kind == _COMPRESSED else -(-size // 8) * 8))
            if kind == _COMPRESSED:
                inflater = zlib.decompressobj()
                data = inflater.decompress(data, max_unpacked(size))[8:]
                if not inflater.eof:
                    raise ValueError("a compressed array is truncated or unpacks without bound")
            if kind in (_MATRIX, _COMPRESSED):
                arrays.update(_parse_matrix(data, order))
    return arrays


def _parse_matrix(data: bytes, order: str) -> dict[str, np.ndarray | None]:
    """Return the array of a matrix by its name; None in its place if it is neither real numbers nor text."""
    elements = _elements(data, order)
    (_, flags_at, _), (_, at, size), (_, name_at, name_size) = islice(elements, 3)
    (flags,) = struct.unpack_from(f"{order}I", data, flags_at)
    shape = struct.unpack_from(f"{order}{size // 4}i", data, at)
    name = data[name_at : name_at + name_size].decode("latin-1")
    if flags & 0xFF == _CELL:
        cells = [_parse_matrix(data[at : at + size], order) for _, at, size in islice(elements, prod(shape))]
        texts = [text for cell in cells for text in cell.values() if text is not None and text.dtype == object]
        is_text = len(texts) == prod(shape) and all(len(text) == 1 for text in texts)
        return {name: np.concatenate(texts) if texts and is_text else None}
    if flags & 0xFF not in (*_CLASSES, _TEXT) or flags & _COMPLEX:
        return {name: None}
    stored, start, data_size = next(elements)
    if flags & 0xFF == _TEXT:
        encoding = _ENCODINGS[stored] + {"<": "-le", ">": "-be"}[order] * (_ENCODINGS[stored] == "utf-16")
        letters = np.array(list(data[start : start + data_size].decode(encoding))).reshape(shape, order="F")
        return {name: np.array(["".join(row).rstrip() for row in letters.tolist()], dtype=object)}
    dtype = np.dtype(order + _STORED[stored])
    if data_size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: shape {shape} in {data_size} bytes")
    numbers = np.frombuffer(data, dtype, count=prod(shape), offset=start).reshape(shape, order="F")
    return {name: numbers.astype(_CLASSES[flags & 0xFF], order="K", copy=False)}


def _elements(data: bytes, order: str) -> Iterator[tuple[int, int, int]]:
    """Yield type, offset of the data and size of the elements."""
    at = 0
    while True:
        kind, size = struct.unpack_from(f"{order}II", data, at)
        # In the small format, size and type are in the first four bytes, the data in the next four.
        small = kind >> 16
        yield (kind & 0xFFFF, at + 4, small) if small else (kind, at + 8, size)
        at += 8 if small else 8 + -(-size // 8) * 8


def read_pickle(file: Path) -> Any:
    """Read a pickle of numeric arrays, numbers and text in dicts and lists, compressed or not.

    Keys of Python 2 are bytes. Raises `pickle.UnpicklingError` for one that needs more, and other exceptions for a
    damaged one.
    """
    return _resolve(_Unpickler(io.BytesIO(Decompressed(file).read()), encoding="bytes").load())


def _resolve(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(inner) for inner in value]
    return _to_array(value) if isinstance(value, _Call) else value


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
    kind = dtype.args[0].decode() if isinstance(dtype.args[0], bytes) else dtype.args[0]
    if not re.fullmatch(r"[uif][1248]|b1", kind):
        raise pickle.UnpicklingError(f"an array of {kind!r}")
    order_of_bytes = ">" if dtype.state and dtype.state[1] in (">", b">") else "<"
    return np.frombuffer(data, np.dtype(order_of_bytes + kind)).reshape(shape, order=order)
