"""The official set and MNIST from public servers, into the cache: going on after a cut, and checked.

1. What is in the cache already, whole, is not fetched again.
2. A file is fetched by transfer.py and checked as far as it is known. What is no set at all, a page say, is refused.
3. The last proof of the official set is not here: `pack` sums its pixels (writing/lineage.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mnistm_dist.data import fetch as transfer
from mnistm_dist.data.cache import cache_entry
from mnistm_dist.data.fetch import RemoteFile
from mnistm_dist.data.progress import Progress
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

    with cache_entry(cache_dir, KIND, "mnist", {"source": "MNIST, by torchvision"}) as folder:
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
    with cache_entry(cache_dir, KIND, copy.name, {"source": source}) as folder:
        for name, file in copy.files.items():
            transfer.fetch_file(file, folder / name, tell)
    return folder / next(iter(copy.files)) if len(copy.files) == 1 else folder


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A public copy of the official set: one archive, or several files that make up a folder."""

    name: str
    """Its folder in the cache."""
    said_by: str
    """Where its address stands in public."""
    files: Mapping[str, RemoteFile]
    """By their names in the cache."""


OFFICIAL_COPIES: Sequence[Copy] = (
    Copy(
        name="mashaan14",
        said_by="github.com/mashaan14/MNIST-M: the official images in folders of their classes, with their own names",
        files={
            "MNIST-M.zip": RemoteFile(
                address="https://media.githubusercontent.com/media/mashaan14/MNIST-M/main/MNIST-M.zip",
                size=146_914_983,
                checksum=("sha256", "bd899e2c286f1267955a73f6a374f31fc98764380bb8928dbfee37d8ab0393d6"),
            )
        },
    ),
    Copy(
        name="pytorch-adapt",
        said_by="github.com/KevinMusgrave/pytorch-adapt, datasets/mnistm.py: the authors' own archive",
        files={
            "mnist_m.tar.gz": RemoteFile(
                address="https://cornell.box.com/shared/static/jado7quprg6hzzdubvwzh9umr75damwi",
                checksum=("md5", "859df31c91afe82e80e5012ba928f279"),
            )
        },
    ),
    Copy(
        name="Mike0307",
        said_by="huggingface.co/datasets/Mike0307/MNIST-M: parquet",
        files={
            name: RemoteFile(address=f"https://huggingface.co/datasets/Mike0307/MNIST-M/resolve/main/data/{name}")
            for name in (
                "train-00000-of-00001-571b6b1e2c195186.parquet",
                "test-00000-of-00001-ba3ad971b105ff65.parquet",
            )
        },
    ),
    Copy(
        name="ShichengChen",
        said_by="github.com/ShichengChen/Domain-Adversarial-Training-of-Neural-Networks: the official layout in git",
        files={
            "mnist_m.zip": RemoteFile(
                address="https://codeload.github.com/ShichengChen/"
                "Domain-Adversarial-Training-of-Neural-Networks/zip/HEAD"
            )
        },
    ),
)
"""The copies, in the order in which they are tried: those with a known checksum first."""
