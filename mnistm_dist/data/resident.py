"""Resident reading: a split decoded once per node into a file that all its processes map, or copy to their GPU.

1. The process that gets the lock first checks the shards and decodes them with threads, in storage order, into a
   temporary file; the others wait at the lock.
2. The file is written by plain writes (never sparse: a mapped hole on a full disk raises SIGBUS), synced and renamed.
3. Every process maps it. A second launch finds it: it only compares the stat of the shards and of the file.
"""

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.data.cache import cache_errors
from mnistm_dist.data.manifest import SetFile
from mnistm_dist.data.order import Order
from mnistm_dist.data.parallel import Progress, read_ahead, stage
from mnistm_dist.data.shard_reader import SplitReader, open_split, set_entry
from mnistm_dist.data.shards import OK, ShardSet, examine_all, load_record, save_record, stamp_of
from mnistm_dist.data.transforms import upload
from mnistm_dist.files import atomic_path

_CHUNK_BYTES = 4 << 20  # decoded bytes per task and per write


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """A whole split as uint8, in memory that the processes of a node share, or on the GPU."""

    images: Tensor
    """uint8 (N, H, W, 3), in storage order."""
    labels: Tensor
    """int64 (N,), on the same device."""

    @property
    def size(self) -> int:
        """Images in the split."""
        return len(self.labels)

    def gather(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images uint8 (n, H, W, 3) and labels int64 (n,) of the samples ``ids``, int64 (n,), in their order."""
        return self._select(upload(ids, self.labels.device))

    def _select(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # As rows of a matrix: ten times as fast as indexing four dimensions.
        rows = self.images.view(self.size, -1).index_select(0, ids)
        return rows.view(-1, *self.images.shape[1:]), self.labels.index_select(0, ids)

    def iter_steps(
        self, order: Order, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of one step after another.

        ``blocks``: positions and their ids in ``order``, both int64 (steps, images of a step).
        """
        for _, ids in blocks:
            yield from map(self._select, upload(ids, self.labels.device))

    def iter_batches(self, ids: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `gather` of one array of ids after another."""
        return map(self.gather, ids)


def open_resident(
    shards: ShardSet,
    split: str,
    *,
    cache_dir: Path,
    device: torch.device | str,
    workers: int,
    progress: Progress | None = None,
) -> Resident:
    """Check the split's shards, decode them with ``workers`` threads unless a process of the node has, and open the
    result.

    ``progress(done, total)`` counts images, each half when its shard is known to be intact and half when it is decoded.
    Raises `UserError` for a shard that is missing, truncated or changed, a broken PNG, a full disk, and a cache folder
    that cannot be written.
    """
    with set_entry(cache_dir, shards) as folder:
        path, record = folder / f"{split}.u8", folder / "checked.json"
        count = shards.split(split).count
        reader = open_split(shards, split, record=record, progress=stage(progress, 0, 2, count))
        report = stage(progress, 1, 2, count)
        if not _is_intact(path, reader.count * prod(reader.image_shape), record):
            _save_stamp(path, _decode_to(path, reader, max(1, workers), report), record)
        report(reader.count, reader.count)
        # Mapped under the lock, so that it cannot be cleared before.
        with cache_errors(path), path.open("rb") as file:
            # Copy on write: torch takes no read-only buffer, and nobody writes.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    images = torch.frombuffer(mapped, dtype=torch.uint8).view(reader.count, *reader.image_shape)
    labels = torch.from_numpy(reader.labels(np.arange(reader.count)))
    return Resident(images=images.to(device), labels=labels.to(device))


def _is_intact(path: Path, size: int, record: Path) -> bool:
    """Return whether a decoded file is there as it was written. It is hashed only if its stat has changed."""
    known = load_record(record).get(str(path.absolute()))
    if known is None:
        return False
    claim = SetFile(name=path.name, size=size, sha256=known[1])
    return examine_all({path: claim}, record=record)[0].status == OK


def _save_stamp(path: Path, sha256: str, record: Path) -> None:
    save_record(record, {**load_record(record), str(path.absolute()): (stamp_of(path.stat()), sha256)})


def _decode_to(path: Path, reader: SplitReader, workers: int, progress: Progress) -> str:
    """Decode a split into the file ``path`` and return its sha256. The lock of the cache entry must be held."""
    count, image_bytes = reader.count, prod(reader.image_shape)
    chunk, digest, done = max(1, _CHUNK_BYTES // image_bytes), hashlib.sha256(), 0
    with (
        cache_errors(path),
        atomic_path(path) as temporary,
        temporary.open("wb") as file,  # empties what a killed process has left, before the look at the free space
        cache_errors(path, count * image_bytes),
        ThreadPoolExecutor(workers, "decode") as pool,
    ):
        chunks = (np.arange(first, min(first + chunk, count)) for first in range(0, count, chunk))
        tasks = (pool.submit(reader.load, ids) for ids in chunks)
        for task in read_ahead(tasks, lambda _: 2 * workers):
            images = task.result().numpy()
            file.write(images.data.cast("B"))
            digest.update(images.data.cast("B"))
            done += len(images)
            progress(done, count)
    return digest.hexdigest()
