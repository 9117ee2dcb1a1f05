"""The index of a split: a row per sample in storage order, which says where its PNG lies; an ``.npy`` of format 1.0.

Its header is written and read here, byte for byte: NumPy's own has differed between its versions, which would give one
set two sums, and its reader of headers raises whatever it likes at a damaged one.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mnistm_dist.data.progress import AGAIN
from mnistm_dist.errors import UserError

_MAGIC = b"\x93NUMPY\x01\x00"
_KEY_LENGTH = re.compile(rb"'key', '\|S([1-9][0-9]?)'")
_HEAD = 256
"""Bytes; no header is longer."""


def index_dtype(key_length: int) -> np.dtype:
    """The row of an index: key, offset of the PNG's bytes within the shard (bytes), their size (bytes), label."""
    return np.dtype([("key", f"S{key_length}"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])


def index_bytes(rows: np.ndarray) -> bytes:
    """The file of an index: rows of `index_dtype`, shape (count,)."""
    return _header(rows.dtype, len(rows)) + rows.tobytes()


def open_index(path: Path, *, count: int, size: int) -> np.ndarray:
    """Maps an index of ``count`` rows and ``size`` bytes read-only: `index_dtype`, (count,).

    Raises `UserError` where the file is missing, of another size, or no such index; its rows are not looked at.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path}: {found:,} bytes, the manifest says {size:,}: {AGAIN}")
        with path.open("rb") as file:
            head = file.read(_HEAD)
        key = _KEY_LENGTH.search(head)
        dtype = index_dtype(int(key[1]) if key else 1)
        header = _header(dtype, count)
        if not head.startswith(header) or size != len(header) + count * dtype.itemsize:
            raise UserError(f"{path}: not an index of {count:,} samples: {AGAIN}")
        return np.memmap(path, dtype=dtype, mode="r", offset=len(header), shape=(count,))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from error


def _header(dtype: np.dtype, count: int) -> bytes:
    text = f"{{'descr': {dtype.descr}, 'fortran_order': False, 'shape': ({count},), }}".encode("ascii")
    # Padded so that the rows start at a multiple of 64 bytes.
    text += b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % 64) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text
