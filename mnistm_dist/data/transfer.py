"""One file on a server: its bytes from any place on, and its download into a checked local file.

https, http and s3 through fsspec. It hides which errors a connection can end in; here they become two: `Cut`,
after which it pays to try again, and `UserError`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import fsspec

from mnistm_dist.data.cache import cache_failures
from mnistm_dist.data.wholeness import FileClaim
from mnistm_dist.errors import UserError

SCHEMES = ("https", "http", "s3")
"""The schemes of addresses that can be fetched."""

TRIES = 5
"""Tries in a row that bring nothing before a transfer is given up."""
FIRST_PAUSE = 0.2
"""Seconds before the second try; doubled before each further one."""

_PIECE = 1 << 20
_BLOCK = 8 << 20
_CONNECT_SECONDS, _SILENCE_SECONDS = 20, 60


def split_address(address: str) -> SplitResult | None:
    """The parts of an address that can be fetched, by its form; None of any other text."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return None  # brackets around what is no IPv6 address
    return parts if parts.scheme in SCHEMES and parts.netloc else None


class Cut(Exception):
    """A transfer that ended early; another try may go on from there."""


class Server:
    """A connection to whatever serves one scheme. Safe to use from many threads.

    Raises `UserError` where the package for the scheme is not installed.
    """

    def __init__(self, scheme: str) -> None:
        if scheme == "s3":
            try:
                self._files = fsspec.filesystem("s3")
                refusals = importlib.import_module("botocore.exceptions")
            except ImportError as error:
                raise UserError("s3:// addresses need the package s3fs: pip install 'mnistm-dist[s3]'") from error
            self._errors: tuple[type[Exception], ...] = (OSError, refusals.BotoCoreError, refusals.ClientError)
            return
        import aiohttp

        self._errors = (OSError, aiohttp.ClientError, TimeoutError)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        # trust_env: the proxies of a cluster are named by environment variables.
        self._files = fsspec.filesystem(scheme, client_kwargs={"timeout": timeout, "trust_env": True})

    def read(self, address: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Yields the bytes of a file from ``start`` on, until the server ends it; a known ``size`` spares
        asking for it.

        Fewer or more than ``size - start`` may come from a server whose file is another. Raises `Cut`, and
        `UserError` where there is no such file or it may not be read.
        """
        try:
            with self._open(address, start, size) as file:
                while piece := file.read(_PIECE):
                    yield piece
        except FileNotFoundError as error:
            raise UserError(f"{address}: the server has no such file") from error
        except PermissionError as error:
            raise UserError(f"{address}: the server refuses it ({_words(error)})") from error
        except self._errors as error:
            status = getattr(error, "status", 0)
            if status == 416:
                return  # nothing from there on: the file is shorter
            if 400 <= status < 500 and status not in (408, 429):
                raise UserError(f"{address}: the server refuses it ({_words(error)})") from error
            raise Cut(_words(error)) from error

    def _open(self, address: str, start: int, size: int | None) -> Any:
        if "http" not in self._files.protocol:
            file = self._files.open(address, "rb", size=size, block_size=_BLOCK)
            file.seek(start)
            return file
        # A plain stream: no more than a piece is ever held, whatever the server sends. Any size keeps fsspec
        # from asking.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        file = self._files.open(address, "rb", block_size=0, size=size or 1, headers=headers)
        if start and file.r.status != 206:
            # A server that knows no ranges begins anew.
            while start and (skipped := file.read(min(start, _PIECE))):
                start -= len(skipped)
        return file


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_small(server: Server, address: str, limit: int) -> bytes:
    """All bytes of a file of up to ``limit``; begins anew where it is cut. Raises `Cut` and `UserError`."""
    tries = 0
    while True:
        data = b""
        try:
            for piece in server.read(address):
                data += piece
                if len(data) > limit:
                    raise UserError(f"{address}: longer than {limit:,} bytes, the most that it may have")
            return data
        except Cut:
            tries += 1
            if tries == TRIES:
                raise
        time.sleep(FIRST_PAUSE * 2 ** (tries - 1))


def download(
    server: Server, address: str, claim: FileClaim, tell: Callable[[int], None], stop: threading.Event
) -> None:
    """Brings one file to ``claim.path`` once its size and sha256 are the claimed ones; goes on from an earlier
    ``.partial``.

    ``tell(bytes)`` hears what has come, ``stop`` ends it early, what has come then stays. Raises `UserError`.
    """
    partial = claim.path.with_name(f"{claim.path.name}.partial")
    start = min(partial.stat().st_size, claim.size) if partial.exists() else 0
    from_earlier = start > 0
    tell(start)
    tries = 0
    while True:
        while start < claim.size:
            end, cut = _append(server, address, claim, partial, start, tell, stop)
            if stop.is_set():
                return
            tries = 0 if end > start else tries + 1
            if end == start and cut is None:
                raise UserError(f"{address}: it ends after {end:,} of the manifest's {claim.size:,} bytes")
            if tries == TRIES:
                raise UserError(
                    f"{address}: the connection failed {tries} times in a row ({cut}); what has come is kept: try again"
                )
            if tries:
                stop.wait(FIRST_PAUSE * 2 ** (tries - 1))
            start = end
        with cache_failures(partial), partial.open("rb") as file:
            right = hashlib.file_digest(file, "sha256").hexdigest() == claim.sha256
        if right:
            with cache_failures(partial):
                partial.replace(claim.path)
            return
        partial.unlink()
        if not from_earlier:
            raise UserError(f"{address}: its sha256 is not the manifest's: the server sends another file")
        # The earlier part may be what is wrong.
        from_earlier = False
        tell(-start)
        start = 0


def _append(
    server: Server,
    address: str,
    claim: FileClaim,
    partial: Path,
    start: int,
    tell: Callable[[int], None],
    stop: threading.Event,
) -> tuple[int, Cut | None]:
    """Writes what comes from ``start`` on; gives where it ended and, unless the server ended it, why."""
    end = start
    with cache_failures(partial, claim.size), partial.open("r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        try:
            for piece in server.read(address, start, claim.size):
                if end + len(piece) > claim.size:
                    raise UserError(f"{address}: longer than the manifest's {claim.size:,} bytes")
                file.write(piece)
                end += len(piece)
                tell(len(piece))
                if stop.is_set():
                    break
        except Cut as cut:
            return end, cut
        finally:
            file.flush()
            os.fsync(file.fileno())
    return end, None
