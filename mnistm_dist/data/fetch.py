"""Files from servers (https, http and s3, by fsspec) into the cache: retried, bounded, and checked.

1. `fetch_file`: one file. It is written to ``NAME.partial`` and renamed when its size and checksum are right. After an
   interruption, in this call or an earlier one, it continues where it ended.
2. `fetch_set`: the packed set at an address; `open_shards`: a packed set, in a folder or at an address.
"""

import contextlib
import hashlib
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mnistm_dist.data.cache import cache_entry, cache_errors
from mnistm_dist.data.manifest import MANIFEST_NAME, SetFile, parse
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.shards import OK, ShardSet, examine_all
from mnistm_dist.errors import UserError, import_optional
from mnistm_dist.files import fsync_path, write_atomic

SCHEMES = ("https", "http", "s3")  # the schemes of addresses that can be fetched
TRIES = 5  # failures in a row, without a byte received, after which a file is given up
FIRST_PAUSE = 0.2  # seconds before the second try; doubled before each further one

_PIECE = 1 << 20
_S3_BLOCK = 8 << 20
_CONNECT_SECONDS, _SILENCE_SECONDS = 20, 60
_MAX_BYTES = 16 << 30  # largest file of unknown size: a server that never stops sending is cut off
_MAX_MANIFEST = 256 << 20
_CONNECTIONS = 8
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"{")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on a server, with its size and checksum if they are known."""

    address: str
    size: int | None = None
    """Bytes."""
    checksum: tuple[str, str] | None = None
    """Name of the hash and its hexadecimal value."""


class Interrupted(UserError):
    """A connection failed; another try may succeed."""


def split_address(address: str, alternative: str) -> SplitResult:
    """Return the parts of an address that can be fetched.

    Raises `UserError` for any other text, with the ``alternative`` that is accepted in place of an address.
    """
    with contextlib.suppress(ValueError):  # brackets around what is not an IPv6 address
        parts = urlsplit(address)
        if parts.scheme in SCHEMES and parts.netloc:
            return parts
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise UserError(f"{address}: expected {alternative} or an address of {known}")


def fetch_file(file: RemoteFile, target: Path, report: Callable[[int], None]) -> None:
    """Fetch a file to ``target`` unless it is there already.

    ``report(bytes)`` is called with the bytes received, and with a negative number if they turn out to be wrong. Raises
    `UserError`: no connection, no such file, a web page in its place, another size or checksum, a full disk.
    """
    if _is_right(file, target):
        report(_size(target))
        return
    partial = target.with_name(f"{target.name}.partial")
    earlier = _size(partial)
    report(earlier)
    with cache_errors(partial, (file.size or 0) - earlier):
        _retry(file.address, lambda: _append(file, partial, report), received=lambda: _size(partial))
        if _is_right(file, partial):
            fsync_path(partial)
            partial.replace(target)
            return
        wrong = _size(partial)
        partial.unlink()
    report(-wrong)
    if earlier:  # the earlier part may be wrong
        fetch_file(file, target, report)
    elif wrong < (file.size or 1):
        expected = f" of the expected {file.size:,}" if file.size else ""
        raise UserError(f"{file.address}: it ends after {wrong:,} bytes{expected}")
    else:
        name, _ = file.checksum or ("content", "")
        raise UserError(f"{file.address}: its {name} is not the expected one: the server sends another file")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_right(file: RemoteFile, path: Path) -> bool:
    """Return whether ``path`` is there, not empty, and has the known size and checksum."""
    size = _size(path)
    if size == 0 or size != (file.size or size) or file.checksum is None:
        return 0 < size == (file.size or size)
    name, value = file.checksum
    with cache_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest() == value


def _retry(address: str, attempt: Callable[[], Any], received: Callable[[], int] = lambda: 0) -> Any:
    """Return the result of ``attempt``, repeated while it is `Interrupted`, with growing pauses.

    Raises it after `TRIES` failures in a row in which ``received()`` did not grow.
    """
    failures, before = 0, received()
    while True:
        try:
            return attempt()
        except Interrupted as error:
            failures, before = 1 if received() > before else failures + 1, received()
            if failures == TRIES:
                reason = f"the connection failed {failures} times in a row ({error})"
                raise Interrupted(f"{address}: {reason}; try again later") from error
        time.sleep(FIRST_PAUSE * 2 ** (failures - 1))


def _append(file: RemoteFile, partial: Path, report: Callable[[int], None]) -> None:
    """Append to ``partial`` what one connection sends. Raises `Interrupted` if more may come."""
    start = _size(partial)
    with partial.open("ab") as target:
        for piece in _read(file.address, file.size or _MAX_BYTES, start, file.size):
            if target.tell() == 0 and file.checksum is None and piece.lstrip()[:9].lower().startswith(_PAGES):
                raise UserError(f"{file.address}: it sends a page of text")
            target.write(piece)
            report(len(piece))
    if start < _size(partial) < (file.size or 0):
        raise Interrupted("the server ended the connection early")


def _read(address: str, limit: int, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from ``start`` on, as the server sends them. A known ``size`` saves a request.

    Raises `Interrupted`, and `UserError` if there is no such file, access is denied, or it is longer than ``limit``.
    """
    errors: tuple[type[Exception], ...] = (OSError, importlib.import_module("aiohttp").ClientError)
    if address.startswith("s3:"):
        import_optional("s3fs", "an s3:// address", "s3")
        botocore = importlib.import_module("botocore.exceptions")
        errors = (OSError, botocore.BotoCoreError, botocore.ClientError)
    try:
        with _open_remote(address, start, size) as file:
            while piece := file.read(_PIECE):
                start += len(piece)
                if start > limit:
                    raise UserError(f"{address}: longer than {limit:,} bytes, the largest accepted size")
                yield piece
    except FileNotFoundError as error:
        raise UserError(f"{address}: the server has no such file") from error
    except errors as error:
        status = getattr(error, "status", 0)
        reason = " ".join(str(error).split()) or type(error).__name__
        if status == 416:
            return  # the file ends before ``start``
        if isinstance(error, PermissionError) or (400 <= status < 500 and status not in (408, 429)):
            raise UserError(f"{address}: the server denies access ({reason})") from error
        raise Interrupted(reason) from error


def _open_remote(address: str, start: int, size: int | None) -> Any:
    import fsspec

    if address.startswith("s3:"):
        file = fsspec.filesystem("s3").open(address, "rb", size=size, block_size=_S3_BLOCK)
        file.seek(start)
        return file
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    # trust_env: clusters name their proxies by environment variables.
    files = fsspec.filesystem(urlsplit(address).scheme, client_kwargs={"timeout": timeout, "trust_env": True})
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    # A stream, so that no more than a piece is ever held, whatever the server sends. With a size, fsspec does not ask
    # for it.
    file = files.open(address, "rb", block_size=0, size=size or 1, headers=headers)
    # A server that does not support ranges sends the file from its beginning.
    while start and file.r.status != 206 and (skipped := file.read(min(start, _PIECE))):
        start -= len(skipped)
    return file


def is_address(shards: str) -> bool:
    """Return whether ``shards`` is meant as an address, not as a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", shards) is not None and not Path(shards).exists()


def open_shards(shards: str, *, cache_dir: Path, progress: Progress | None = None) -> ShardSet:
    """Open a packed set: a folder, or an ``https://``, ``http://`` or ``s3://`` address, fetched once per node.

    ``progress(done, total)`` counts bytes fetched. Raises `UserError`.
    """
    return ShardSet.open(fetch_set(shards, cache_dir, progress) if is_address(shards) else shards)


def fetch_set(address: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Fetch the packed set at ``address`` into the cache, once per node, and return its folder there.

    ``progress(done, total)`` counts bytes. A set that was fetched before opens without its server. Raises `UserError`
    naming the file: an address of another kind, no manifest there, a server that cannot be reached or sends other files
    than the manifest says, a full disk.
    """
    parts = split_address(address, "a folder")
    if parts.query or parts.fragment or parts.password is not None:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: use an address without password, query and fragment"
        )
    base = address.rstrip("/")
    name = hashlib.sha256(base.encode()).hexdigest()[:16]
    with cache_entry(cache_dir, "fetched", name) as folder:
        url, stored = f"{base}/{MANIFEST_NAME}", folder / MANIFEST_NAME
        try:
            data = _retry(url, lambda: b"".join(_read(url, _MAX_MANIFEST)))
        except Interrupted:
            if not stored.exists():
                raise
            data = stored.read_bytes()
        manifest = parse(data, url)
        claims = ShardSet(root=folder, manifest=manifest).files(manifest.splits)
        findings = examine_all(claims, record=folder / "checked.json")
        files = zip(claims.items(), findings, strict=True)
        missing = {path: claim for (path, claim), finding in files if finding.status != OK}
        wanted, total = (sum(claim.size for claim in some.values()) for some in (missing, claims))
        with cache_errors(stored, wanted):
            _fetch_claims(base, missing, total - wanted, total, progress)
            write_atomic(stored, data)
    return folder


def _fetch_claims(base: str, claims: dict[Path, SetFile], done: int, total: int, progress: Progress | None) -> None:
    lock = threading.Lock()

    def report(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    def fetch_one(path: Path, claim: SetFile) -> None:
        file = RemoteFile(address=f"{base}/{claim.name}", size=claim.size, checksum=("sha256", claim.sha256))
        fetch_file(file, path, report)

    report(0)
    with ThreadPoolExecutor(_CONNECTIONS, "fetch") as pool:
        list(pool.map(fetch_one, claims.keys(), claims.values()))
