"""Resident reading: a split decoded once per node into a file that all its processes map, or copy to their GPU.

1. Whoever holds the lock first checks the shards and decodes them with threads, in storage order, into
   ``train.u8.partial``; the others wait at the lock.
2. The file is written by plain writes (never sparse: a mapped hole on a full disk is a SIGBUS), synced and renamed.
3. Every process maps it. A second launch finds it: it looks at the shards' and the file's stat and decodes nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.data.cache import cache_failures, make_room, write_whole
from mnistm_dist.data.integrity import stamp_of
from mnistm_dist.data.order import Order
from mnistm_dist.data.progress import Progress, stage
from mnistm_dist.data.shard_reader import SplitReader, open_split, set_entry
from mnistm_dist.data.shards import ShardSet

_CHUNK_BYTES = 4 << 20
"""Decoded bytes that one task decodes and one write writes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """A split as uint8, whole: in memory that the processes of a node share, or on the GPU."""

    images: Tensor
    """uint8 (N, H, W, 3), in storage order."""
    labels: Tensor
    """int64 (N,), on the same device."""

    @property
    def size(self) -> int:
        """Images in the split."""
        return len(self.labels)

    def gather(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, H, W, 3) and labels int64 (n,) of the samples ``ids``, int64 (n,), in their order."""
        return self._select(torch.from_numpy(ids).to(self.labels.device, non_blocking=True))

    def _select(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # Rows of a matrix: ten times the speed of indexing four dimensions.
        rows = self.images.view(self.size, -1).index_select(0, ids)
        return rows.view(-1, *self.images.shape[1:]), self.labels.index_select(0, ids)

    def iter_steps(
        self, order: Order, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one step after another.

        ``blocks``: positions and their ids in ``order``, both int64 (steps, images of a step).
        """
        for _, ids in blocks:
            yield from map(self._select, torch.from_numpy(ids).to(self.labels.device, non_blocking=True))

    def iter_batches(self, ids: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """`gather` of one array of ids after another."""
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
    """Checks the split's shards, decodes them with ``workers`` threads if no process of the node has, and opens
    the result.

    ``progress(done, total)`` counts images, each half when its shard is known to be whole and half when it is decoded.
    Raises `UserError`: a shard that is missing, cut or changed, a broken PNG, a full disk, a cache folder that cannot
    be written.
    """
    with set_entry(cache_dir, shards) as folder:
        reader = open_split(shards, split, record=folder / "checked.json", progress=stage(progress, 0, 2))
        path = folder / f"{split}.u8"
        decoded = stage(progress, 1, 2)
        if not _is_whole(path, reader.count * prod(reader.image_shape)):
            _build(path, reader, workers, decoded)
        decoded(reader.count, reader.count)
        # Mapped under the lock: it cannot be cleared in between.
        images = _map(path, reader)
    labels = torch.from_numpy(reader.labels(np.arange(reader.count)))
    return Resident(images=images.to(device), labels=labels.to(device))


def _build(path: Path, reader: SplitReader, workers: int, progress: Progress) -> None:
    count, image_bytes = reader.count, prod(reader.image_shape)
    total = count * image_bytes
    partial = path.with_name(f"{path.name}.partial")
    # What a killed decode left behind counts against the room.
    partial.unlink(missing_ok=True)
    make_room(path.parent, total)
    checksum, done = 0, 0
    try:
        with cache_failures(path.parent, total), partial.open("wb") as file:
            for images in _decode_all(reader, max(1, _CHUNK_BYTES // image_bytes), workers):
                data = images.data.cast("B")
                file.write(data)
                checksum = zlib.crc32(data, checksum)
                done += len(images)
                progress(done, count)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _write_card(path, checksum)


def _decode_all(reader: SplitReader, chunk: int, workers: int) -> Iterator[np.ndarray]:
    """The images in storage order, uint8 (<= chunk, H, W, 3) at a time; twice as many chunks in work as workers."""

    def decode(first: int) -> np.ndarray:
        block = reader.read([(first, min(first + chunk, reader.count))])
        out = torch.empty((len(block.ids), *reader.image_shape), dtype=torch.uint8)
        reader.decode(block, np.arange(len(block.ids)), out)
        return out.numpy()

    firsts = iter(range(0, reader.count, chunk))
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="decode") as pool:
        waiting: list[Future[np.ndarray]] = [
            pool.submit(decode, first) for first in islice(firsts, 2 * max(1, workers))
        ]
        try:
            while waiting:
                images = waiting.pop(0).result()
                waiting += [pool.submit(decode, first) for first in islice(firsts, 1)]
                yield images
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _card_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_card(path: Path, checksum: int) -> None:
    with cache_failures(path):
        write_whole(_card_path(path), json.dumps({"crc32": checksum, "stamp": stamp_of(path.stat())}).encode())


def _is_whole(path: Path, size: int) -> bool:
    """Whether a decoded file is there and what was written; its bytes are summed again only if its stat has
    changed."""
    try:
        card = json.loads(_card_path(path).read_bytes())
        checksum, stamp = card["crc32"], card["stamp"]
        found = stamp_of(path.stat())
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if found[0] != size:
        return False
    if found == stamp:
        return True
    actual = 0
    with cache_failures(path), path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            actual = zlib.crc32(data, actual)
    if actual != checksum:
        return False
    _write_card(path, checksum)
    return True


def _map(path: Path, reader: SplitReader) -> Tensor:
    with cache_failures(path), path.open("rb") as file:
        # Copy on write: torch takes no read-only buffer, and nobody writes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8).view(reader.count, *reader.image_shape)
