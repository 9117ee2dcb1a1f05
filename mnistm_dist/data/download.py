"""The official set and MNIST from public servers, into the cache: going on after a cut, and checked.

1. What is in the cache already, whole, is not fetched again.
2. A file is fetched by transfer.py and checked as far as it is known. What is no set at all, a page say, is refused.
3. The last proof of the official set is not here: `pack` sums its pixels (writing/lineage.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mnistm_dist.data import transfer
from mnistm_dist.data.cache import entry_lock, make_entry
from mnistm_dist.data.public_copies import OFFICIAL_COPIES, Copy
from mnistm_dist.data.telling import Progress
from mnistm_dist.errors import UserError

OFFICIAL = "official"
"""What `download` calls the set of Ganin and Lempitsky."""
KIND = "downloads"
"""The kind of these entries of the cache."""


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
    files = {name if usable else "set": transfer.RemoteFile(address=address)}
    return Copy(name=hashlib.sha256(address.encode()).hexdigest()[:16], said_by=address, files=files)


def _fetch_copy(copy: Copy, cache_dir: Path, progress: Progress | None) -> Path:
    sizes = [file.size for file in copy.files.values()]
    total = sum(size for size in sizes if size is not None) if None not in sizes else 0
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    source = next(iter(copy.files.values())).address
    with entry_lock(cache_dir, KIND, copy.name):
        folder = make_entry(cache_dir, KIND, copy.name, {"source": source})
        for name, file in copy.files.items():
            target = folder / name
            if target.exists() and transfer.is_right(file, target):
                tell(target.stat().st_size)
                continue
            server = transfer.Server(urlsplit(file.address).scheme)
            transfer.download(server, file, target, tell)
    return folder / next(iter(copy.files)) if len(copy.files) == 1 else folder
