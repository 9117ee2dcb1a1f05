"""The pixels of a set, decoded in key order: checked one by one, summed and counted exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mnistm_dist.data.image_io import check_png, decode_png
from mnistm_dist.data.manifest import PIXEL_GROUPS
from mnistm_dist.data.parallel import ordered_map, workers_for
from mnistm_dist.data.progress import Progress

_CHUNK_BYTES = 1 << 20
"""PNGs and pixels that a worker takes on at once: some 200 images of MNIST-M."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One image to decode."""

    split: str
    png: bytes
    origin: str
    """"file: member", for messages."""


@dataclass(frozen=True, kw_only=True)
class PixelSums:
    """What the pixels of a set add up to."""

    groups: dict[str, str]
    """sha256 of all RGB bytes in key order, of "train+val" and of "test"."""
    splits: dict[str, str]
    """The same, of each split."""
    moments: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]]
    """(mean, standard deviation) of each split, per channel, on a scale of 0 to 1."""


def sum_pixels(images: Iterable[Encoded], *, count: int, size: tuple[int, int], progress: Progress) -> PixelSums:
    """Checks and decodes images in key order (train, val, test), in parallel, and sums them up.

    ``count`` is how many there are, ``size`` the (height, width) that each must have; what is held at once is bounded.
    ``progress(done, total)`` counts images. Raises `UserError` naming the first image that is none or of another size.
    """
    groups: dict[str, hashlib._Hash] = {}
    splits: dict[str, hashlib._Hash] = {}
    histograms: dict[str, np.ndarray] = {}
    done = 0
    tasks = ((chunk, size) for chunk in _chunks(images, 3 * size[0] * size[1]))
    for split, pixels, histogram in ordered_map(_decode_chunk, tasks, workers=workers_for(count)):
        group = next(name for name, members in PIXEL_GROUPS.items() if split in members)
        for name, hashes in ((group, groups), (split, splits)):
            hashes.setdefault(name, hashlib.sha256()).update(pixels.data)
        histograms[split] = histograms.get(split, 0) + histogram
        done += len(pixels)
        progress(done, count)
    return PixelSums(
        groups={name: digest.hexdigest() for name, digest in groups.items()},
        splits={name: digest.hexdigest() for name, digest in splits.items()},
        moments={name: moments_of(histogram) for name, histogram in histograms.items()},
    )


def channel_histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each value stands in each channel of uint8 (..., 3): int64 (3, 256)."""
    return np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]).astype(np.int64)


def moments_of(histogram: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation (of the population) per channel, on a scale of 0 to 1, of a `channel_histogram`.

    Sums of integers, one division each: the same floats on every machine and for every number of workers.
    """
    means, stds = [], []
    for counts in histogram.tolist():
        count = sum(counts)
        total = sum(value * times for value, times in enumerate(counts))
        squares = sum(value * value * times for value, times in enumerate(counts))
        means.append(total / (255 * count))
        stds.append(math.sqrt((count * squares - total * total) / (255 * 255 * count * count)))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def _chunks(images: Iterable[Encoded], pixel_bytes: int) -> Iterator[list[Encoded]]:
    """The images in lists, each of one split and bounded in what it holds, encoded and decoded together."""
    chunk: list[Encoded] = []
    held = 0
    for image in images:
        if chunk and (image.split != chunk[0].split or held >= _CHUNK_BYTES):
            yield chunk
            chunk, held = [], 0
        chunk.append(image)
        held += len(image.png) + pixel_bytes
    if chunk:
        yield chunk


def _decode_chunk(task: tuple[list[Encoded], tuple[int, int]]) -> tuple[str, np.ndarray, np.ndarray]:
    """The split, the pixels uint8 (n, H, W, 3) and their `channel_histogram` of images of one size."""
    images, size = task
    pixels = np.empty((len(images), *size, 3), dtype=np.uint8)
    for place, image in enumerate(images):
        check_png(image.png, image.origin)
        pixels[place] = decode_png(image.png, image.origin, size)
    return images[0].split, pixels, channel_histogram(pixels)
