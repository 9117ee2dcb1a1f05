"""One file on a server: its bytes from any place on, and its download into a checked local file.

https, http and s3 through fsspec. It hides which errors a connection can end in; here they become two: `Cut`,
after which it pays to try again, and `UserError`. A file is fetched into ``NAME.partial``, after a cut, in this call or
an earlier one, it goes on where it ended, and it gets its name when its size and checksum are right.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import fsspec

from mnistm_dist.data.cache import cache_failures, entry_lock, make_entry, make_room, write_whole
from mnistm_dist.data.integrity import WHOLE, FileClaim, examine
from mnistm_dist.data.manifest import MANIFEST_NAME, Manifest, parse
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.shards import ShardSet
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
_MAX_BYTES = 16 << 30
"""No file of unknown size is larger: a server that sends for ever is stopped."""
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"{")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file on a server, and what is known of it beforehand."""

    address: str
    size: int | None = None
    """Bytes."""
    checksum: tuple[str, str] | None = None
    """Name of the hash, and its hexadecimal value."""


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
    server: Server,
    file: RemoteFile,
    target: Path,
    tell: Callable[[int], None],
    stop: threading.Event | None = None,
) -> None:
    """Brings one file to ``target``; one of which nothing is known is whole where the server ends it.

    ``tell(bytes)`` hears what has come, less than none where it turns out to be wrong; ``stop`` ends it early, and what
    has come then stays. Raises `UserError`.
    """
    stop = stop or threading.Event()
    partial = target.with_name(f"{target.name}.partial")
    earlier = partial.stat().st_size if partial.exists() else 0
    # What an earlier call left behind may be what is wrong: then all is fetched anew.
    for start in (earlier, 0) if earlier else (0,):
        tell(start)
        make_room(target.parent, (file.size or 0) - start)
        end = _fetch(server, file, partial, start, tell, stop)
        if stop.is_set():
            return
        if not end or end < (file.size or 0):
            expected = f" of the expected {file.size:,}" if file.size is not None else ""
            raise UserError(f"{file.address}: it ends after {end:,} bytes{expected}")
        if is_right(file, partial):
            with cache_failures(partial):
                partial.replace(target)
            return
        with cache_failures(partial):
            partial.unlink()
        tell(-end)
    assert file.checksum is not None
    name, value = file.checksum
    raise UserError(f"{file.address}: its {name} is not the expected {value}: the server sends another file")


def is_right(file: RemoteFile, path: Path) -> bool:
    """Whether ``path`` is what is known of the file; anything but nothing, where nothing is known."""
    with cache_failures(path), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0 or size != (file.size or size):
            return False
        if file.checksum is None:
            return True
        name, value = file.checksum
        return hashlib.file_digest(stream, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest() == value


def _fetch(
    server: Server, file: RemoteFile, partial: Path, start: int, tell: Callable[[int], None], stop: threading.Event
) -> int:
    """Writes what comes from ``start`` on, trying again as long as something comes; gives where it ended."""
    tries = 0
    while start < (file.size or _MAX_BYTES) and not stop.is_set():
        end, cut = _append(server, file, partial, start, tell, stop)
        if cut is None and (file.size is None or end == start):
            return end
        tries = 0 if end > start else tries + 1
        if tries == TRIES:
            kept = f"; the {end:,} bytes that have come are kept: try again" if end else ""
            raise UserError(f"{file.address}: the connection failed {tries} times in a row ({cut}){kept}")
        if tries:
            stop.wait(FIRST_PAUSE * 2 ** (tries - 1))
        start = end
    return start


def _append(
    server: Server, file: RemoteFile, partial: Path, start: int, tell: Callable[[int], None], stop: threading.Event
) -> tuple[int, Cut | None]:
    """Writes what one connection brings; gives where it ended and, unless the server ended it, why."""
    end, limit = start, file.size or _MAX_BYTES
    with cache_failures(partial, file.size), partial.open("r+b" if start else "wb") as target:
        target.seek(start)
        try:
            for piece in server.read(file.address, start, file.size):
                if end == 0 and file.checksum is None and piece.lstrip()[:9].lower().startswith(_PAGES):
                    raise UserError(f"{file.address}: it sends a page of text")
                if end + len(piece) > limit:
                    raise UserError(f"{file.address}: longer than {limit:,} bytes, the most that it may have")
                target.write(piece)
                end += len(piece)
                tell(len(piece))
                if stop.is_set():
                    break
        except Cut as cut:
            return end, cut
        finally:
            target.flush()
            os.fsync(target.fileno())
    return end, None


_MANIFEST_LIMIT = 256 << 20
"""Bytes: no manifest is larger, and a server that sends for ever is stopped."""
_CONNECTIONS = 8


def is_address(shards: str) -> bool:
    """Whether ``shards`` is meant as an address, not as a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", shards) is not None and not Path(shards).exists()


def fetch(address: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Brings the packed set at ``address`` into the cache, once per node, and gives its folder there.

    ``progress(done, total)`` counts bytes. Raises `UserError` in one line that names the file: an address of
    another kind, no manifest there, a server that cannot be reached or sends something else than the manifest
    says, a full disk.
    """
    parts = split_address(address)
    if parts is None:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise UserError(f"{address}: shards are not read from there; accepted are a folder and addresses of {known}")
    if parts.query or parts.fragment or parts.password is not None:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a plain address is needed, without password, ? and #"
        )
    base = address.rstrip("/")
    name = hashlib.sha256(base.encode()).hexdigest()[:16]
    with entry_lock(cache_dir, "fetched", name):
        folder = make_entry(cache_dir, "fetched", name, {"source": base})
        server = Server(parts.scheme)
        data, manifest = _fetch_manifest(server, base, folder)
        shards = ShardSet(root=folder, manifest=manifest)
        claims = shards.files(manifest.splits)
        try:
            shards.check(manifest.splits, record=folder / "checked.json")
        except UserError:
            # Not whole yet. What is there is hashed, and fetched again where it is damaged.
            missing = [claim for claim in claims if examine(claim).status != WHOLE]
            make_room(folder, sum(claim.size for claim in missing))
            _fetch_files(server, base, missing, sum(claim.size for claim in claims), progress)
        with cache_failures(folder):
            write_whole(folder / MANIFEST_NAME, data)
    return folder


def _fetch_manifest(server: Server, base: str, folder: Path) -> tuple[bytes, Manifest]:
    address = f"{base}/{MANIFEST_NAME}"
    earlier = folder / MANIFEST_NAME
    try:
        data = read_small(server, address, _MANIFEST_LIMIT)
    except Cut as cut:
        if not earlier.exists():
            raise UserError(f"{address}: the server cannot be reached ({cut})") from cut
        with cache_failures(earlier):
            data = earlier.read_bytes()
    return data, parse(data, address)


def _fetch_files(server: Server, base: str, missing: list[FileClaim], total: int, progress: Progress | None) -> None:
    done = total - sum(claim.size for claim in missing)
    lock, stop = threading.Lock(), threading.Event()

    def tell(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    tell(0)
    with ThreadPoolExecutor(max_workers=_CONNECTIONS, thread_name_prefix="fetch") as pool:
        tasks = []
        for claim in missing:
            address, checksum = f"{base}/{claim.path.name}", ("sha256", claim.sha256)
            file = RemoteFile(address=address, size=claim.size, checksum=checksum)
            tasks.append(pool.submit(download, server, file, claim.path, tell, stop))
        try:
            for task in as_completed(tasks):
                task.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
