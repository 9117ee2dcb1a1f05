"""From packed shards to batches of uint8 on the device.

1. `open_reader`: a split, checked and ready, resident or streaming.
2. `train_batches`: what one rank trains on, step by step: a pure function of (configuration, shards, step).
3. `evaluation_batches`: a split in manifest order, each image once over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.config import DataConfig
from mnistm_dist.data.order import Order, accumulation, step_positions
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.resident import Resident, open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.streaming import Streaming, open_streaming

Reader = Resident | Streaming
"""A split, ready to be read."""

_BLOCK_POSITIONS = 16_384
"""Positions whose ids are computed at once: a call for one batch costs as much as one for a thousand images
more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of m training images."""

    images: Tensor
    """uint8 (m, H, W, 3), on the device."""
    labels: Tensor
    """int64 (m,), on the device."""
    positions: np.ndarray
    """Places in the endless order, int64 (m,)."""
    ids: np.ndarray
    """Samples, int64 (m,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalBatch:
    """One canonical evaluation batch, padded by repeating its last sample."""

    images: Tensor
    """uint8 (batch_size, H, W, 3), on the device."""
    labels: Tensor
    """int64 (batch_size,), on the device."""
    ids: np.ndarray
    """Samples, int64 (batch_size,)."""
    count: int
    """How many of them are no padding."""


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
    """Checks a split and opens it as the configuration, whose ``data`` is settled, says.

    ``workers: auto`` is ``threads``, this process's share of the cores, for streaming, and every core of the
    node for the decoding of a resident set, which one process does while the others wait.
    ``progress(done, total)`` counts images. Raises `UserError`.
    """
    assert config.reader != "auto", "the reading is not settled"
    if config.reader == "streaming":
        workers = threads if config.workers == "auto" else config.workers
        return open_streaming(shards, split, cache_dir=cache_dir, device=device, workers=workers, progress=progress)
    workers = available_cores() if config.workers == "auto" else config.workers
    return open_resident(shards, split, cache_dir=cache_dir, device=device, workers=workers, progress=progress)


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
    """What one rank trains on from ``start_step`` up to ``stop_step``: for each step its k micro-batches, in
    their order.

    The same for both readers, and whatever their workers. Raises `UserError` where batch, micro-batch and world
    size do not fit, and, while streaming, for shards that have been damaged since the launch.
    """
    k = accumulation(batch_size=batch_size, world_size=world_size, micro_batch=micro_batch)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        steps = max(1, _BLOCK_POSITIONS // (k * micro_batch))
        for first in range(start_step, stop_step, steps):
            positions = np.stack(
                [
                    step_positions(step, batch_size=batch_size, world_size=world_size, rank=rank)
                    for step in range(first, min(first + steps, stop_step))
                ]
            )
            yield positions, order.ids(positions.ravel()).reshape(positions.shape)

    # Two readings of one plan: streaming runs ahead.
    ours, theirs = tee(blocks())
    planned = ((p, i) for positions, ids in ours for p, i in zip(positions, ids, strict=True))
    for (positions, ids), (images, labels) in zip(planned, reader.iter_steps(order, theirs), strict=True):
        parts = [slice(first, first + micro_batch) for first in range(0, k * micro_batch, micro_batch)]
        yield [Batch(images=images[at], labels=labels[at], positions=positions[at], ids=ids[at]) for at in parts]


def evaluation_batches(reader: Reader, *, batch_size: int, world_size: int = 1, rank: int = 0) -> Iterator[EvalBatch]:
    """One rank's canonical batches of a split: batch i holds the samples from ``i * batch_size`` on and belongs
    to rank ``i mod world_size``; the last one is padded. Raises `UserError` for damaged shards."""
    indices = range(rank, -(-reader.size // batch_size), world_size)
    wanted = [np.arange(i * batch_size, min((i + 1) * batch_size, reader.size)) for i in indices]
    for ids, (images, labels) in zip(wanted, reader.iter_batches(wanted), strict=True):
        padding = batch_size - len(ids)
        if padding:
            images = torch.cat([images, images[-1:].expand(padding, *images.shape[1:])])
            labels = torch.cat([labels, labels[-1:].expand(padding)])
        yield EvalBatch(images=images, labels=labels, ids=np.pad(ids, (0, padding), mode="edge"), count=len(ids))
