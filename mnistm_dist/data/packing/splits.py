"""The splits of a packed set: cut from the counts of a source, and filled with its images in a temporary file.

A source yields its images in the order that is cheapest for it; a set is hashed in key order and stored in a permuted
order. With the file, packing needs some 20 bytes of memory per image and holds no image. PNGs of 8-bit RGB are kept
byte for byte; all other image files, and arrays, become such PNGs.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from itertools import chain
from pathlib import Path

import numpy as np

from mnistm_dist.data.image_io import convert_to_png, encode_png, is_plain_png, png_size, resize_and_crop
from mnistm_dist.data.parallel import Progress, ordered_map, workers_for
from mnistm_dist.data.sources.base import SPLITS, Sample, Source
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors

_CHUNK, _CHUNK_BYTES = 128, 4 << 20  # images, and about so many bytes, per encoding task
_Png = tuple[Sample, str, int]  # a sample with an accepted PNG; if it was converted: what it was before, and its bytes
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
    source: Source, parts: dict[str, Part], file: FileIO, folder: Path, progress: Progress, resize: int | None = None
) -> tuple[dict[str, np.ndarray], tuple[int, int], tuple[str, ...]]:
    """Write all images of the source to an open file in ``folder``: accepted PNGs are kept, others converted.

    With ``resize``, images of another size than ``resize`` x ``resize`` are scaled and cropped to it. Return for each
    part a row for `read_image` of each image, in key order, with its ``label``; the (height, width) of all images,
    pixels; and a note if images were converted. Raises `UserError` naming the sample that is no accepted image or has
    another size than the others, as `Source.samples` does, and if the disk is full.
    """
    rows = {split: np.zeros(count, dtype=_ROW) for split, count in source.counts.items()}
    total, offset, first, image_size = sum(source.counts.values()), 0, "", (0, 0)
    converted: Counter[str] = Counter()
    before = after = 0
    for done, (sample, form, file_size) in enumerate(_with_pngs(source.samples(), total, resize), start=1):
        png = sample.encoded
        assert png is not None
        size = png_size(png, sample.origin)
        if not first:
            image_size, first = size, sample.origin
        elif size != image_size:
            raise UserError(
                f"{sample.origin}: {size[0]} x {size[1]} pixels, but {first} has {image_size[0]} x {image_size[1]}: "
                "all images of a set have one size: add --resize N"
            )
        if form:
            converted[form] += 1
            before, after = before + file_size, after + len(png)
        origin = sample.origin.encode("utf-8", "surrogateescape")[:65_535]
        rows[sample.split][sample.index] = (offset, len(png), len(origin), sample.label)
        offset += len(png) + len(origin)
        rest = memoryview(png + origin)
        with explain_os_errors(folder):
            while rest:
                rest = rest[file.write(rest) :]
        progress(done, total)
    notes: tuple[str, ...] = ()
    if converted:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in converted.most_common(8))
        notes = (
            f"converted to 8-bit RGB PNG: {kinds}; {before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB "
            f"({after / before:.1f} times)",
        )
    by_part = {name: rows[part.source_split][part.start : part.start + part.count] for name, part in parts.items()}
    return by_part, image_size, notes


def read_image(file: FileIO, row: np.void) -> tuple[bytes, str]:
    """Return the PNG of the image of a row of `spool_images`, and its origin."""
    offset, size, origin_size, _ = row.item()
    data = os.pread(file.fileno(), size + origin_size, offset)
    return data[:size], data[size:].decode("utf-8", "surrogateescape")


def _with_pngs(samples: Iterator[Sample], count: int, resize: int | None) -> Iterator[_Png]:
    """Return the samples as PNGs; in parallel, unless the first ones are kept as they are."""
    chunks = _chunks(samples)
    first = next(chunks, [])
    kept = all(sample.encoded is not None and is_plain_png(sample.encoded, resize) for sample in first)
    work = partial(_encode, resize=resize)
    return chain.from_iterable(ordered_map(work, chain([first], chunks), workers=0 if kept else workers_for(count)))


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += len(sample.encoded) if sample.encoded is not None else sample.pixels.nbytes  # type: ignore[union-attr]
        if len(chunk) == _CHUNK or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _encode(samples: list[Sample], resize: int | None) -> list[_Png]:
    return [_encode_one(sample, resize) for sample in samples]


def _encode_one(sample: Sample, resize: int | None) -> _Png:
    data, pixels = sample.encoded, sample.pixels
    if data is not None and is_plain_png(data, resize):
        return sample, "", 0
    if data is not None:
        png, form = convert_to_png(data, sample.origin, resize)
        return replace(sample, encoded=png), form, len(data)
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = "no image" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise UserError(f"{sample.origin}: {found}; accepted is uint8 (height, width, 3)")
    return replace(sample, encoded=encode_png(resize_and_crop(pixels, resize)), pixels=None), "", 0
