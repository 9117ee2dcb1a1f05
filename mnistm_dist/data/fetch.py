"""Files from servers (by fsspec: https, http, s3, gs and hf) into the cache: retried, bounded, and checked.

1. `fetch_file`: one file. It is written to ``NAME.partial`` and renamed when its size and checksum are right. After an
   interruption, in this call or an earlier one, it continues where it ended.
2. `fetch_set`: the packed set at an address; `open_shards`: a packed set, in a folder or at an address.
"""

import contextlib
import functools
import hashlib
import pkgutil
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mnistm_dist.data.cache import cache_entry, cache_errors
from mnistm_dist.data.manifest import MANIFEST_NAME, SetFile, parse
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.shards import OK, ShardSet, examine_all
from mnistm_dist.errors import UserError, import_optional
from mnistm_dist.files import fsync_path, refuse_pointer, write_atomic

# The schemes of addresses that can be fetched: the package that reads them, which the extra of this name installs, and
# what it raises beside `OSError`.
SCHEMES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "https": ("aiohttp", ("aiohttp:ClientError",)),
    "http": ("aiohttp", ("aiohttp:ClientError",)),
    "s3": ("s3fs", ("botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError")),
    "gs": ("gcsfs", ("gcsfs.retry:HttpError", "aiohttp:ClientError", "google.auth.exceptions:GoogleAuthError")),
    "hf": ("huggingface_hub", ("huggingface_hub.errors:HTTPError",)),
}
TRIES = 5  # failures in a row, without a byte received, after which a file is given up
FIRST_PAUSE = 0.2  # seconds before the second try; doubled before each further one
LONGEST_WAIT = 600  # seconds that a file may wait for a server that asks for it (Retry-After), in all

Say = Callable[[str], None]  # called with a line for the user

_PIECE = 1 << 20
_BLOCK = 8 << 20  # bytes per request to a store of objects
_CONNECT_SECONDS, _SILENCE_SECONDS = 20, 60
_MAX_BYTES = 16 << 30  # largest file of unknown size: a server that never stops sending is cut off
_MAX_MANIFEST = 256 << 20
_CONNECTIONS = 8
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"{")
# What to do if access is denied.
_LOGIN = {
    "https": "put user and password into ~/.netrc",
    "http": "put user and password into ~/.netrc",
    "s3": "log in; for a public bucket set FSSPEC_S3_ANON=true, if the reader pays FSSPEC_S3_REQUESTER_PAYS=true",
    "gs": "log in with gcloud auth application-default login",
    "hf": "log in with hf auth login",
}


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


def fetch_file(file: RemoteFile, target: Path, report: Callable[[int], None], say: Say) -> None:
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
        with partial.open("ab") as stream:
            for piece in _read(file.address, file.size or _MAX_BYTES, say, earlier, file.size):
                if stream.tell() == 0:
                    refuse_pointer(file.address, piece)
                    if file.checksum is None and piece.lstrip()[:9].lower().startswith(_PAGES):
                        raise UserError(f"{file.address}: it sends a page of text")
                stream.write(piece)
                report(len(piece))
        if _is_right(file, partial):
            fsync_path(partial)
            partial.replace(target)
            return
        wrong = _size(partial)
        partial.unlink()
    report(-wrong)
    if earlier:  # the earlier part may be wrong
        fetch_file(file, target, report, say)
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


def _read(address: str, limit: int, say: Say, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from ``start`` on; a known ``size`` saves a request.

    A failed connection is repeated with growing pauses, or when the server asks for it, from where it ended. Raises
    `Interrupted` after `TRIES` failures in a row without a byte, and after `LONGEST_WAIT`; `UserError` if there is no
    such file, access is denied, or it is longer than ``limit``.
    """
    scheme = urlsplit(address).scheme
    package, raised = SCHEMES[scheme]
    import_optional(package, f"an address of {scheme}://", scheme)
    errors: tuple[type[Exception], ...] = (OSError, *map(pkgutil.resolve_name, raised))
    failures, waited = 0, 0.0
    while True:
        first, wait, status, reason = start, 0.0, 0, "the server ended the connection early"
        try:
            with _open_remote(address, start, size) as file:
                while piece := file.read(_PIECE):
                    start += len(piece)
                    failures = 0
                    if start > limit:
                        raise UserError(f"{address}: longer than {limit:,} bytes, the largest accepted size")
                    yield piece
            if start == first or start >= (size or 0):
                return
        except FileNotFoundError as error:
            raise UserError(f"{address}: the server has no such file") from error
        except errors as error:
            status = getattr(error, "status", 0)
            reason, wait = " ".join(str(error).split()) or type(error).__name__, _retry_after(error)
            if status == 416:
                return  # the file ends before ``start``
            if isinstance(error, PermissionError) or (400 <= status < 500 and status not in (408, 429)):
                raise UserError(f"{address}: the server denies access ({reason}); {_LOGIN[scheme]}") from error
        waited, failures = waited + wait, failures + (wait == 0)
        if failures == TRIES:
            raise Interrupted(f"{address}: the connection failed {failures} times in a row ({reason}); try again later")
        if waited > LONGEST_WAIT:
            raise Interrupted(f"{address}: the server is busy and asks to wait for {wait:,.0f} s; try again later")
        if wait:
            say(f"{urlsplit(address).netloc} is busy (status {status}): waiting {wait:.0f} s, as it asks")
        time.sleep(wait or FIRST_PAUSE * 2 ** (failures - 1))


def _retry_after(error: Exception) -> float:
    """Return how many seconds a server asks to wait (RFC 9110, 10.2.3), 0 if it does not."""
    text = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    with contextlib.suppress(TypeError, ValueError):
        return float(text) if text.isdecimal() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _open_remote(address: str, start: int, size: int | None, *, ranges: bool = True) -> Any:
    import fsspec

    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        file = fsspec.filesystem(parts.scheme).open(address, "rb", size=size, block_size=_BLOCK)
        file.seek(start)
        return file
    import aiohttp

    # Content-Encoding: gzip of a file that is named so describes the file: it is not undone.
    is_gzip = parts.path.endswith((".gz", ".tgz"))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    # trust_env: clusters name their proxies by environment variables.
    client = {"timeout": timeout, "trust_env": True, "auto_decompress": not is_gzip}
    files = fsspec.filesystem(parts.scheme, client_kwargs=client)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start and ranges else {})}
    # A stream, so that no more than a piece is ever held, whatever the server sends. With a size, fsspec does not ask
    # for it.
    file = files.open(address, "rb", block_size=0, size=size or 1, headers=headers)
    if file.r.status == 206 and "Content-Encoding" in file.r.headers and not is_gzip:
        file.close()
        return _open_remote(address, start, size, ranges=False)  # the range is one of compressed bytes
    # A server that does not support ranges sends the file from its beginning.
    while start and file.r.status != 206 and (skipped := file.read(min(start, _PIECE))):
        start -= len(skipped)
    return file


def is_address(shards: str) -> bool:
    """Return whether ``shards`` is meant as an address, not as a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", shards) is not None and not Path(shards).exists()


def open_shards(
    shards: str,
    *,
    cache_dir: Path,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
) -> ShardSet:
    """Open a packed set: a folder, or an address of one of `SCHEMES`, fetched once per node.

    ``progress(done, total)`` counts bytes fetched; ``say`` receives a line if the server is waited for. Raises
    `UserError`.
    """
    return ShardSet.open(fetch_set(shards, cache_dir, progress, say) if is_address(shards) else shards)


def fetch_set(
    address: str,
    cache_dir: Path,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
) -> Path:
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
            data = b"".join(_read(url, _MAX_MANIFEST, say))
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
            _fetch_claims(base, missing, total - wanted, total, progress, functools.cache(say))
            write_atomic(stored, data)
    return folder


def _fetch_claims(base: str, claims: dict[Path, SetFile], done: int, total: int, progress: Progress, say: Say) -> None:
    lock = threading.Lock()

    def report(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def fetch_one(path: Path, claim: SetFile) -> None:
        file = RemoteFile(address=f"{base}/{claim.name}", size=claim.size, checksum=("sha256", claim.sha256))
        fetch_file(file, path, report, say)

    report(0)
    with ThreadPoolExecutor(_CONNECTIONS, "fetch") as pool:
        list(pool.map(fetch_one, claims.keys(), claims.values()))
