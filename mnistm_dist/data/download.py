"""The official set and MNIST from public servers, into the cache: going on after a cut, and checked.

1. What is in the cache already, whole, is not fetched again.
2. A file is fetched into ``NAME.partial``. After a cut, in this call or an earlier one, it goes on where it ended.
3. It gets its name when its size and checksum are right, where these are known. What is no set at all, a web page say,
   is refused at its first bytes.
4. The last proof of the official set is not here: `pack` sums its pixels (`lineage.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mnistm_dist.data import transfer
from mnistm_dist.data.cache import cache_failures, entry_lock, make_entry, make_room
from mnistm_dist.data.public_copies import OFFICIAL_COPIES, Copy, RemoteFile
from mnistm_dist.data.telling import Progress
from mnistm_dist.errors import UserError

OFFICIAL = "official"
"""What `download` calls the set of Ganin and Lempitsky."""
KIND = "downloads"
"""The kind of these entries of the cache."""
_MAX_BYTES = 16 << 30
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"{")


def download(
    what: str,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Fetches the official set, from the first public copy that gives it or from an address; returns the path to open.

    `what` is `official` or an address of a copy. ``progress(done, total)`` counts bytes, total being 0 where it is not
    known; `say` hears which copy is tried and why one was passed over. Raises UserError in one line where no copy gives
    it: no connection, no such file, a web page in its place, another checksum, a full disk.
    """
    if what != OFFICIAL:
        return _fetch_copy(_copy_at(what), cache_dir, progress)
    refusals = []
    for copy in OFFICIAL_COPIES:
        if say is not None:
            say(f"downloading from {copy.said_by}")
        try:
            return _fetch_copy(copy, cache_dir, progress)
        except UserError as error:
            refusals.append(str(error))
            if say is not None:
                say(f"passed over: {error}")
    raise UserError(f"no public copy of the official set could be fetched: {'; '.join(refusals)}")


def fetch_mnist(cache_dir: Path) -> Path:
    """Has torchvision download MNIST into the cache; returns the folder, for `idx.read_digits`.

    torchvision knows the mirrors and checksums, and fetches nothing that is there already. Raises UserError where it
    cannot.
    """
    from torchvision.datasets import MNIST

    with entry_lock(cache_dir, KIND, "mnist"):
        folder = make_entry(cache_dir, KIND, "mnist", {"source": "MNIST, by torchvision"})
        # It prints what it does, and each mirror's failure.
        silence = io.StringIO()
        try:
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                MNIST(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"MNIST could not be downloaded by torchvision ({' '.join(str(error).split())}): "
                "give its folder by --mnist DIR"
            ) from error
    return folder


def _copy_at(address: str) -> Copy:
    parts = transfer.split_address(address)
    if parts is None:
        known = ", ".join(f"{scheme}://..." for scheme in transfer.SCHEMES)
        raise UserError(f"--download {address}: accepted are {OFFICIAL} and addresses {known}")
    name = unquote(parts.path).rpartition("/")[2]
    usable = name not in ("", ".", "..") and "\0" not in name and "/" not in name and len(name) < 200
    file = RemoteFile(address=address, name=name if usable else "set")
    return Copy(name=hashlib.sha256(address.encode()).hexdigest()[:16], said_by=address, files=(file,))


def _fetch_copy(copy: Copy, cache_dir: Path, progress: Progress | None) -> Path:
    sizes = [file.size for file in copy.files]
    total = sum(size for size in sizes if size is not None) if None not in sizes else 0
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with entry_lock(cache_dir, KIND, copy.name):
        folder = make_entry(cache_dir, KIND, copy.name, {"source": copy.files[0].address})
        for file in copy.files:
            _fetch_file(file, folder / file.name, tell)
    return folder / copy.files[0].name if len(copy.files) == 1 else folder


def _fetch_file(file: RemoteFile, target: Path, tell: Callable[[int], None]) -> None:
    if target.exists() and _is_right(file, target):
        tell(target.stat().st_size)
        return
    partial = target.with_name(f"{target.name}.partial")
    start = partial.stat().st_size if partial.exists() else 0
    if file.size is not None:
        make_room(target.parent, file.size - start)
    for from_earlier in (True, False) if start else (False,):
        tell(start)
        _fetch_all(file, partial, start, tell)
        if _is_right(file, partial):
            with cache_failures(target):
                partial.replace(target)
            return
        came = partial.stat().st_size
        with cache_failures(partial):
            partial.unlink()
        if not from_earlier:
            raise UserError(f"{file.address}: {came:,} bytes that are not those of {target.name}: its {_known(file)}")
        # What an earlier call left behind may be what is wrong.
        tell(-came)
        start = 0


def _fetch_all(file: RemoteFile, partial: Path, start: int, tell: Callable[[int], None]) -> None:
    """Fetches from `start` on to the end, trying again after a cut as long as something comes."""
    server = transfer.Server(urlsplit(file.address).scheme)
    tries = 0
    while True:
        end = start
        try:
            for piece in _pieces(server, file, partial, start):
                end += len(piece)
                tell(len(piece))
            return
        except transfer.Cut as cut:
            tries = 0 if end > start else tries + 1
            if tries == transfer.TRIES:
                kept = f"; the {end:,} bytes that came are kept: try again" if end else ""
                raise UserError(f"{file.address}: no connection, {tries} times in a row ({cut}){kept}") from cut
        if tries:
            time.sleep(transfer.FIRST_PAUSE * 2 ** (tries - 1))
        start = end


def _pieces(server: transfer.Server, file: RemoteFile, partial: Path, start: int) -> Iterator[bytes]:
    """Yields what comes from `start` on, each piece once it is written."""
    end, limit = start, file.size if file.size is not None else _MAX_BYTES
    with cache_failures(partial, file.size), partial.open("r+b" if start else "wb") as target:
        target.seek(start)
        try:
            for piece in server.read(file.address, start, file.size):
                if end == 0 and piece.lstrip()[:9].lower().startswith(_PAGES):
                    raise UserError(f"{file.address}: it sends a page of text, not {file.name}")
                end += len(piece)
                if end > limit:
                    raise UserError(f"{file.address}: longer than the {limit:,} bytes that {file.name} may have")
                target.write(piece)
                yield piece
        finally:
            target.flush()
            os.fsync(target.fileno())


def _is_right(file: RemoteFile, path: Path) -> bool:
    with cache_failures(path), path.open("rb") as stream:
        if file.size is not None and path.stat().st_size != file.size:
            return False
        if file.checksum is None:
            return path.stat().st_size > 0
        name, value = file.checksum
        return hashlib.file_digest(stream, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest() == value


def _known(file: RemoteFile) -> str:
    facts: Mapping[str, str | None] = {
        "size is": f"{file.size:,} bytes" if file.size is not None else None,
        "checksum is": " ".join(file.checksum) if file.checksum is not None else None,
    }
    return " and its ".join(f"{name} {value}" for name, value in facts.items() if value is not None) or "size is not 0"
