"""What libraries raise at files that are damaged, hostile or of another kind: one list for everything that reads."""

from __future__ import annotations

import lzma
import pickle
import struct
import tarfile
import tokenize
import zipfile
import zlib

from PIL import Image

UNREADABLE: tuple[type[Exception], ...] = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(lzma.LZMAError, pickle.UnpicklingError, struct.error, tarfile.TarError, tokenize.TokenError, zlib.error),
    *(zipfile.BadZipFile, Image.DecompressionBombError),
)
"""A `UserError` is one of them, as a ValueError: where one can come, it is raised again."""
