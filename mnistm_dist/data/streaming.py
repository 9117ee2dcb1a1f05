"""Streaming reading: the windowed order from shards on disk, in bounded memory.

1. A window of a stream, still encoded, is read with one sequential read for each shard in it, by a reading thread: the
   first windows at the start, each next one while its stream is in the second half of the present one.
2. A step's images are decoded by ``workers`` threads, a few steps ahead, out of the windows.
3. A window is dropped when its stream has left it. A process holds two windows of each of its streams at most (three
   for the moment in which steps ahead have crossed into the next), and the decoded images of the steps ahead.

A start anywhere reads the windows in which its streams stand and nothing before them. What a step sees does not
depend on the threads: they fill places that the order decides. There are no worker processes that a signal
could kill or a crash leave behind; the decoder works without the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.data.order import Order, OrderPositions, WindowedOrder
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.shard_reader import Block, SplitReader, open_split, set_entry
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

_TASK_IMAGES = 128
"""Images that one task decodes."""
_READING_THREADS = 2
_STEPS_AHEAD = 2

_Window = tuple[int, int]
"""(epoch, number): compares in the order in which a stream reaches its windows."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Streaming:
    """A split read from its shards, never held whole."""

    reader: SplitReader
    device: torch.device
    workers: int

    @property
    def size(self) -> int:
        """Images in the split."""
        return self.reader.count

    def gather(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, H, W, 3) and labels int64 (n,) of the samples ``ids``, int64 (n,), in their order."""
        return self._deliver(self._read(ids), ids)

    def iter_batches(self, ids: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """`gather` of one array of ids after another, read and decoded ahead."""
        with _threads(self.workers) as pool:
            tasks = ((wanted, pool.submit(self._read, wanted)) for wanted in ids)
            for wanted, images in _ahead(tasks, lambda _: max(_STEPS_AHEAD, self.workers)):
                yield self._deliver(images.result(), wanted)

    def iter_steps(
        self, order: Order, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one step after another.

        ``blocks``: positions and their ids in ``order``, both int64 (steps, images of a step), each step the
        share of one rank, that is, of whole streams. Raises `UserError` where the order is not windowed, and
        for damaged shards.
        """
        if not isinstance(order, WindowedOrder):
            raise UserError("streaming reads the windowed order only: use --order windowed, or --reader resident")
        with _threads(_READING_THREADS) as reading, _threads(self.workers) as decoding:
            windows = _Windows(order, lambda runs: reading.submit(self.reader.read, runs))

            def steps() -> Iterator[_Step]:
                for positions, ids in blocks:
                    at = order.locate(positions.ravel())
                    for number, step_ids in enumerate(ids):
                        first = number * len(step_ids)
                        yield self._start(windows, decoding, at, first, step_ids)

            for step in _ahead(steps(), lambda step: max(_STEPS_AHEAD, -(-2 * self.workers // len(step.tasks)))):
                for task in step.tasks:
                    task.result()
                yield self._deliver(step.images, step.ids)

    def _start(
        self, windows: _Windows, decoding: ThreadPoolExecutor, at: OrderPositions, first: int, ids: np.ndarray
    ) -> _Step:
        """Begins to decode the images of the positions from ``first`` on, whose samples are ``ids``."""
        images = self._empty(len(ids))
        rows = slice(first, first + len(ids))
        # Within a step a stream's positions are neighbours, and so are those of a window.
        changes = np.flatnonzero(np.diff(at.streams[rows]) | np.diff(at.epochs[rows]) | np.diff(at.windows[rows])) + 1
        edges = sorted({*changes.tolist(), *range(0, len(ids), _TASK_IMAGES), len(ids)})
        parts: list[list[tuple[Future[Block], int, int]]] = [[] for _ in range(0, len(ids), _TASK_IMAGES)]
        for start, stop in pairwise(edges):
            parts[start // _TASK_IMAGES].append((windows.get(at, first + stop - 1), start, stop))

        def decode(mine: list[tuple[Future[Block], int, int]]) -> None:
            for block, start, stop in mine:
                self.reader.decode(block.result(), at.places[first + start : first + stop], images[start:stop])

        return _Step(ids=ids, images=images, tasks=[decoding.submit(decode, mine) for mine in parts])

    def _read(self, ids: np.ndarray) -> Tensor:
        edges = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
        block = self.reader.read([(int(ids[a]), int(ids[b - 1]) + 1) for a, b in pairwise(edges)])
        images = self._empty(len(ids))
        self.reader.decode(block, np.arange(len(ids)), images)
        return images

    def _empty(self, count: int) -> Tensor:
        shape = (count, *self.reader.image_shape)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _deliver(self, images: Tensor, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.reader.labels(ids))
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """One step's images on their way."""

    ids: np.ndarray
    images: Tensor
    tasks: list[Future[None]]
    """When all are done, the images are there."""


class _Windows:
    """The windows that are wanted: the present one of each stream and, from its middle on, the next."""

    def __init__(self, order: WindowedOrder, read: Callable[[list[tuple[int, int]]], Future[Block]]) -> None:
        self._order, self._read = order, read
        self._held: dict[int, dict[_Window, Future[Block]]] = {}

    def get(self, at: OrderPositions, last: int) -> Future[Block]:
        """The bytes of the window of the ``last`` place in ``at``; earlier windows of its stream are dropped."""
        epoch, stream, number = int(at.epochs[last]), int(at.streams[last]), int(at.windows[last])
        window, size = (epoch, number), self._order.window
        held = self._held.setdefault(stream, {})
        for old in [key for key in held if key < window]:
            del held[old]
        if window not in held:
            held[window] = self._read(self._order.runs(epoch, stream, number))
        # Streams reach the ends of their windows together: their next reads are spread over the second half.
        due = (0.5 + 0.4 * stream / self._order.streams) * size
        if int(at.clocks[last]) >= min(due, int(at.counts[last]) - number * size - 1):
            following = self._after(epoch, stream, number)
            if following not in held:
                held[following] = self._read(self._order.runs(following[0], stream, following[1]))
        return held[window]

    def _after(self, epoch: int, stream: int, number: int) -> _Window:
        number += 1
        # Where a step is longer than an epoch, a stream may have no part in an epoch.
        while number >= self._order.windows_of(epoch, stream):
            epoch, number = epoch + 1, 0
        return epoch, number


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that ends with its user: what has not begun by then is dropped."""
    pool = ThreadPoolExecutor(max_workers=max(1, count), thread_name_prefix="stream")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(items: Iterator[_T], count: Callable[[_T], int]) -> Iterator[_T]:
    """The items, each given out only when ``count(item)`` further ones have been begun."""
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count(item):
            yield waiting.popleft()
    yield from waiting


def open_streaming(
    shards: ShardSet,
    split: str,
    *,
    cache_dir: Path,
    device: torch.device | str,
    workers: int,
    progress: Progress | None = None,
) -> Streaming:
    """Checks the split's shards, once per node what has changed since the last check, and opens it.

    ``progress(done, total)`` counts images whose shards are known to be whole. Raises `UserError` naming a shard that
    is missing, cut or changed, or a cache folder that cannot be written: the record of what has been checked is there.
    """
    with set_entry(cache_dir, shards) as folder:
        reader = open_split(shards, split, record=folder / "checked.json", progress=progress)
    return Streaming(reader=reader, device=torch.device(device), workers=workers)
