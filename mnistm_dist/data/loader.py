"""From packed shards to batches of uint8 on the device.

1. `open_reader`: a split, checked and ready, resident or streaming.
2. `train_batches`: the batches of one rank, step by step: a pure function of (configuration, shards, step).
3. `evaluation_batches`: a split in storage order, each image once over all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.config import DataConfig
from mnistm_dist.data.order import Order, step_positions
from mnistm_dist.data.parallel import Progress, available_cores
from mnistm_dist.data.resident import Resident, open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.streaming import Streaming, open_streaming

Reader = Resident | Streaming  # A split that is ready to be read

# Positions whose ids are computed at once: a call for one batch takes as long as for a thousand images more.
_BLOCK_POSITIONS = 16_384


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of training images, or one canonical batch of an evaluation: n images.

    A batch of an evaluation is padded by repeating its last sample.
    """

    images: Tensor
    """uint8 (n, H, W, 3), on the device."""
    labels: Tensor
    """int64 (n,), on the device."""
    positions: np.ndarray
    """Positions in the endless order, int64 (n,); in an evaluation, whose order is that of storage, the ids."""
    ids: np.ndarray
    """Sample ids, int64 (n,)."""
    count: int
    """How many of them are not padding."""


def open_reader(
    shards: ShardSet,
    split: str,
    config: DataConfig,
    *,
    cache_dir: Path,
    device: torch.device | str,
    threads: int,
    progress: Progress | None = None,
) -> Reader:
    """Check a split and open it with the reader of the configuration, which must be resolved.

    ``workers: auto`` means ``threads``, this process's share of the cores, for streaming, and all cores of the node for
    decoding a resident set, which one process does while the others wait. ``progress(done, total)`` counts images.
    Raises `UserError`.
    """
    assert config.reader != "auto", "reader is not resolved"
    streams = config.reader == "streaming"
    auto = threads if streams else available_cores()
    workers = auto if config.workers == "auto" else config.workers
    open_with = open_streaming if streams else open_resident
    return open_with(shards, split, cache_dir=cache_dir, device=device, workers=workers, progress=progress)


def train_batches(
    reader: Reader,
    order: Order,
    *,
    batch_size: int,
    micro_batch: int,
    world_size: int = 1,
    rank: int = 0,
    start_step: int = 0,
    stop_step: int,
) -> Iterator[list[Batch]]:
    """Yield the batches of one rank from ``start_step`` up to ``stop_step``: for each step its micro-batches in order.

    They do not depend on the reader or its workers. Raises `UserError` if batch, micro-batch and world size do not fit,
    and, while streaming, for shards that were damaged after the launch.
    """
    share = {"batch_size": batch_size, "micro_batch": micro_batch, "world_size": world_size, "rank": rank}
    images_per_step = len(step_positions(0, **share))

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        block_steps = max(1, _BLOCK_POSITIONS // images_per_step)
        for first in range(start_step, stop_step, block_steps):
            positions = np.stack(
                [step_positions(step, **share) for step in range(first, min(first + block_steps, stop_step))]
            )
            yield positions, order.ids(positions.ravel()).reshape(positions.shape)

    # Two iterators over one plan, since streaming reads ahead.
    left, right = tee(blocks())
    steps = ((p, i) for positions, ids in left for p, i in zip(positions, ids, strict=True))
    for (positions, ids), (images, labels) in zip(steps, reader.iter_steps(order, right), strict=True):
        parts = [slice(first, first + micro_batch) for first in range(0, images_per_step, micro_batch)]
        yield [
            Batch(images=images[at], labels=labels[at], positions=positions[at], ids=ids[at], count=micro_batch)
            for at in parts
        ]


def evaluation_batches(reader: Reader, *, batch_size: int, world_size: int = 1, rank: int = 0) -> Iterator[Batch]:
    """Yield one rank's canonical batches of a split: batch i has the samples from ``i * batch_size`` on and belongs to
    rank ``i mod world_size``; the last one is padded. Raises `UserError` for damaged shards."""
    indices = range(rank, -(-reader.size // batch_size), world_size)
    wanted = [np.arange(i * batch_size, min((i + 1) * batch_size, reader.size)) for i in indices]
    for ids, (images, labels) in zip(wanted, reader.iter_batches(wanted), strict=True):
        padding = batch_size - len(ids)
        if padding:
            images = torch.cat([images, images[-1:].expand(padding, *images.shape[1:])])
            labels = torch.cat([labels, labels[-1:].expand(padding)])
        padded = np.pad(ids, (0, padding), mode="edge")
        yield Batch(images=images, labels=labels, positions=padded, ids=padded, count=len(ids))
