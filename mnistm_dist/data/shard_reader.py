"""Samples of one split, read from its shards in runs of neighbours and decoded.

A run is read with one sequential read, headers and all; single PNGs are views into it. Before the first read
every file is checked (`ShardSet.check`); a shard that has changed since then is hashed again when it is next
opened.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode

from mnistm_dist.data.cache import entry_lock, make_entry
from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.integrity import WHOLE, examine, stamp_of
from mnistm_dist.data.progress import AGAIN, Progress
from mnistm_dist.data.shards import ShardSet, opened_shard
from mnistm_dist.errors import UserError

# torch runs a copy of more elements than this in several threads; decoding has threads of its own.
_SERIAL_COPY = 32_768


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The bytes of some samples as they stand in their shards."""

    ids: np.ndarray
    """The samples, int64 (n,)."""
    data: Tensor
    """uint8 (bytes,)."""
    offsets: np.ndarray
    """Where each PNG starts in ``data``, int64 (n,)."""
    sizes: np.ndarray
    """Bytes of each PNG, int64 (n,)."""
    plain: np.ndarray
    """Whether each is a PNG of 8-bit RGB without interlace and of the set's size, by its header, bool (n,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Span:
    """Neighbours in one shard."""

    shard: int
    ids: np.ndarray
    offset: int
    """Where the first PNG starts in the shard."""
    size: int
    """Bytes from there to the last PNG's end."""
    places: np.ndarray
    """Where each PNG starts after ``offset``, int64."""
    sizes: np.ndarray
    """Bytes of each PNG, int64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitReader:
    """Reads and decodes samples of one split. Safe to use from many threads."""

    shards: ShardSet
    split: str
    index: np.ndarray
    """The split's index, mapped: rows of `mnistm_dist.data.index.index_dtype`, (count,)."""
    first_ids: np.ndarray
    """The id of each shard's first sample, and at the end the count: int64 (shards + 1,)."""
    stamps: list[list[int]] = field(repr=False)
    """Of each shard what stat said of it when it was last known to be whole."""

    @property
    def count(self) -> int:
        """Samples in the split."""
        return len(self.index)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of every image."""
        return (*self.shards.manifest.image_size, 3)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The labels of samples, int64 (n,). Raises `UserError` for one that is no class."""
        labels = self.index["label"][ids].astype(np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.shards.manifest.classes):
            raise self._bad_index("it holds labels that are no class")
        return labels

    def read(self, runs: Iterable[tuple[int, int]]) -> Block:
        """The bytes of runs of samples, each ``[first, stop)`` in storage order, one after another.

        Raises `UserError` naming a shard that is missing, cut or changed.
        """
        spans = [self._span(*part) for first, stop in runs for part in self._within_shards(first, stop)]
        data = torch.empty(sum(span.size for span in spans), dtype=torch.uint8)
        target, starts = data.numpy().data, np.cumsum([0, *(span.size for span in spans)])
        for span, start in zip(spans, starts.tolist(), strict=False):
            self._fill(target[start : start + span.size], span)
        offsets = np.concatenate([span.places + start for span, start in zip(spans, starts, strict=False)])
        return Block(
            ids=np.concatenate([span.ids for span in spans]),
            data=data,
            offsets=offsets,
            sizes=np.concatenate([span.sizes for span in spans]),
            plain=_is_plain(data.numpy(), offsets, self.shards.manifest.image_size),
        )

    def _within_shards(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """A run cut at the ends of shards: (shard, first, stop)."""
        while first < stop:
            shard = int(np.searchsorted(self.first_ids, first, side="right")) - 1
            end = min(stop, int(self.first_ids[shard + 1]))
            yield shard, first, end
            first = end

    def _span(self, shard: int, first: int, stop: int) -> _Span:
        """Where neighbours in a shard stand. Raises `UserError` unless they follow one another inside of it."""
        rows = self.index[first:stop]
        offsets, sizes = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        ends = offsets + sizes
        limit = self.shards.split(self.split).shards[shard].size
        # Each number by itself before their sums, which may be beyond what an int64 holds.
        strange = offsets.min() < 0 or sizes.min() < 1 or max(offsets.max(), sizes.max()) > limit
        if strange or (offsets[1:] < ends[:-1]).any() or ends[-1] > limit:
            raise self._bad_index("it does not fit its shards")
        return _Span(
            shard=shard,
            ids=np.arange(first, stop),
            offset=int(offsets[0]),
            size=int(ends[-1] - offsets[0]),
            places=offsets - offsets[0],
            sizes=sizes,
        )

    def _bad_index(self, what: str) -> UserError:
        return UserError(f"{self.shards.root / self.shards.split(self.split).index_name}: {what}: {AGAIN}")

    def _fill(self, target: memoryview, span: _Span) -> None:
        path = self.shards.root / self.shards.split(self.split).shards[span.shard].name
        with opened_shard(path) as descriptor:
            stamp = stamp_of(os.fstat(descriptor))
            if stamp != self.stamps[span.shard]:
                self._check_again(span.shard)
                self.stamps[span.shard] = stamp
            done = 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], span.offset + done)
                if not count:
                    raise UserError(f"{path}: cut short while it was read: {AGAIN}")
                done += count

    def _check_again(self, shard: int) -> None:
        claim = self.shards.files([self.split])[1 + shard]
        finding = examine(claim)
        if finding.status != WHOLE:
            raise UserError(f"{claim.path}: {finding.status} since the launch: {finding.detail}: {AGAIN}")

    def decode(self, block: Block, places: Sequence[int] | np.ndarray, out: Tensor) -> None:
        """Decodes the samples at ``places`` of a block into ``out``, uint8 (len(places), H, W, 3) on the CPU.

        PNGs that are plain by their header go through torchvision's decoder, which releases the interpreter's
        lock; it gives the pixels of `decode_png` (a test compares them), which takes, or names, all others.
        Raises `UserError`.
        """
        height, width, channels = self.image_shape
        shape = torch.Size((channels, height, width))
        group = max(1, _SERIAL_COPY // (height * width * channels))
        data, mode = block.data, ImageReadMode.UNCHANGED.value
        # torchvision.io.decode_png without its checks of what is known here: a fifth faster on images of this size.
        decode = torch.ops.image.decode_png
        images: list[Tensor] = []
        start = 0
        chosen = np.asarray(places)
        spans = zip(
            block.offsets[chosen].tolist(), block.sizes[chosen].tolist(), block.plain[chosen].tolist(), strict=True
        )
        for row, (offset, size, plain) in enumerate(spans):
            png = data[offset : offset + size]
            image = None
            if plain:
                try:
                    image = decode(png, mode, False)
                except RuntimeError:
                    # A broken PNG, which decode_png below names.
                    image = None
            if image is None or image.shape != shape or image.dtype != torch.uint8:
                pixels = decode_png(png.numpy().tobytes(), self.origin(int(block.ids[chosen[row]])), (height, width))
                image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
            images.append(image.permute(1, 2, 0))
            if len(images) == group:
                torch.stack(images, out=out[start : row + 1])
                images, start = [], row + 1
        if images:
            torch.stack(images, out=out[start:])

    def origin(self, sample: int) -> str:
        """ "shard: key" of a sample, for messages."""
        shard = int(np.searchsorted(self.first_ids, sample, side="right")) - 1
        name = self.shards.split(self.split).shards[shard].name
        return f"{self.shards.root / name}: {self.shards.keys(self.split, [sample])[0]}.png"


@contextmanager
def set_entry(cache_dir: Path, shards: ShardSet) -> Iterator[Path]:
    """Holds the lock of a packed set's entry in the cache and gives its folder, which is there."""
    manifest = shards.manifest
    name = manifest.identity[:16]
    about = {"identity": manifest.identity, "description": manifest.description, "source": str(shards.root.absolute())}
    with entry_lock(cache_dir, "sets", name):
        yield make_entry(cache_dir, "sets", name, about)


def open_split(shards: ShardSet, split: str, *, record: Path | None, progress: Progress | None = None) -> SplitReader:
    """Checks every file of a split and opens it for reading; ``record`` is that of `ShardSet.check`.

    ``progress(done, total)`` counts images whose bytes are known to be whole. Raises `UserError` naming the first file
    that is missing, cut or changed.
    """
    # Before the check: what changes after it is then told by its stamp.
    stamps = [_stamp_now(claim.path) for claim in shards.files([split])[1:]]
    count = shards.split(split).count

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(done * count // max(1, total), count)

    shards.check([split], record=record, progress=tell)
    return SplitReader(
        shards=shards,
        split=split,
        index=shards.index(split),
        first_ids=shards.shard_starts(split),
        stamps=stamps,
    )


def _is_plain(data: np.ndarray, offsets: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Whether a PNG of 8-bit RGB, not interlaced, of that (height, width) starts at each offset."""
    height, width = image_size
    # Signature and IHDR, PNG specification (third edition), 5.2 and 11.2.1.
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    # The last PNGs of a damaged set may end before their header does.
    reach = np.minimum(offsets[:, None] + np.arange(len(head)), len(data) - 1)
    return (data[reach] == np.frombuffer(head, dtype=np.uint8)).all(axis=1)


def _stamp_now(path: Path) -> list[int]:
    try:
        return stamp_of(path.stat())
    except OSError:
        return []  # the check that follows names the file
