"""The endless training order: (seed, position) -> sample id.

The order is epoch 0's permutation, then epoch 1's, and so on, without a gap. Position ``p`` is in epoch ``p // N``.
Step ``s`` takes the positions ``[s*B, (s+1)*B)``, where B is the global batch, in M = B / micro-batch micro-batches;
rank r of W computes those from ``r * M // W`` up to ``(r + 1) * M // W``. A sample's id is its place in storage order:
shards in manifest order, samples in their order within the shard.

No state and no random generator: the id at any position is a closed form, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mnistm_dist.data.hashing import derive_key, permute
from mnistm_dist.errors import UserError

if TYPE_CHECKING:  # the order itself, and `OrderedSampler`, import NumPy only
    from mnistm_dist.config import DataConfig, StepsConfig
    from mnistm_dist.data.manifest import Manifest, Split

# They separate the keys of one seed; hashing.uniform has 1, packing/writer.py has 5.
_TAG_FULL, _TAG_SHARDS, _TAG_WINDOWS = 2, 3, 4
# A training split of more decoded bytes is streamed in windowed order by default.
RESIDENT_BYTES = 8 << 30
MAX_AUTO_STREAMS = 16
# The number of processes for which a reproducible run chooses its micro-batch.
REPRODUCIBLE_WORLD = 8


def micro_batch_share(*, batch_size: int, micro_batch: int, world_size: int, rank: int) -> range:
    """Return which of the M = batch_size / micro_batch micro-batches of a step one rank computes.

    They are contiguous, the ranks follow one another, and no rank has more than one more than another. Raises
    `UserError` if the micro-batch does not divide the batch, or if there are more processes than micro-batches.
    """
    count, rest = divmod(batch_size, micro_batch)
    if rest:
        raise UserError(
            f"micro_batch {micro_batch} does not divide batch_size {batch_size}; the nearest that fit are micro_batch "
            f"{_nearest_divisors(batch_size, micro_batch)} or batch_size {_nearest_multiples(batch_size, micro_batch)} "
            "(a resume can change only --micro-batch)"
        )
    if world_size > count:
        raise UserError(
            f"micro_batch {micro_batch}: a batch of {batch_size} has {count} of them for {world_size} processes; use "
            f"--micro-batch {auto_micro_batch(batch_size=batch_size, world_size=world_size)} or smaller, a larger "
            "--batch-size, or fewer processes"
        )
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def auto_micro_batch(*, batch_size: int, world_size: int) -> int:
    """Return the largest micro-batch that gives each of ``world_size`` processes one: batch_size / world_size if that
    is a whole number."""
    return max(m for m in range(1, max(1, batch_size // world_size) + 1) if batch_size % m == 0)


def choose_micro_batch(steps: StepsConfig, *, world_size: int, reproducible: bool) -> int:
    """Resolve ``micro_batch``. With ``reproducible``, auto does not depend on the number of processes."""
    largest_world = steps.max_world or (REPRODUCIBLE_WORLD if reproducible else world_size)
    automatic = auto_micro_batch(batch_size=steps.batch_size, world_size=largest_world)
    return automatic if steps.micro_batch == "auto" else steps.micro_batch


def step_positions(
    step: int, *, batch_size: int, micro_batch: int = 1, world_size: int = 1, rank: int = 0
) -> np.ndarray:
    """Return the positions of one rank in one step, int64: its `micro_batch_share` of ``[step*B, (step+1)*B)``.

    Raises `UserError` if batch, micro-batch and world size do not fit.
    """
    share = micro_batch_share(batch_size=batch_size, micro_batch=micro_batch, world_size=world_size, rank=rank)
    return step * batch_size + np.arange(share.start * micro_batch, share.stop * micro_batch, dtype=np.int64)


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return " and ".join(str(near) for near in (below, below + divisor) if near)


def _nearest_divisors(value: int, near: int) -> str:
    below = max(d for d in range(1, min(near, value) + 1) if value % d == 0)
    above = next((d for d in range(near, value + 1) if value % d == 0), below)
    return str(below) if above == below else f"{below} and {above}"


@dataclass(frozen=True, kw_only=True)
class FullOrder:
    """``order: full``: each epoch is a permutation of the whole set; any sample can follow any other."""

    size: int
    """Images in the split."""
    seed: int

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position, int64, each in O(1)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        # One key for all positions is faster than one for each.
        one_epoch = epochs.size > 0 and (epochs == epochs[0]).all()
        return permute(places, self.size, derive_key(self.seed, _TAG_FULL, epochs[:1] if one_epoch else epochs))


@dataclass(frozen=True, kw_only=True, eq=False)
class OrderPositions:
    """Where positions of a windowed order come from. Every array is int64 (n,)."""

    epochs: np.ndarray
    streams: np.ndarray
    counts: np.ndarray
    """Samples in the stream's segment of the epoch."""
    windows: np.ndarray
    """Number of the window within the segment."""
    offsets: np.ndarray
    """How many earlier positions are in the same window."""
    places: np.ndarray
    """Place within the window in storage order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowedOrder:
    """``order: windowed``, for sets that do not fit in memory: S canonical streams read the shards sequentially.

    1. The stream of position p is ``(p mod B) * S // B``: each step takes ``B / S`` images of each stream.
    2. In epoch e, stream j has as many positions as ``[e*N, (e+1)*N)`` has with that stream: a closed form.
    3. The epoch's shards, shuffled and laid end to end, are cut into segments of those lengths, one for each stream.
    4. A segment is permuted in windows of ``window`` samples, so a reader holds a window or two of each stream.

    The number of streams belongs to the configuration, not to the launch. Where a rank's share of a step begins or ends
    within a stream, both ranks read that stream. Raises `UserError` if S does not divide B.
    """

    shard_counts: Sequence[int]
    """Samples in each shard, in manifest order."""
    seed: int
    batch_size: int
    """Images in a step, over all processes."""
    streams: int
    window: int
    """Samples that are permuted together."""

    def __post_init__(self) -> None:
        if self.batch_size % self.streams:
            raise UserError(
                f"shuffle_streams {self.streams} does not divide batch_size {self.batch_size}; the nearest that fit "
                f"are {_nearest_divisors(self.batch_size, self.streams)}"
            )

    @cached_property
    def size(self) -> int:
        """Images in the split."""
        return sum(self.shard_counts)

    @cached_property
    def _first_ids(self) -> np.ndarray:
        return np.cumsum([0, *self.shard_counts], dtype=np.int64)

    def stream(self, positions: np.ndarray) -> np.ndarray:
        """Return the stream of each position, int64."""
        return np.asarray(positions, dtype=np.int64) % self.batch_size * self.streams // self.batch_size

    def _count_below(self, positions: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """Return how many positions of ``[0, position)`` belong to the streams below ``stream``."""
        whole, rest = np.divmod(positions, self.batch_size)
        share = self.batch_size // self.streams
        return whole * share * stream + np.minimum(rest, stream * share)

    def _count_of(self, positions: np.ndarray, stream: np.ndarray) -> np.ndarray:
        return self._count_below(positions, stream + 1) - self._count_below(positions, stream)

    def segment(self, epoch: int | np.ndarray, stream: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where a stream's segment starts in the epoch's shards laid end to end, and its length (int64)."""
        epoch, stream = np.asarray(epoch, dtype=np.int64), np.asarray(stream, dtype=np.int64)
        first, last = epoch * self.size, (epoch + 1) * self.size
        start = self._count_below(last, stream) - self._count_below(first, stream)
        return start, self._count_of(last, stream) - self._count_of(first, stream)

    def locate(self, positions: np.ndarray) -> OrderPositions:
        """Return the window of each position and its place there, each in O(1)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, streams = positions // self.size, self.stream(positions)
        before = self._count_of(positions, streams) - self._count_of(epochs * self.size, streams)
        _, counts = self.segment(epochs, streams)
        windows, offsets = np.divmod(before, self.window)
        sizes = np.minimum(counts - windows * self.window, self.window)
        places = permute(offsets, sizes, derive_key(self.seed, _TAG_WINDOWS, epochs, streams, windows))
        return OrderPositions(
            epochs=epochs, streams=streams, counts=counts, windows=windows, offsets=offsets, places=places
        )

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position, int64, each in O(log shards)."""
        at = self.locate(positions)
        laid = self.segment(at.epochs, at.streams)[0] + at.windows * self.window + at.places
        ids = np.empty_like(laid)
        for epoch in np.unique(at.epochs):
            here = at.epochs == epoch
            ids[here] = self.laid_ids(int(epoch), laid[here])
        return ids

    def window_ids(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """Return the samples of a window in storage order, int64: a run of neighbours for each shard in it."""
        start, count = (int(value) for value in self.segment(epoch, stream))
        stop = start + min(count, (window + 1) * self.window)
        return self.laid_ids(epoch, np.arange(start + window * self.window, stop))

    def windows_of(self, epoch: int, stream: int) -> int:
        """Return how many windows the segment of a stream has in an epoch."""
        return -(-int(self.segment(epoch, stream)[1]) // self.window)

    def laid_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the sample at each place in the epoch's shuffled shards laid end to end, int64."""
        count = len(self.shard_counts)
        shards = permute(np.arange(count), count, derive_key(self.seed, _TAG_SHARDS, epoch))
        lengths = np.diff(self._first_ids)[shards]
        starts = np.cumsum(lengths) - lengths
        at = np.searchsorted(starts, places, side="right") - 1
        return self._first_ids[shards[at]] + places - starts[at]


Order = FullOrder | WindowedOrder  # a training order: the id of any position


def choose_reading(config: DataConfig, manifest: Manifest, *, batch_size: int, world_size: int) -> tuple[str, str, int]:
    """Resolve ``order``, ``reader`` and ``shuffle_streams``, from the manifest's size, never from the free memory.

    Raises `UserError` if they, the batch and the number of processes do not fit one another.
    """
    height, width = manifest.image_size
    small = _train_split(manifest).count * height * width * 3 <= RESIDENT_BYTES
    order, reader, streams = config.order, config.reader, config.shuffle_streams
    if order == "auto":
        order = "full" if small and reader != "streaming" else "windowed"
    if reader == "auto":
        reader = "resident" if small or order == "full" else "streaming"
    if (order, reader) == ("full", "streaming"):
        raise UserError("reader streaming requires order windowed: use --order windowed, or --reader resident")
    fitting = auto_streams(batch_size=batch_size, world_size=world_size)
    if streams == "auto":
        streams = fitting
    elif order == "windowed" and batch_size % streams:
        raise UserError(f"shuffle_streams {streams} does not divide the batch of {batch_size}; {fitting} fits")
    return order, reader, streams


def auto_streams(*, batch_size: int, world_size: int) -> int:
    """Return the largest number of streams up to 16, or up to a larger world size, that divides the batch; if possible
    one that the world size divides, so that no two ranks read the same stream."""
    divisors = [s for s in range(max(MAX_AUTO_STREAMS, world_size), 0, -1) if batch_size % s == 0]
    return next((s for s in divisors if s % world_size == 0), divisors[0])


def create_order(data: DataConfig, steps: StepsConfig, manifest: Manifest) -> Order:
    """Create the training order of a configuration in which `choose_reading` has been resolved. Raises `UserError`."""
    train = _train_split(manifest)
    if data.order == "full":
        return FullOrder(size=train.count, seed=steps.seed)
    assert data.order == "windowed", "order is not resolved"
    return WindowedOrder(
        shard_counts=[shard.count for shard in train.shards],
        seed=steps.seed,
        batch_size=steps.batch_size,
        streams=int(data.shuffle_streams),
        window=data.shuffle_window,
    )


def _train_split(manifest: Manifest) -> Split:
    if "train" not in manifest.splits:
        raise UserError(f"these shards have no train split, only {', '.join(manifest.splits)}; use others for training")
    return manifest.splits["train"]
