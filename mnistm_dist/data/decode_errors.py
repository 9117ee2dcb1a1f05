"""The errors that libraries raise when a file is damaged, hostile or of another format, and how a user sees them."""

from __future__ import annotations

import contextlib
import lzma
import pickle
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator

from PIL import Image

from mnistm_dist.errors import UserError, os_error_reason

UNREADABLE: tuple[type[Exception], ...] = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(lzma.LZMAError, pickle.UnpicklingError, struct.error, tarfile.TarError, tokenize.TokenError, zlib.error),
    *(zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""A `UserError` is a ValueError: code that catches these must raise a `UserError` again."""


@contextlib.contextmanager
def explain_decode_errors(origin: object, expected: str, *extra: type[Exception]) -> Iterator[None]:
    """Turn an error of a library's reader into a `UserError`: ``ORIGIN: damaged or not EXPECTED (REASON)``.

    ``extra`` are further exceptions of one library. A `UserError` of the block passes through.
    """
    try:
        yield
    except UserError:
        raise
    except (*UNREADABLE, *extra) as error:
        problem = "cannot be read" if getattr(error, "errno", None) else f"damaged or not {expected}"
        raise UserError(f"{origin}: {problem} ({' '.join(os_error_reason(error).split())[:120]})") from error
