"""The splits of a packed set and the keys of its images, from the counts of the source alone."""

from dataclasses import dataclass

import numpy as np

from mnistm_dist.data.sources.base import Source
from mnistm_dist.errors import UserError

# The groups of splits whose pixels are hashed in key order, across the splits of a group.
PIXEL_GROUPS = {"train+val": ("train", "val"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of the set: a range of one of the source's splits."""

    name: str
    source_split: str
    start: int
    """Place of its first sample in the source's split."""
    count: int
    first_number: int
    """Number of its first key; the others follow in the source's order."""
    digits: int
    """Digits of a key."""

    def keys(self, places: np.ndarray) -> list[str]:
        """Return the keys of the samples at these places of the part."""
        letter = "t" if self.name == "test" else ""
        return [f"{letter}{self.first_number + place:0{self.digits}d}" for place in places.tolist()]


def cut_splits(source: Source, val_size: int | None = None) -> dict[str, Part]:
    """Return the splits of the set, in manifest order.

    If the source has no val, the last part of its train becomes val: ``val_size`` images if given, else as many as the
    source's own rule says, else a tenth. Keys count through train and val, so that they sort in the source's order over
    both. Raises `UserError` if train or val would be empty, or if ``val_size`` is given for a source with its own val.
    """
    counts = {split: count for split, count in source.counts.items() if count}
    train, val, test = (counts.get(split, 0) for split in ("train", "val", "test"))
    if not train:
        raise UserError(f"{source.description}: no training images; a packed set needs them")
    if val and val_size is not None:
        raise UserError(f"{source.description}: has its own val split of {val:,} images: leave out the val size")
    val_split, val_start = "val", 0
    if not val:
        own = source.val_size() if val_size is None else val_size
        val = max(1, train // 10) if own is None else own
        if not 1 <= val < train:
            accepted = f"1 to {train - 1:,} of them can become val" if train > 1 else "at least 2 are needed"
            raise UserError(f"val size {val} of {train:,} training images: {accepted}")
        train -= val
        val_split, val_start = "train", train
    digits = _digits(train + val)
    parts = [
        Part(name="train", source_split="train", start=0, count=train, first_number=0, digits=digits),
        Part(name="val", source_split=val_split, start=val_start, count=val, first_number=train, digits=digits),
        Part(name="test", source_split="test", start=0, count=test, first_number=0, digits=_digits(test)),
    ]
    return {part.name: part for part in parts if part.count}


def count_shards(part: Part, train: Part, train_shards: int) -> int:
    """Return how many shards a split gets: in proportion to train's, at least one, never more than it has samples."""
    in_proportion = (2 * train_shards * part.count + train.count) // (2 * train.count)  # rounded half up
    return min(max(1, in_proportion), part.count)


def _digits(count: int) -> int:
    return max(8, len(str(count - 1)))
