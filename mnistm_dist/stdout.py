"""A door's result on standard output, for a pipe or a file: whole, or one line says why not."""

from __future__ import annotations

import os
import sys

from mnistm_dist.errors import UserError


def write_result(text: str) -> None:
    """Text to stdout; a reader that has seen enough (``| head``) is no mistake. Raises `UserError` for a full disk."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as error:
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(
                f"standard output: cannot be written ({error.strerror}), what is there is not whole; "
                "free some space, or send it elsewhere"
            ) from error
