"""Streaming reading: the windowed order from shards on disk, in bounded memory.

1. A reading thread reads a window of a stream, still encoded, by one sequential read for each shard in it: the first
   windows at the start, each next one while its stream is in the second half of the current one.
2. ``workers`` threads decode the images of a step out of the windows, a few steps ahead.
3. A window is dropped when its stream has left it. A process holds at most two windows of each of its streams (three
   while the steps ahead have crossed into the next), and the decoded images of the steps ahead.

A start anywhere reads the windows that its streams are in, and nothing before them. What a step sees does not depend on
the threads: they fill places that the order decides. There are no worker processes that a signal could kill or a crash
leave behind; the decoder runs without the interpreter's lock.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnistm_dist.data.order import Order, OrderPositions, WindowedOrder
from mnistm_dist.data.parallel import Progress, read_ahead
from mnistm_dist.data.shard_reader import SplitReader, open_split, set_entry
from mnistm_dist.data.shards import Block, ShardSet
from mnistm_dist.errors import UserError

_TASK_IMAGES = 128  # images that one task decodes
_READING_THREADS = 2
_STEPS_AHEAD = 2

# (epoch, number): sorts in the order in which a stream reaches its windows.
_Window = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Streaming:
    """A split that is read from its shards and never held in memory as a whole."""

    reader: SplitReader
    device: torch.device
    workers: int

    @property
    def size(self) -> int:
        """Images in the split."""
        return self.reader.count

    def gather(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return images uint8 (n, H, W, 3) and labels int64 (n,) of the samples ``ids``, int64 (n,), in their order."""
        return self._deliver(self.reader.load(ids), ids)

    def iter_batches(self, ids: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `gather` of one array of ids after another, read and decoded ahead."""
        with ThreadPoolExecutor(self.workers, "stream") as pool:
            tasks = ((wanted, pool.submit(self.reader.load, wanted)) for wanted in ids)
            for wanted, images in read_ahead(tasks, lambda _: max(_STEPS_AHEAD, self.workers)):
                yield self._deliver(images.result(), wanted)

    def iter_steps(
        self, order: Order, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of one step after another.

        ``blocks``: positions and their ids in ``order``, both int64 (steps, images of a step). Each step is one rank's
        share. Raises `UserError` if the order is not windowed, and for damaged shards.
        """
        if not isinstance(order, WindowedOrder):
            raise UserError("reader streaming requires order windowed: use --order windowed, or --reader resident")
        reading_pool, decoding_pool = (
            ThreadPoolExecutor(_READING_THREADS, "read"),
            ThreadPoolExecutor(self.workers, "stream"),
        )
        with reading_pool as reading, decoding_pool as decoding:
            windows = _Windows(order, lambda ids: reading.submit(self.reader.read, ids))

            def steps() -> Iterator[tuple[np.ndarray, Tensor, list[Future[None]]]]:
                for positions, block_ids in blocks:
                    at = order.locate(positions.ravel())
                    for number, ids in enumerate(block_ids):
                        yield ids, *self._start(windows, decoding, at, number * len(ids), len(ids))

            def ahead(step: tuple[np.ndarray, Tensor, list[Future[None]]]) -> int:
                return max(_STEPS_AHEAD, -(-2 * self.workers // len(step[2])))

            for ids, images, tasks in read_ahead(steps(), ahead):
                for task in tasks:
                    task.result()
                yield self._deliver(images, ids)

    def _start(
        self, windows: "_Windows", decoding: ThreadPoolExecutor, at: OrderPositions, first: int, count: int
    ) -> tuple[Tensor, list[Future[None]]]:
        """Start to decode ``count`` images of a step, those of ``at`` from ``first`` on.

        Return the images, which are complete when all tasks are done, and the tasks.
        """
        images = self.reader.empty(count)
        rows = slice(first, first + count)
        # Within a step, the positions of a stream are neighbours, and so are those of a window.
        changes = np.flatnonzero(np.diff(at.streams[rows]) | np.diff(at.epochs[rows]) | np.diff(at.windows[rows])) + 1
        edges = sorted({*changes.tolist(), *range(0, count, _TASK_IMAGES), count})
        parts: list[list[tuple[Future[Block], int, int]]] = [[] for _ in range(0, count, _TASK_IMAGES)]
        for start, stop in pairwise(edges):
            parts[start // _TASK_IMAGES].append((windows.get(at, first + stop - 1), start, stop))

        def decode(part: list[tuple[Future[Block], int, int]]) -> None:
            for block, start, stop in part:
                self.reader.decode(block.result(), at.places[first + start : first + stop], images[start:stop])

        return images, [decoding.submit(decode, part) for part in parts]

    def _deliver(self, images: Tensor, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(self.reader.labels(ids))
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Windows:
    """The windows in use: the current one of each stream and, from its middle on, the next one."""

    def __init__(self, order: WindowedOrder, read: Callable[[np.ndarray], Future[Block]]) -> None:
        self._order, self._read = order, read
        self._held: dict[int, dict[_Window, Future[Block]]] = {}

    def get(self, at: OrderPositions, last: int) -> Future[Block]:
        """Return the window of the ``last`` position in ``at``; earlier windows of its stream are dropped."""
        stream, window = int(at.streams[last]), (int(at.epochs[last]), int(at.windows[last]))
        held = {key: block for key, block in self._held.get(stream, {}).items() if key >= window}
        self._held[stream], wanted, size = held, [window], self._order.window
        # Streams reach the end of their windows at the same time: spread their next reads over the second half.
        due = (0.5 + 0.4 * stream / self._order.streams) * size
        if int(at.offsets[last]) >= min(due, int(at.counts[last]) - window[1] * size - 1):
            wanted.append(self._after(stream, *window))
        for epoch, number in wanted:
            if (epoch, number) not in held:
                held[epoch, number] = self._read(self._order.window_ids(epoch, stream, number))
        return held[window]

    def _after(self, stream: int, epoch: int, number: int) -> _Window:
        number += 1
        # If a step is longer than an epoch, a stream may have no part in an epoch.
        while number >= self._order.windows_of(epoch, stream):
            epoch, number = epoch + 1, 0
        return epoch, number


def open_streaming(
    shards: ShardSet,
    split: str,
    *,
    cache_dir: Path,
    device: torch.device | str,
    workers: int,
    progress: Progress | None = None,
) -> Streaming:
    """Check the split's shards, hashing once per node what has changed since the last check, and open it.

    ``progress(done, total)`` counts images whose shards are known to be intact. Raises `UserError` naming a shard that
    is missing, truncated or changed, or a cache folder that cannot be written: it has the record of the checks.
    """
    device = torch.device(device)
    with set_entry(cache_dir, shards) as folder:
        reader = open_split(
            shards, split, record=folder / "checked.json", pin_memory=device.type == "cuda", progress=progress
        )
    return Streaming(reader=reader, device=device, workers=max(1, workers))
