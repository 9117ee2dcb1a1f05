"""All images of a source in one temporary file, in the order in which they come, found by split and place.

A source yields its images in the order that is cheapest for it; a set is hashed in key order and stored in a permuted
order. With the spool, packing needs some 20 bytes of memory per image and holds no image.
"""

import dataclasses
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mnistm_dist.data.image_io import encode_png, png_size
from mnistm_dist.data.parallel import ordered_map, workers_for
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors

_CHUNK = 128  # images per encoding task, and between two reports of progress
# Where an image is in the file (bytes; its origin follows its PNG), and its label.
_PLACE = np.dtype([("offset", np.int64), ("png_size", np.int32), ("origin_size", np.uint16), ("label", np.int32)])


class Spool:
    """A source's images on disk, in an open file."""

    def __init__(self, path: Path, file: BinaryIO, source: Source) -> None:
        self._path, self._file, self._source = path, file, source
        self.places = {split: np.zeros(count, dtype=_PLACE) for split, count in source.counts.items()}
        """`_PLACE` of each image of the source's splits."""
        self.image_size = (0, 0)
        """(height, width) of all images, pixels; (0, 0) while there are none."""

    def fill(self, progress: Progress) -> None:
        """Read all of the source: PNG bytes are kept, arrays are encoded in parallel.

        Raises `UserError` naming the sample that is not an accepted image or has another size than the others, as
        `Source.samples` does, and if the disk is full.
        """
        total, offset, first = sum(self._source.counts.values()), 0, ""
        pending: list[bytes] = []
        for done, sample in enumerate(_with_pngs(self._source.samples(), total), start=1):
            assert sample.png is not None
            size = png_size(sample.png, sample.origin)
            if not first:
                self.image_size, first = size, sample.origin
            elif size != self.image_size:
                raise UserError(
                    f"{sample.origin}: {size[0]} x {size[1]} pixels, but {first} has {self.image_size[0]} x "
                    f"{self.image_size[1]}: all images of a set have one size, so resize them"
                )
            origin = sample.origin.encode("utf-8", "surrogateescape")[:65_535]
            self.places[sample.split][sample.index] = (offset, len(sample.png), len(origin), sample.label)
            offset += len(sample.png) + len(origin)
            pending += [sample.png, origin]
            if done % _CHUNK == 0 or done == total:
                with explain_os_errors(self._path):
                    self._write(b"".join(pending))
                pending.clear()
                progress(done, total)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, split: str, index: int) -> tuple[bytes, str]:
        """Return the PNG of one image of a source's split, and its origin."""
        offset, size, origin_size, _ = self.places[split][index].item()
        data = os.pread(self._file.fileno(), size + origin_size, offset)
        return data[:size], data[size:].decode("utf-8", "surrogateescape")


def _with_pngs(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    """Yield the samples with their pixels encoded, in parallel if the first one has pixels."""
    first = next(samples, None)
    if first is None:
        return
    samples = chain([first], samples)
    workers = workers_for(count) if first.png is None else 0
    chunks = iter(lambda: list(islice(samples, _CHUNK)), [])
    for chunk in ordered_map(_encode, chunks, workers=workers):
        yield from chunk


def _encode(samples: list[Sample]) -> list[Sample]:
    return [sample if sample.pixels is None else _encode_one(sample, sample.pixels) for sample in samples]


def _encode_one(sample: Sample, pixels: np.ndarray) -> Sample:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{sample.origin}: {pixels.dtype} {pixels.shape}; accepted is uint8 (height, width, 3)")
    return dataclasses.replace(sample, png=encode_png(pixels), pixels=None)
