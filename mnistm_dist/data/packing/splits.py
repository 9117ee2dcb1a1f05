"""Which of a source's images become which split of a packed set, and the keys that they get: by the counts alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnistm_dist.data.sources.base import Source
from mnistm_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of the set: a stretch of one of the source's splits."""

    name: str
    source_split: str
    start: int
    """Place of its first sample in the source's split."""
    count: int
    first_number: int
    """Number of its first key; the keys number on in the source's order."""
    digits: int
    """Digits of a key."""

    def keys(self, places: np.ndarray) -> list[str]:
        """The keys of the samples at these places of the part."""
        letter = "t" if self.name == "test" else ""
        return [f"{letter}{self.first_number + place:0{self.digits}d}" for place in places.tolist()]


def cut_splits(source: Source, val_size: int | None = None) -> dict[str, Part]:
    """The splits of the set, in manifest order.

    A source that brings no val gives the last of its train: ``val_size`` of them, else as many as its own rule says,
    else a tenth. Train and val number on together, so that keys sort in the source's order over both. Raises
    `UserError` where there would be no train or no val, or where a val size is asked of a source with a val of its own.
    """
    counts = {split: count for split, count in source.counts.items() if count}
    if "train" not in counts:
        raise UserError(f"{source.description}: it brings no training images, and a packed set needs them")
    train = counts["train"]
    if "val" in counts:
        if val_size is not None:
            raise UserError(
                f"{source.description}: it brings {counts['val']:,} val images of its own: leave out the val size"
            )
        val_split, val_start, val = "val", 0, counts["val"]
    else:
        own = source.val_size() if val_size is None else val_size
        val = max(1, train // 10) if own is None else own
        if not 1 <= val < train:
            accepted = f"1 to {train - 1:,} of them can become val" if train > 1 else "at least 2 are needed"
            raise UserError(f"val size {val} of {train:,} training images: {accepted}")
        train -= val
        val_split, val_start = "train", train
    digits = _digits(train + val)
    parts = {
        "train": Part(name="train", source_split="train", start=0, count=train, first_number=0, digits=digits),
        "val": Part(name="val", source_split=val_split, start=val_start, count=val, first_number=train, digits=digits),
    }
    if "test" in counts:
        test = counts["test"]
        parts["test"] = Part(
            name="test", source_split="test", start=0, count=test, first_number=0, digits=_digits(test)
        )
    return parts


def count_shards(part: Part, train: Part, train_shards: int) -> int:
    """How many shards a split gets: in proportion to train's, at least one, never more than it has samples."""
    in_proportion = (2 * train_shards * part.count + train.count) // (2 * train.count)  # rounded half up
    return min(max(1, in_proportion), part.count)


def _digits(count: int) -> int:
    return max(8, len(str(count - 1)))
