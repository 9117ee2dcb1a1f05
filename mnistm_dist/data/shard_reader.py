"""Samples of one split, read from its shards and decoded to uint8 tensors.

Every file is checked before the first read (`ShardSet.check`); a shard that has changed since then is hashed again when
it is next opened.
"""

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice, starmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode

from mnistm_dist.data.cache import cache_entry
from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.manifest import REPAIR
from mnistm_dist.data.parallel import Progress, stage
from mnistm_dist.data.shards import OK, Block, ShardSet, examine, stamp_of
from mnistm_dist.errors import UserError

# torch copies more elements than this in several threads; decoding has threads of its own.
_SERIAL_COPY = 32_768


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitReader:
    """Reads and decodes samples of one split. Safe to use from many threads."""

    shards: ShardSet
    split: str
    index: np.ndarray
    """The split's index, mapped: rows of `index_dtype`, (count,)."""
    pin_memory: bool
    """Whether images are decoded to page-locked memory, for asynchronous copies to a GPU."""
    stamps: list[list[int]] = field(repr=False)
    """`stamp_of` each shard when it was last known to be intact."""

    @property
    def count(self) -> int:
        """Samples in the split."""
        return len(self.index)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of every image."""
        return (*self.shards.manifest.image_size, 3)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Return the labels of samples, int64 (n,). Raises `UserError` for one that is not a class."""
        return self.shards.labels(self.split, self.index[ids])

    def read(self, ids: np.ndarray) -> Block:
        """Read the PNGs of samples, int64 (n,). Raises `UserError` naming a shard that is missing or damaged."""
        return self.shards.read_block(self.split, ids, self.index, self._verify)

    def _verify(self, shard: int, descriptor: int) -> None:
        stamp = stamp_of(os.fstat(descriptor))
        if stamp != self.stamps[shard]:
            claim = self.shards.split(self.split).shards[shard]
            path = self.shards.root / claim.name
            finding = examine(path, claim, {})
            if finding.status != OK:
                raise UserError(f"{path}: {finding.status} since the launch: {finding.detail}; {REPAIR}")
            self.stamps[shard] = stamp

    def empty(self, count: int) -> Tensor:
        """Return memory for ``count`` images, uint8 (count, H, W, 3)."""
        return torch.empty((count, *self.image_shape), dtype=torch.uint8, pin_memory=self.pin_memory)

    def load(self, ids: np.ndarray) -> Tensor:
        """Read and decode samples, int64 (n,), to uint8 (n, H, W, 3). Raises `UserError`."""
        images = self.empty(len(ids))
        self.decode(self.read(ids), np.arange(len(ids)), images)
        return images

    def decode(self, block: Block, places: Sequence[int] | np.ndarray, out: Tensor) -> None:
        """Decode the samples at ``places`` of a block into ``out``, uint8 (len(places), H, W, 3) on the CPU.

        PNGs with the expected header go through torchvision's decoder, which releases the interpreter's lock and gives
        the pixels of `decode_png` (a test compares them). `decode_png` handles, or refuses, all others. Raises
        `UserError`.
        """
        height, width, channels = self.image_shape
        shape = torch.Size((channels, height, width))
        group = max(1, _SERIAL_COPY // (height * width * channels))
        data, mode = torch.from_numpy(block.data), ImageReadMode.UNCHANGED.value
        # torchvision.io.decode_png without its argument checks: a fifth faster on images of this size.
        decode = torch.ops.image.decode_png

        def image(sample: int, offset: int, size: int, plain: bool) -> Tensor:
            png = data[offset : offset + size]
            with contextlib.suppress(RuntimeError):  # a broken PNG: decode_png names it
                if plain and (pixels := decode(png, mode, False)).shape == shape:
                    return pixels.permute(1, 2, 0)
            return torch.tensor(decode_png(png.numpy().tobytes(), self.origin(sample), (height, width)))

        columns = (block.ids, block.offsets, block.sizes, block.plain)
        rows = zip(*(column[places].tolist() for column in columns), strict=True)
        for first in range(0, len(out), group):
            torch.stack(list(starmap(image, islice(rows, group))), out=out[first : first + group])

    def origin(self, sample: int) -> str:
        """Return "shard: key.png" of a sample, for messages."""
        entry = self.shards.split(self.split)
        shard = entry.shards[int(np.searchsorted(entry.shard_starts, sample, side="right")) - 1]
        return f"{self.shards.root / shard.name}: {self.shards.keys(self.split, [sample])[0]}.png"


def set_entry(cache_dir: Path, shards: ShardSet) -> AbstractContextManager[Path]:
    """Hold the lock of a packed set's cache entry and yield its folder: see `cache_entry`."""
    return cache_entry(cache_dir, "sets", shards.manifest.identity[:16])


def open_split(
    shards: ShardSet, split: str, *, record: Path, pin_memory: bool = False, progress: Progress | None = None
) -> SplitReader:
    """Check every file of a split and open it for reading; ``record`` as in `ShardSet.check`.

    ``progress(done, total)`` counts images whose bytes are known to be intact. Raises `UserError` naming the first file
    that is missing, truncated or changed.
    """
    # Before the check, so that a change after it shows. The check names a file that is missing.
    _, *paths = shards.files([split])
    stamps = [stamp_of(path.stat()) if path.exists() else [] for path in paths]
    shards.check([split], record=record, progress=stage(progress, 0, 1, shards.split(split).count))
    return SplitReader(shards=shards, split=split, index=shards.index(split), pin_memory=pin_memory, stamps=stamps)
