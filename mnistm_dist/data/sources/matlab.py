"""Read the numeric arrays of MATLAB 5 files.

The format is "MAT-File Format" (The MathWorks, version R2016b), chapter 1: a header of 128 bytes, then elements of a
type, a size and data, padded to 8 bytes. A matrix is an element of elements (flags, dimensions, name, numbers),
compressed by zlib or not. This reader exists because scipy 1.17.1 crashed (segmentation fault) on damaged files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np

from mnistm_dist.data.sources.archives import max_unpacked

_MATRIX, _COMPRESSED = 14, 15
# Types of the numbers in a file; MATLAB stores the narrowest that fits.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# Types of arrays; the others are cells, structures, text and sparse arrays.
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x800


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read the real numeric arrays of a file, by name.

    Raises ValueError, KeyError, struct.error or zlib.error for a truncated or damaged file and a decompression bomb.
    """
    found: dict[str, np.ndarray] = {}
    length = file.stat().st_size
    with file.open("rb") as stream:
        order = {b"IM": "<", b"MI": ">"}[stream.read(128)[126:]]
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
                found.update(_parse_matrix(data, order))
    return found


def _parse_matrix(data: bytes, order: str) -> dict[str, np.ndarray]:
    """Return the array of a matrix by its name; nothing if it is not real and numeric."""
    elements = _elements(data, order)
    _, at, _ = next(elements)
    (flags,) = struct.unpack_from(f"{order}I", data, at)
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX:
        return {}
    (_, at, size), (_, name_at, name_size), (stored, start, data_size) = islice(elements, 3)
    shape = struct.unpack_from(f"{order}{size // 4}i", data, at)
    name = data[name_at : name_at + name_size].decode("latin-1")
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
        if kind >> 16:
            # The small format: size and type in the first four bytes, the data in the next four.
            yield kind & 0xFFFF, at + 4, kind >> 16
            at += 8
        else:
            yield kind, at + 8, size
            at += 8 + -(-size // 8) * 8
