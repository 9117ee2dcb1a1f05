"""Which sample stands where in the endless training order: (seed, position) -> sample id.

The order is epoch 0's permutation, then epoch 1's, and so on, without a gap. Position ``p`` lies in epoch ``p // N``;
step ``s`` takes the positions ``[s*B, (s+1)*B)``, B being the global batch. Rank r of W takes the r-th contiguous slice
of them. An id is a sample's place in storage order: shards in manifest order, samples as they stand in their shard.

Nothing is read and nothing drawn: the id at any position is a closed form, the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mnistm_dist.data.hashing import derive_key, permute
from mnistm_dist.errors import UserError

# They keep the keys of one seed apart; 1 is that of hashing.uniform.
_TAG_FULL, _TAG_SHARDS, _TAG_WINDOWS = 2, 3, 4


def step_positions(step: int, *, batch_size: int, world_size: int = 1, rank: int = 0) -> np.ndarray:
    """The positions of one rank in one step: the rank-th contiguous slice of ``[step*B, (step+1)*B)``.

    Returns int64 (batch_size / world_size,). Raises UserError where the world size does not divide the batch.
    """
    share = accumulation_share(batch_size=batch_size, world_size=world_size)
    start = step * batch_size + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def accumulation_share(*, batch_size: int, world_size: int) -> int:
    """How many images of a step one rank takes. Raises UserError where the world size does not divide the batch."""
    if batch_size % world_size:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of the {world_size} processes; the nearest that fit are "
            f"{_nearest_multiples(batch_size, world_size)}"
        )
    return batch_size // world_size


def accumulation(*, batch_size: int, world_size: int, micro_batch: int) -> int:
    """How many micro-batches of ``micro_batch`` images one rank holds in a step: ``B / (W * micro_batch)``.

    Raises UserError, naming the nearest values that fit, where that is no whole number.
    """
    share = accumulation_share(batch_size=batch_size, world_size=world_size)
    if share % micro_batch:
        raise UserError(
            f"micro_batch {micro_batch} does not divide the {share} images that each of {world_size} processes takes "
            f"of a batch of {batch_size}; the nearest that fit are micro_batch {_nearest_divisors(share, micro_batch)} "
            f"or batch_size {_nearest_multiples(batch_size, world_size * micro_batch)} (at a resume --micro-batch "
            "alone)"
        )
    return share // micro_batch


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return " and ".join(str(near) for near in (below, below + divisor) if near)


def _nearest_divisors(value: int, near: int) -> str:
    below = max(d for d in range(1, min(near, value) + 1) if value % d == 0)
    above = next((d for d in range(near, value + 1) if value % d == 0), below)
    return str(below) if above == below else f"{below} and {above}"


def steps_for(epochs: int, *, size: int, batch_size: int) -> int:
    """The number of steps of a run of ``epochs`` epochs over ``size`` images: ``ceil(E * N / B)``."""
    return -(-epochs * size // batch_size)


def epochs_done(steps: int, *, size: int, batch_size: int) -> int:
    """How many whole epochs the first ``steps`` steps hold."""
    return steps * batch_size // size


def epoch_ends(step: int, *, size: int, batch_size: int) -> bool:
    """Whether an epoch ends with this step: it is the first with ``(step+1)*B >= (e+1)*N`` for some epoch e."""
    done = epochs_done(step, size=size, batch_size=batch_size)
    return epochs_done(step + 1, size=size, batch_size=batch_size) > done


def part_of_run(epoch: int, *, epochs: int, parts: int) -> int:
    """Which of ``parts`` equal parts of a run an epoch lies in; epochs beyond its end lie in the last."""
    return min(epoch, epochs - 1) * parts // epochs


@dataclass(frozen=True, kw_only=True)
class FullOrder:
    """``order: full``: each epoch is one permutation of the whole set; any sample can follow any."""

    size: int
    """Images in the split."""
    seed: int

    def epoch(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position, int64."""
        return np.asarray(positions, dtype=np.int64) // self.size

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample at each position, int64, each in O(1)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        # One key for all is faster than one for each.
        one_epoch = epochs.size > 0 and (epochs == epochs[0]).all()
        return permute(places, self.size, derive_key(self.seed, _TAG_FULL, epochs[:1] if one_epoch else epochs))


@dataclass(frozen=True, kw_only=True, eq=False)
class OrderPositions:
    """Where positions of a windowed order come from; every array is int64 (n,)."""

    epochs: np.ndarray
    streams: np.ndarray
    counts: np.ndarray
    """Samples in its stream's segment of the epoch."""
    windows: np.ndarray
    """Number of the window within the segment."""
    clocks: np.ndarray
    """How many positions of the same window come before."""
    places: np.ndarray
    """Place within the window as its shards hold it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowedOrder:
    """``order: windowed``: for sets that cannot be held; each of S canonical streams reads its shards sequentially.

    1. The stream of position p is ``(p mod B) * S // B``: each step takes ``B / S`` images of each stream.
    2. In epoch e, stream j has as many positions as ``[e*N, (e+1)*N)`` has with that stream: a closed form.
    3. The epoch's shards, shuffled and laid end to end, are cut into segments of those lengths, one for each stream.
    4. A segment is permuted in windows of ``window`` samples, so a reader holds a window or two of each stream.

    The stream count belongs to the configuration, not to the launch: W divides S divides B. Raises UserError
    where S does not divide B.
    """

    shard_counts: Sequence[int]
    """Samples in each shard, in manifest order."""
    seed: int
    batch_size: int
    """Images in a step, over all processes."""
    streams: int
    window: int
    """Samples that are permuted among themselves."""
    _first_ids: np.ndarray = field(init=False, repr=False)
    _layouts: dict[int, tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size % self.streams:
            raise UserError(
                f"streams {self.streams} does not divide batch_size {self.batch_size}; the nearest that fit are "
                f"{_nearest_divisors(self.batch_size, self.streams)}"
            )
        object.__setattr__(self, "_first_ids", np.concatenate([[0], np.cumsum(self.shard_counts, dtype=np.int64)]))

    @property
    def size(self) -> int:
        """Images in the split."""
        return int(self._first_ids[-1])

    def epoch(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position, int64."""
        return np.asarray(positions, dtype=np.int64) // self.size

    def stream(self, positions: np.ndarray) -> np.ndarray:
        """The stream of each position, int64."""
        return np.asarray(positions, dtype=np.int64) % self.batch_size * self.streams // self.batch_size

    def _count_before(self, positions: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """How many positions of ``[0, position)`` belong to a stream."""
        share = self.batch_size // self.streams
        return positions // self.batch_size * share + np.clip(positions % self.batch_size - stream * share, 0, share)

    def segment(self, epoch: int | np.ndarray, stream: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a stream's segment starts among the epoch's shards laid end to end, and its length (int64)."""
        epoch, stream = np.asarray(epoch, dtype=np.int64), np.asarray(stream, dtype=np.int64)
        first, last = epoch * self.size, (epoch + 1) * self.size
        share = self.batch_size // self.streams

        def of_streams_below(positions: np.ndarray) -> np.ndarray:
            whole, rest = np.divmod(positions, self.batch_size)
            return whole * share * stream + np.minimum(rest, stream * share)

        return (
            of_streams_below(last) - of_streams_below(first),
            self._count_before(last, stream) - self._count_before(first, stream),
        )

    def rank_in_segment(self, positions: np.ndarray) -> np.ndarray:
        """How many earlier positions of its epoch share a position's stream, int64: the stream's clock."""
        positions = np.asarray(positions, dtype=np.int64)
        stream = self.stream(positions)
        return self._count_before(positions, stream) - self._count_before(self.epoch(positions) * self.size, stream)

    def locate(self, positions: np.ndarray) -> OrderPositions:
        """The window of each position and its place there, each in O(1)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, streams, clock = self.epoch(positions), self.stream(positions), self.rank_in_segment(positions)
        _, counts = self.segment(epochs, streams)
        windows, clocks = np.divmod(clock, self.window)
        sizes = np.minimum(counts - windows * self.window, self.window)
        places = permute(clocks, sizes, derive_key(self.seed, _TAG_WINDOWS, epochs, streams, windows))
        return OrderPositions(
            epochs=epochs, streams=streams, counts=counts, windows=windows, clocks=clocks, places=places
        )

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample at each position, int64, each in O(log shards)."""
        at = self.locate(positions)
        laid = self.segment(at.epochs, at.streams)[0] + at.windows * self.window + at.places
        ids = np.empty_like(laid)
        for epoch in np.unique(at.epochs):
            here = at.epochs == epoch
            ids[here] = self.laid_ids(int(epoch), laid[here])
        return ids

    def runs(self, epoch: int, stream: int, window: int) -> list[tuple[int, int]]:
        """What a window holds: a run ``[first, stop)`` of ids for each shard in it, in the order of the places."""
        start, count = (int(value) for value in self.segment(epoch, stream))
        first, last = start + window * self.window, start + min(count, (window + 1) * self.window)
        shards, starts = self.layout(epoch)
        begin, end = np.searchsorted(starts, [first, last - 1], side="right")
        runs = []
        for shard, shard_start in zip(shards[begin - 1 : end], starts[begin - 1 : end], strict=True):
            offset = int(self._first_ids[shard]) - int(shard_start)
            stop = int(self._first_ids[shard + 1])
            runs.append((max(first, int(shard_start)) + offset, min(last + offset, stop)))
        return [(run_first, run_stop) for run_first, run_stop in runs if run_first < run_stop]

    def windows_of(self, epoch: int, stream: int) -> int:
        """How many windows the segment of a stream has in an epoch."""
        return -(-int(self.segment(epoch, stream)[1]) // self.window)

    def laid_ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sample at each place among the epoch's shuffled shards laid end to end, int64."""
        shards, starts = self.layout(epoch)
        at = np.searchsorted(starts, places, side="right") - 1
        return self._first_ids[shards[at]] + places - starts[at]

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in shuffled order, and where each starts when they are laid end to end; both int64."""
        layout = self._layouts.get(epoch)
        if layout is None:
            count = len(self.shard_counts)
            shards = permute(np.arange(count), count, derive_key(self.seed, _TAG_SHARDS, epoch))
            lengths = np.diff(self._first_ids)[shards]
            layout = shards, np.cumsum(lengths) - lengths
            # A step sees two epochs at most where epochs are longer than a batch: older layouts go.
            for old in list(self._layouts)[:-1]:
                self._layouts.pop(old, None)
            self._layouts[epoch] = layout
        return layout


Order = FullOrder | WindowedOrder
"""A training order: gives the ids and the epoch of any positions."""
