"""Numeric arrays of MATLAB 5 files, read by a reader of our own.

"MAT-File Format" (The MathWorks, version R2016b), chapter 1: a header of 128 bytes, then elements of a type, a size and
data, padded to 8 bytes; a matrix is an element of elements (flags, dimensions, name, numbers), compressed by zlib or
not. scipy reads such files too, but it ended the whole process (a segmentation fault, scipy 1.17.1) at a few changed
bytes, which a file from anywhere may hold.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mnistm_dist.data.sources.archives import check_expansion

_HEADER = 128
_HEAD = 1_024
_MATRIX, _COMPRESSED = 14, 15
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x800
_MAX_DIMENSIONS = 32


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One numeric array of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    """Of its numbers in the file, which may be a narrower one."""
    start: int
    """Where its element's data begin in the file."""
    size: int
    """Bytes of them there."""
    compressed: bool
    skipped: int
    """Bytes of them, decompressed, before the numbers."""


def variables(file: Path) -> dict[str, Variable]:
    """The numeric arrays of a file, by name; cells, structures, text, sparse and complex ones are passed over.

    Raises ValueError for a file that is cut short or that makes no sense, UserError for one that unpacks without end.
    """
    found: dict[str, Variable] = {}
    length = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(_HEADER)
        order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
        if order is None:
            raise ValueError("no header of MATLAB 5")
        at = _HEADER
        while at < length:
            stream.seek(at)
            tag = stream.read(8)
            if len(tag) < 8:
                raise ValueError(f"cut short at byte {at}")
            kind, size = struct.unpack(order + "II", tag)
            if size > length - at - 8:
                raise ValueError(f"cut short in the element at byte {at}")
            if kind in (_MATRIX, _COMPRESSED):
                packed = stream.read(min(size, _HEAD))
                named = _variable(packed, order, start=at + 8, size=size, compressed=kind == _COMPRESSED)
                if named is not None:
                    check_expansion(f"{file}: {named[0]}", size, prod(named[1].shape) * named[1].stored.itemsize)
                    found[named[0]] = named[1]
            # What is compressed is not padded.
            at += 8 + (size if kind == _COMPRESSED else -(-size // 8) * 8)
    return found


def read(file: Path, variable: Variable) -> np.ndarray:
    """The array of a `Variable` of a file. Raises ValueError and zlib.error where it is damaged."""
    count = prod(variable.shape)
    needed = variable.skipped + count * variable.stored.itemsize
    with file.open("rb") as stream:
        stream.seek(variable.start)
        data = stream.read(variable.size)
    if variable.compressed:
        inflater = zlib.decompressobj()
        # Up to the checksum at its end: a matrix ends with its numbers, and at most 7 bytes of padding.
        data = inflater.decompress(data, needed + 8)
        if not inflater.eof:
            raise ValueError("its compressed data are cut short or go on beyond its numbers")
    if len(data) < needed:
        raise ValueError(f"{len(data)} bytes where its shape needs {needed}")
    numbers = np.frombuffer(data, variable.stored, count=count, offset=variable.skipped)
    return numbers.reshape(variable.shape, order="F").astype(variable.dtype, order="K", copy=False)


def _variable(packed: bytes, order: str, *, start: int, size: int, compressed: bool) -> tuple[str, Variable] | None:
    head, skipped = packed, 0
    if compressed:
        head = zlib.decompressobj().decompress(packed, _HEAD)
        kind, _, skipped, _ = _element(head, 0, order)
        if kind != _MATRIX:
            return None
    _, flags_size, flags_at, after = _element(head, skipped, order)
    (flags,) = struct.unpack_from(order + "I", head, flags_at)
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX or flags_size != 8:
        return None
    _, dimensions_size, dimensions_at, after = _element(head, after, order)
    if not 0 < dimensions_size // 4 <= _MAX_DIMENSIONS:
        raise ValueError(f"an array of {dimensions_size // 4} dimensions")
    shape = struct.unpack_from(f"{order}{dimensions_size // 4}i", head, dimensions_at)
    _, name_size, name_at, after = _element(head, after, order)
    name = head[name_at : name_at + name_size].decode("latin-1")
    stored, data_size, data_at, _ = _element(head, after, order)
    if stored not in _STORED or min(shape) < 0:
        raise ValueError(f"an array of shape {shape} in numbers of type {stored}")
    dtype = np.dtype(order + _STORED[stored])
    if data_size != prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} in {data_size} bytes")
    return name, Variable(
        shape=shape,
        dtype=np.dtype(_CLASSES[flags & 0xFF]),
        stored=dtype,
        start=start,
        size=size,
        compressed=compressed,
        skipped=data_at,
    )


def _element(data: bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """Type and size of an element, where its data begin, and where the next element does."""
    (first,) = struct.unpack_from(order + "I", data, at)
    if first >> 16:
        # The small format: size and type in the first four bytes, the data in the next four.
        return first & 0xFFFF, first >> 16, at + 4, at + 8
    (size,) = struct.unpack_from(order + "I", data, at + 4)
    return first, size, at + 8, at + 8 + -(-size // 8) * 8
