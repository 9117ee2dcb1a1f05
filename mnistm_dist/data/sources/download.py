"""Download the official set and MNIST from public servers into the cache.

1. A file in the cache is used if its size and checksum are right.
2. Otherwise `fetch.py` downloads it, continues after a lost connection, and checks it.
3. `pack` proves that a set is the official one, by the checksum of its pixels (`packing/statistics.py`).
"""

import contextlib
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from mnistm_dist.data import fetch as transfer
from mnistm_dist.data.cache import cache_entry
from mnistm_dist.data.fetch import RemoteFile, Say
from mnistm_dist.data.parallel import Progress
from mnistm_dist.errors import UserError

_KIND = "downloads"  # of the cache entries
# A public copy of the official set, as files by their names: one archive, or several files that make up a folder.
_Copy = Mapping[str, RemoteFile]


def download(
    what: str,
    cache_dir: Path,
    *,
    progress: Progress = lambda done, total: None,
    say: Say = lambda line: None,
) -> Path:
    """Download the official set from the first public copy that works, or from an address; returns the path to open.

    ``what`` is `official` or the address of a copy. ``progress(done, total)`` counts bytes; total is 0 if it is
    unknown. ``say`` receives which copy is tried and why one failed. Raises `UserError` if no copy works: no
    connection, no such file, a web page in its place, another checksum, a full disk.
    """
    if what != "official":
        return _fetch_copy(what, _copy_at(what), cache_dir, progress, say)
    failures = []
    for publisher, copy in OFFICIAL_COPIES.items():
        say(f"downloading from {publisher}")
        try:
            return _fetch_copy(publisher, copy, cache_dir, progress, say)
        except UserError as error:
            failures.append(str(error))
            say(f"failed: {error}")
    raise UserError(f"no public copy of the official set could be downloaded: {'; '.join(failures)}")


def fetch_mnist(cache_dir: Path) -> Path:
    """Download MNIST into the cache by torchvision, if it is not there; returns the folder for `synthesis.read_digits`.

    torchvision knows mirrors and checksums. Raises `UserError` if it fails.
    """
    from torchvision.datasets import MNIST

    with cache_entry(cache_dir, _KIND, "mnist") as folder:
        try:
            # torchvision prints its progress and each mirror's failure.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                MNIST(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"torchvision could not download MNIST ({' '.join(str(error).split())}); give its folder by --mnist DIR"
            ) from error
    return folder


def _copy_at(address: str) -> _Copy:
    name = Path(unquote(transfer.split_address(address, "official").path).replace("\0", "")).name.strip(".") or "set"
    return {name: RemoteFile(address=address)}


def _fetch_copy(publisher: str, copy: _Copy, cache_dir: Path, progress: Progress, say: Say) -> Path:
    sizes = [file.size or 0 for file in copy.values()]
    total, done = sum(sizes) if all(sizes) else 0, 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    entry = hashlib.sha256(publisher.encode()).hexdigest()[:16]
    with cache_entry(cache_dir, _KIND, entry) as folder:
        for name, file in copy.items():
            transfer.fetch_file(file, folder / name, report, say)
    return folder / next(iter(copy)) if len(copy) == 1 else folder


# Public copies, by where they are published, in the order in which they are tried: known checksums first.
OFFICIAL_COPIES: Mapping[str, _Copy] = {
    "github.com/mashaan14/MNIST-M: the official images under their names, in folders of classes": {
        "MNIST-M.zip": RemoteFile(
            address="https://media.githubusercontent.com/media/mashaan14/MNIST-M/main/MNIST-M.zip",
            size=146_914_983,
            checksum=("sha256", "bd899e2c286f1267955a73f6a374f31fc98764380bb8928dbfee37d8ab0393d6"),
        )
    },
    "github.com/KevinMusgrave/pytorch-adapt, datasets/mnistm.py: the authors' own archive": {
        "mnist_m.tar.gz": RemoteFile(
            address="https://cornell.box.com/shared/static/jado7quprg6hzzdubvwzh9umr75damwi",
            checksum=("md5", "859df31c91afe82e80e5012ba928f279"),
        )
    },
    "huggingface.co/datasets/Mike0307/MNIST-M: parquet": {
        name: RemoteFile(address=f"https://huggingface.co/datasets/Mike0307/MNIST-M/resolve/main/data/{name}")
        for name in (
            "train-00000-of-00001-571b6b1e2c195186.parquet",
            "test-00000-of-00001-ba3ad971b105ff65.parquet",
        )
    },
    "github.com/ShichengChen/Domain-Adversarial-Training-of-Neural-Networks: the official layout": {
        "mnist_m.zip": RemoteFile(
            address="https://codeload.github.com/ShichengChen/Domain-Adversarial-Training-of-Neural-Networks/zip/HEAD"
        )
    },
}
