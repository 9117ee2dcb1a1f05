"""The splits of a packed set: cut from the counts of a source, and filled with its images in a temporary file.

A source yields its images in the order that is cheapest for it; a set is hashed in key order and stored in a permuted
order. With the file, packing needs some 20 bytes of memory per image and holds no image.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from itertools import chain, islice
from pathlib import Path

import numpy as np

from mnistm_dist.data.image_io import encode_png, png_size
from mnistm_dist.data.parallel import Progress, ordered_map, workers_for
from mnistm_dist.data.sources.base import SPLITS, Sample, Source
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors

_CHUNK = 128  # images per encoding task
# Where an image is in the file (bytes; its origin follows its PNG), and its label.
_ROW = np.dtype([("offset", np.int64), ("png_size", np.int32), ("origin_size", np.uint16), ("label", np.int32)])


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
    train, val, test = (source.counts.get(split, 0) for split in SPLITS)
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
    digits, test_digits = (max(8, len(str(count - 1))) for count in (train + val, test))
    parts = [
        Part(name="train", source_split="train", start=0, count=train, first_number=0, digits=digits),
        Part(name="val", source_split=val_split, start=val_start, count=val, first_number=train, digits=digits),
        Part(name="test", source_split="test", start=0, count=test, first_number=0, digits=test_digits),
    ]
    return {part.name: part for part in parts if part.count}


def count_shards(part: Part, train: Part, train_shards: int) -> int:
    """Return how many shards a split gets: in proportion to train's, at least one, never more than it has samples."""
    in_proportion = (2 * train_shards * part.count + train.count) // (2 * train.count)  # rounded half up
    return min(max(1, in_proportion), part.count)


def spool_images(
    source: Source, parts: dict[str, Part], file: FileIO, folder: Path, progress: Progress
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """Write all images of the source to an open file in ``folder``: PNG bytes are kept, arrays are encoded in parallel.

    Return for each part a row for `read_image` of each image, in key order, with its ``label``; and the (height, width)
    of all images, pixels. Raises `UserError` naming the sample that is not an accepted image or has another size than
    the others, as `Source.samples` does, and if the disk is full.
    """
    rows = {split: np.zeros(count, dtype=_ROW) for split, count in source.counts.items()}
    total, offset, first, image_size = sum(source.counts.values()), 0, "", (0, 0)
    for done, sample in enumerate(_with_pngs(source.samples(), total), start=1):
        assert sample.png is not None
        size = png_size(sample.png, sample.origin)
        if not first:
            image_size, first = size, sample.origin
        elif size != image_size:
            raise UserError(
                f"{sample.origin}: {size[0]} x {size[1]} pixels, but {first} has {image_size[0]} x {image_size[1]}: "
                "all images of a set have one size, so resize them"
            )
        origin = sample.origin.encode("utf-8", "surrogateescape")[:65_535]
        rows[sample.split][sample.index] = (offset, len(sample.png), len(origin), sample.label)
        offset += len(sample.png) + len(origin)
        rest = memoryview(sample.png + origin)
        with explain_os_errors(folder):
            while rest:
                rest = rest[file.write(rest) :]
        progress(done, total)
    return {
        name: rows[part.source_split][part.start : part.start + part.count] for name, part in parts.items()
    }, image_size


def read_image(file: FileIO, row: np.void) -> tuple[bytes, str]:
    """Return the PNG of the image of a row of `spool_images`, and its origin."""
    offset, size, origin_size, _ = row.item()
    data = os.pread(file.fileno(), size + origin_size, offset)
    return data[:size], data[size:].decode("utf-8", "surrogateescape")


def _with_pngs(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    """Return the samples with their pixels encoded, in parallel if the first one has pixels."""
    chunks = iter(lambda: list(islice(samples, _CHUNK)), [])
    first = next(chunks, [])
    workers = workers_for(count) if first and first[0].png is None else 0
    return chain.from_iterable(ordered_map(_encode, chain([first], chunks), workers=workers))


def _encode(samples: list[Sample]) -> list[Sample]:
    return [sample if sample.pixels is None else _encode_one(sample, sample.pixels) for sample in samples]


def _encode_one(sample: Sample, pixels: np.ndarray) -> Sample:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{sample.origin}: {pixels.dtype} {pixels.shape}; accepted is uint8 (height, width, 3)")
    return replace(sample, png=encode_png(pixels), pixels=None)
