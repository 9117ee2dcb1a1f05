"""The pixels of a set, decoded in key order: checked, hashed and counted exactly; and which MNIST-M the hashes prove.

The official hashes are of the archive of Ganin and Lempitsky (``mnist_m.tar.gz``): of all RGB bytes in the order of the
file names, and of its two label files. They do not depend on the encoding of the images or on the layout.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

import numpy as np

from mnistm_dist.data.image_io import check_png, decode_png
from mnistm_dist.data.manifest import PIXEL_GROUPS
from mnistm_dist.data.parallel import Progress, ordered_map, workers_for

# sha256 of the pixels of the official training images and test images.
OFFICIAL_PIXELS = {
    "train+val": "3c689850ded80df111260294d02c79ee0a6e602a9fd634c4e08e1339628f8d33",
    "test": "47415b066fe8a39de3f0e86f65a72d4c4078f1e2557a388ca0a7cfd8dfe90b14",
}
# sha256 of ``mnist_m_train_labels.txt`` and ``mnist_m_test_labels.txt``.
OFFICIAL_LABELS = {
    "train+val": "9e1059c2131453bb9638eeea3bbf46dc552358086f3666c038b4047aaf0a6b68",
    "test": "2e8124bc2a92b483930141f677e09cb1c5a3fe99504e05fe59877d92766d7d61",
}
_CHUNK_BYTES = 1 << 19  # bytes of pixels per decoding task: some 170 images of MNIST-M

Channels = tuple[float, float, float]
Encoded = tuple[str, bytes, str]  # an image to decode: its split, its PNG, and "file: member" for messages


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """Hashes and moments of the pixels of a set."""

    sha256: dict[str, str]
    """sha256 of all RGB bytes in key order, of each split and of each of `PIXEL_GROUPS`."""
    moments: dict[str, tuple[Channels, Channels]]
    """(mean, standard deviation) of each split, per channel, on a scale of 0 to 1."""


def measure_pixels(
    images: Iterable[Encoded], *, count: int, size: tuple[int, int], progress: Progress
) -> PixelStatistics:
    """Check, decode and measure ``count`` images, given in key order (train, val, test), in parallel.

    ``size`` is the (height, width) that each must have. ``progress(done, total)`` counts images. Memory is bounded.
    Raises `UserError` naming the first image that is broken or of another size.
    """
    hashes: defaultdict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
    histograms: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros((3, 256), dtype=np.int64))
    done = 0
    tasks = ((chunk, size) for chunk in _chunks(images, max(1, _CHUNK_BYTES // (3 * size[0] * size[1]))))
    for split, pixels, histogram in ordered_map(_decode_chunk, tasks, workers=workers_for(count)):
        for name in {split, *(group for group, members in PIXEL_GROUPS.items() if split in members)}:
            hashes[name].update(pixels.data)
        histograms[split] += histogram
        done += len(pixels)
        progress(done, count)
    return PixelStatistics(
        sha256={name: digest.hexdigest() for name, digest in hashes.items()},
        moments={name: moments_of(histogram) for name, histogram in histograms.items()},
    )


def channel_histogram(pixels: np.ndarray) -> np.ndarray:
    """Count each value in each channel of uint8 (..., 3): int64 (3, 256)."""
    return np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]).astype(np.int64)


def moments_of(histogram: np.ndarray) -> tuple[Channels, Channels]:
    """Return mean and standard deviation (of the population) per channel, on a scale of 0 to 1, of a
    `channel_histogram`.

    They are sums of integers with one division each: the same floats on every machine, with any number of workers.
    """
    means, stds = [], []
    for counts in histogram.tolist():
        count, total, squares = (sum(value**power * times for value, times in enumerate(counts)) for power in range(3))
        means.append(total / (255 * count))
        stds.append(math.sqrt((count * squares - total * total) / (255 * 255 * count * count)))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def _chunks(images: Iterable[Encoded], count: int) -> Iterator[list[Encoded]]:
    """Yield lists of up to ``count`` images of one split."""
    for _, group in groupby(images, key=itemgetter(0)):
        while chunk := list(islice(group, count)):
            yield chunk


def _decode_chunk(task: tuple[list[Encoded], tuple[int, int]]) -> tuple[str, np.ndarray, np.ndarray]:
    """Return split, pixels uint8 (n, H, W, 3) and their `channel_histogram`, of images of one size."""
    images, size = task
    pixels = np.empty((len(images), *size, 3), dtype=np.uint8)
    for place, (_, png, origin) in enumerate(images):
        check_png(png, origin)
        pixels[place] = decode_png(png, origin, size)
    return images[0][0], pixels, channel_histogram(pixels)


def find_lineage(pixels: dict[str, str], labels: dict[str, np.ndarray], claimed: str | None) -> str:
    """Return "official" if all pixels and labels are the official ones, else what the source claims, else "unknown".

    ``pixels`` and ``labels``: sha256 of the pixels, and the labels in key order, of "train+val" and perhaps "test". A
    source's claim alone does not make a set official.
    """
    if all(digest == OFFICIAL_PIXELS[group] for group, digest in pixels.items()) and all(
        _labels_sha256(values) == OFFICIAL_LABELS[group] for group, values in labels.items()
    ):
        return "official"
    return "unknown" if claimed in (None, "official") else str(claimed)


def _labels_sha256(labels: np.ndarray) -> str:
    """Return the sha256 of the official label file with these labels: a line ``00000000.png 5`` each, in key order."""
    lines = (b"%08d.png %d\n" % (number, label) for number, label in enumerate(labels.tolist()))
    return hashlib.sha256(b"".join(lines)).hexdigest()
