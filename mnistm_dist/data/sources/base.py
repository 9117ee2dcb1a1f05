"""What a source of MNIST-M gives: samples, one at a time, and what is known of them beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from mnistm_dist.errors import UserError

CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
"""The names of the classes; a label is the place of its class here."""
SPLITS = ("train", "val", "test")
"""The names of the splits, in the order in which they are packed and stand in a manifest."""
OFFICIAL_TRAIN_SIZE = 59_001
"""Images in the training split that Ganin and Lempitsky published."""
OFFICIAL_VAL_SIZE = 4_001
"""How many of them, the last ones, are this project's validation split: 55,000 are left to train on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image, as its source holds it: either PNG bytes or pixels."""

    split: str
    """`train`, `val` or `test`."""
    index: int
    """Place within its split, 0 to n - 1, in the source's order; samples may come in any order."""
    label: int
    """Place of its class in `CLASSES`."""
    png: bytes | None = None
    """The source's own PNG bytes, untouched and not yet looked into; None where it holds pixels."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3), RGB; None where the source holds PNGs."""
    origin: str
    """`file: member`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of MNIST-M somewhere on disk, opened and looked through, its images not yet read."""

    layout: str
    """How it is laid out: a key of `sources.KNOWN_LAYOUTS`."""
    description: str
    """One line: where it came from."""
    counts: Mapping[str, int]
    """Images in each split that it brings, in the order of `SPLITS`."""
    read: Callable[[], Iterator[Sample]] = field(repr=False)
    """Reads every sample once, in whatever order is cheapest; raises UserError at what is broken."""
    lineage: str | None = None
    """`official` or `regenerated` where the layout itself implies it, else None."""
    notes: tuple[str, ...] = ()
    """One line each: what was left out or turned into something else, for a person to see."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it brings, of train, val and test, in this order."""
        return tuple(split for split in SPLITS if split in self.counts)

    def samples(self) -> Iterator[Sample]:
        """Yields every sample of every split once, in any order.

        Memory does not grow with the images, only by one byte for each: the record of what has been seen. Raises
        UserError for a label that is no class, and where the samples are not those that were counted at the opening.
        """
        seen = {split: np.zeros(count, dtype=bool) for split, count in self.counts.items()}
        for sample in self.read():
            if not 0 <= sample.label < len(CLASSES):
                raise UserError(f"{sample.origin}: label {sample.label}; accepted are 0 to {len(CLASSES) - 1}")
            places = seen[sample.split]
            if not 0 <= sample.index < len(places) or places[sample.index]:
                raise UserError(f"{sample.origin}: not there when {self.description} was opened; it changed meanwhile")
            places[sample.index] = True
            yield sample
        for split, places in seen.items():
            if not places.all():
                missing = int(len(places) - places.sum())
                raise UserError(
                    f"{self.description}: {missing} of {len(places)} {split} images are gone; it changed meanwhile"
                )

    def val_size(self) -> int | None:
        """How many of the last train samples become val by a rule of the set itself; None where it has none.

        The published training split of 59,001 gives its last 4,001, in whatever layout it comes; a source that brings a
        val of its own gives none.
        """
        if "val" not in self.counts and self.counts.get("train") == OFFICIAL_TRAIN_SIZE:
            return OFFICIAL_VAL_SIZE
        return None
