"""Everything that a source gives, in one file in the order of its coming, found again by split and place.

A source yields its images in whatever order is cheapest for it; a set is hashed in key order and stored in a permuted
one. In between they lie here, so that memory holds some 20 bytes per image and no image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mnistm_dist.data.files import OutputFile
from mnistm_dist.data.image_io import encode_png, png_size
from mnistm_dist.data.parallel import in_chunks, ordered_map, workers_for
from mnistm_dist.data.progress import Progress
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.errors import UserError

_CHUNK = 128
"""Images that a worker encodes at once, and between two reports of progress."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the images of one of the source's splits lie; each array has the shape (images,), in the source's order."""

    offset: np.ndarray
    """int64, bytes into the spool."""
    size: np.ndarray
    """int32, bytes of the PNG; its origin follows it."""
    origin_size: np.ndarray
    """uint16, bytes."""
    label: np.ndarray
    """int32."""


class Spool:
    """A source's images on disk."""

    def __init__(self, file: OutputFile, source: Source) -> None:
        self._file = file
        self.source = source
        self.places = {split: _no_places(count) for split, count in source.counts.items()}
        """Of each of the source's splits."""
        self.image_size = (0, 0)
        """(height, width) of every image in it, pixels; (0, 0) while there is none."""

    def fill(self, progress: Progress | None = None) -> None:
        """Takes in all of the source: PNG bytes as they are, arrays encoded in parallel.

        Raises `UserError` naming the sample that is no accepted image or has another size than the others, and as
        `Source.samples`.
        """
        total, first = sum(self.source.counts.values()), ""
        for done, sample in enumerate(_with_pngs(self.source.samples(), total), start=1):
            assert sample.png is not None
            size = png_size(sample.png, sample.origin)
            if not first:
                self.image_size, first = size, sample.origin
            elif size != self.image_size:
                raise UserError(
                    f"{sample.origin}: {size[0]} x {size[1]} pixels, where {first} has {self.image_size[0]} x "
                    f"{self.image_size[1]}: one set holds one image size, so bring them to one"
                )
            self._take(sample, sample.png)
            if progress is not None and (done % _CHUNK == 0 or done == total):
                progress(done, total)
        self._file.flush()

    def png(self, split: str, index: int) -> bytes:
        """The PNG bytes of one image of a source's split."""
        places = self.places[split]
        return self._file.read(int(places.size[index]), int(places.offset[index]))

    def png_and_origin(self, split: str, index: int) -> tuple[bytes, str]:
        """The PNG bytes of one image of a source's split, and where they came from."""
        places = self.places[split]
        size = int(places.size[index])
        data = self._file.read(size + int(places.origin_size[index]), int(places.offset[index]))
        return data[:size], data[size:].decode("utf-8", "surrogateescape")

    def _take(self, sample: Sample, png: bytes) -> None:
        places = self.places[sample.split]
        origin = sample.origin.encode("utf-8", "surrogateescape")[:65_535]
        places.offset[sample.index] = self._file.append(png)
        places.size[sample.index] = len(png)
        places.origin_size[sample.index] = len(origin)
        places.label[sample.index] = sample.label
        self._file.append(origin)


def _no_places(count: int) -> Places:
    return Places(
        offset=np.zeros(count, dtype=np.int64),
        size=np.zeros(count, dtype=np.int32),
        origin_size=np.zeros(count, dtype=np.uint16),
        label=np.zeros(count, dtype=np.int32),
    )


def _with_pngs(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    """The samples, those that hold pixels encoded, in parallel if the first does."""
    first = next(samples, None)
    if first is None:
        return
    samples = chain([first], samples)
    workers = workers_for(count) if first.png is None else 0
    for chunk in ordered_map(_encode, in_chunks(samples, _CHUNK), workers=workers):
        yield from chunk


def _encode(samples: list[Sample]) -> list[Sample]:
    return [sample if sample.png is not None else _encode_one(sample) for sample in samples]


def _encode_one(sample: Sample) -> Sample:
    pixels = sample.pixels
    assert pixels is not None
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"{sample.origin}: {pixels.dtype} {pixels.shape}; accepted is uint8 (height, width, 3)")
    return dataclasses.replace(sample, png=encode_png(pixels), pixels=None)
