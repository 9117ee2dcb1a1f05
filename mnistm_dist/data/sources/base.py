"""A source of labelled images, and the one place that reads names of splits and classes, and labels."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mnistm_dist.errors import UserError

# Class names; a label is an index into them.
CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
# Split names, in the order in which splits are packed and listed in a manifest.
SPLITS = ("train", "val", "test")
# Images of the training split that Ganin and Lempitsky published, and of its end, which is val here: 55,000 remain.
_OFFICIAL_TRAIN_SIZE, _OFFICIAL_VAL_SIZE = 59_001, 4_001


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image as its source holds it: PNG bytes or pixels."""

    split: str
    """`train`, `val` or `test`."""
    index: int
    """Position within its split, 0 to n - 1, in the source's order. Samples may be read in any order."""
    label: int
    """Index into `CLASSES`."""
    png: bytes | None = None
    """The source's own PNG bytes, unchanged and not yet checked; None if the source holds pixels."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3), RGB; None if the source holds PNGs."""
    origin: str
    """`FILE: MEMBER`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of labelled images on disk: opened and indexed, its images not yet read."""

    layout: str
    """A key of `catalog.KNOWN_LAYOUTS`."""
    description: str
    """One line: which files the images come from."""
    counts: Mapping[str, int]
    """Number of images per split, in the order of `SPLITS`."""
    read: Callable[[], Iterator[Sample]] = field(repr=False)
    """Yield every sample once, in whatever order is cheapest; raise `UserError` if one is broken."""
    lineage: str | None = None
    """`official` or `regenerated` if the layout implies it, else None."""
    notes: tuple[str, ...] = ()
    """One line per thing that was left out, to be shown to the user."""

    def samples(self) -> Iterator[Sample]:
        """Yield every sample of every split once, in any order, in memory of one byte per image.

        Raises `UserError` for a label out of range, and if the samples are not those that were counted when the source
        was opened.
        """
        unread = {split: np.ones(count, dtype=bool) for split, count in self.counts.items()}
        for sample in self.read():
            if not 0 <= sample.label < len(CLASSES):
                raise UserError(f"{sample.origin}: label {sample.label}; accepted are 0 to {len(CLASSES) - 1}")
            left = unread[sample.split]
            if not 0 <= sample.index < len(left) or not left[sample.index]:
                raise UserError(f"{sample.origin}: {self.description} has changed since it was opened; run again")
            left[sample.index] = False
            yield sample
        for split, left in unread.items():
            if left.any():
                raise UserError(f"{self.description}: {left.sum()} of {len(left)} {split} images are gone; run again")

    def val_size(self) -> int | None:
        """Return how many of the last train samples become val by the official split, or None if it does not apply.

        It applies to a train split of the official size, in any layout, unless the source has a val split of its own.
        """
        applies = "val" not in self.counts and self.counts.get("train") == _OFFICIAL_TRAIN_SIZE
        return _OFFICIAL_VAL_SIZE if applies else None


_SPLIT = re.compile(r"(?<![a-z])(?:(train|training)|(val|valid|validation|dev)|(test|testing))(?![a-z])", re.IGNORECASE)


def split_of(name: str, *, whole: bool = False) -> str | None:
    """Return the split that a file or folder name contains, or None. ``whole``: the name must be that word alone."""
    match = _SPLIT.fullmatch(name) if whole else _SPLIT.search(name)
    return None if match is None else SPLITS[int(match.lastindex or 1) - 1]


def group_by_split(files: Iterable[Path]) -> list[dict[str, list[Path]]]:
    """Group files into sets, and those of each set by split, sorted by name.

    The names of one set are the same up to the split's name. Files whose names contain no split are left out.
    """
    sets: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(files):
        if (split := split_of(file.name)) is not None:
            sets.setdefault(_SPLIT.split(file.name)[0], {}).setdefault(split, []).append(file)
    return [{split: found[split] for split in SPLITS if split in found} for found in sets.values()]


def parse_label(origin: str, text: str) -> int:
    """Return the label that a text stands for. Raises `UserError` if it is no class name."""
    if text not in CLASSES:
        raise UserError(f"{origin}: label {text[:20]!r}; accepted are 0 to {len(CLASSES) - 1}")
    return CLASSES.index(text)


def check_labels(origin: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels as int64 (count,).

    Accepted are whole numbers of shape (count,), (count, 1) or (1, count), and one-hot rows (count, classes). Raises
    `UserError` for anything else and for a label out of range.
    """
    values = np.asarray(labels)
    if values.shape == (count, len(CLASSES)) and values.dtype.kind in "iuf":
        if not (np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()):
            raise UserError(f"{origin}: rows that are not one-hot; each row needs a single 1")
        values = values.argmax(axis=1)
    if values.shape in ((count, 1), (1, count)):
        values = values.reshape(-1)
    if values.shape != (count,) or values.dtype.kind not in "iuf":
        raise UserError(f"{origin}: {values.dtype} of shape {values.shape}; expected {count} whole numbers")
    for index in np.flatnonzero(~np.isin(values, np.arange(len(CLASSES)))):
        raise UserError(f"{origin}: label {values[index]} at index {index}; accepted are 0 to {len(CLASSES) - 1}")
    return values.astype(np.int64)
