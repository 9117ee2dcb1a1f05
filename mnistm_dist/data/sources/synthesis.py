"""MNIST digits and colour photos -> MNIST-M.

Y. Ganin and V. Lempitsky, "Unsupervised Domain Adaptation by Backpropagation" (ICML 2015, arXiv 1409.7495), section 4:
`|patch - digit|` per channel, the patch being cut at a random place out of a random photo. Each digit is binarised
first (ink > 0 becomes 255), as in the copies of the set that people regenerated: so it inverts its patch's colours.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.hashing import uniform
from mnistm_dist.data.image_io import formats_here
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.data.sources.idx import Digits, read_digits
from mnistm_dist.errors import UserError

PHOTO_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File names that are taken for photos, in small letters."""
SAMPLE_TRAIN_SIZE = 8_000
"""Of the 10,000 bundled digits, the first ones are train, the others val."""
MNIST_TRAIN_SIZE = 55_000
"""Of MNIST's 60,000 training digits, the first ones are train, the others val, before MNIST's 10,000 test digits."""
_CHUNK = 1_024
_BROKEN: tuple[type[Exception], ...] = (*UNREADABLE, Image.DecompressionBombWarning)
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Photos laid end to end, so that patches of many of them are cut by one indexing."""

    names: tuple[str, ...]
    """File names, in the order that the random choice counts."""
    pixels: np.ndarray
    """uint8 (pixels of all photos, 3), RGB, photo after photo, row after row."""
    starts: np.ndarray
    """int64 (photos,): where each begins in `pixels`."""
    heights: np.ndarray
    """int64 (photos,), pixels."""
    widths: np.ndarray
    """int64 (photos,), pixels."""
    skipped: tuple[str, ...]
    """One line for each file that was no use: too small, or broken."""


def read_photos(folder: Path | Traversable, *, smallest: int) -> Photos:
    """Reads the photos that lie in `folder`, sorted by name; grey ones and others become RGB.

    Decoded they are kept in an unnamed temporary file that is mapped, so that memory does not grow with their number. A
    photo that is lower or narrower than `smallest` pixels, or broken, is left out and named in `skipped`. Raises
    UserError where no photo is left. JPEGs may decode to slightly different pixels on another libjpeg; PNGs never do.
    """
    if not folder.is_dir():
        found_here = "a file, not a folder" if folder.is_file() else "no such folder"
        raise UserError(f"{folder}: {found_here}; name one of colour photos with --photos")
    found = sorted(
        entry.name for entry in folder.iterdir() if entry.name.lower().endswith(PHOTO_SUFFIXES) and entry.is_file()
    )
    names: list[str] = []
    skipped: list[str] = []
    sizes: list[tuple[int, int]] = []
    with tempfile.TemporaryFile() as store:
        for name in found:
            try:
                photo = _decode(folder / name)
            except _BROKEN as error:
                skipped.append(f"photo {name} left out: broken ({' '.join(str(error).split())})")
                continue
            height, width = photo.shape[:2]
            if min(height, width) < smallest:
                skipped.append(f"photo {name} left out: {width} x {height} pixels, smaller than a digit of {smallest}")
                continue
            _store(store, photo)
            names.append(name)
            sizes.append((height, width))
        if not names:
            reasons = "; ".join(skipped[:_NAMED]) if skipped else f"no file named {', '.join(PHOTO_SUFFIXES)} in it"
            raise UserError(f"{folder}: no usable photo ({reasons}); name another folder with --photos")
        heights, widths = np.array(sizes, dtype=np.int64).T
        pixels = np.memmap(store, dtype=np.uint8, mode="r").reshape(-1, 3)
    ends = np.cumsum(heights * widths)
    return Photos(
        names=tuple(names),
        pixels=pixels,
        starts=ends - heights * widths,
        heights=heights,
        widths=widths,
        skipped=tuple(skipped),
    )


def _decode(file: Path | Traversable) -> np.ndarray:
    with warnings.catch_warnings(), file.open("rb") as stream:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=formats_here()) as image:
            return np.asarray(image.convert("RGB"))


def _store(store: IO[bytes], photo: np.ndarray) -> None:
    try:
        store.write(photo.tobytes())
        store.flush()
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: no room for the decoded photos ({error.strerror}): "
            "name another folder for temporary files in $TMPDIR"
        ) from error


def blend(digits: np.ndarray, photos: Photos, *, seed: int, positions: np.ndarray) -> np.ndarray:
    """Blends `digits`, uint8 (n, height, width), over patches of `photos`: uint8 (n, height, width, 3), RGB.

    Photo and place of each are a pure function of `seed` and its position, of int64 (n,): the same on every version of
    every library, in whatever chunks a set is made.
    """
    height, width = digits.shape[1:]
    draws = uniform(seed, positions, 3).astype(np.float64)
    photo = np.floor(draws[:, 0] * len(photos.names)).astype(np.int64)
    top = np.floor(draws[:, 1] * (photos.heights[photo] - height + 1)).astype(np.int64)
    left = np.floor(draws[:, 2] * (photos.widths[photo] - width + 1)).astype(np.int64)
    stride = photos.widths[photo]
    corners = photos.starts[photo] + top * stride + left
    rows = corners[:, None] + stride[:, None] * np.arange(height)
    patches = photos.pixels[rows[:, :, None] + np.arange(width)]
    return np.where((digits > 0)[..., None], 255 - patches, patches)


def open_sample(*, seed: int, blends: int = 1) -> Source:
    """The bundled sample: MNIST's first 10,000 training digits over free photos, 8,000 train and 2,000 val of 28 x 28.

    Its ingredients lie in the package (`sample/SOURCES.md`), so that it needs no file of the user and no network.
    `blends` as in `open_mnist_and_photos`.
    """
    folder = files("mnistm_dist") / "data" / "sample"
    digits = read_digits(folder, "train")
    photos = read_photos(folder, smallest=digits.images.shape[1])
    return _blended(
        digits=[digits],
        photos=photos,
        train=SAMPLE_TRAIN_SIZE,
        blends=blends,
        seed=seed,
        layout="sample",
        description=f"bundled sample: {len(digits.labels)} digits of MNIST over {len(photos.names)} free photos",
    )


def open_mnist_and_photos(mnist: Path, photos_folder: Path, *, seed: int, blends: int = 1) -> Source:
    """MNIST's 70,000 digits over the photos of a folder: the regenerated lineage, 55,000 train, 15,000 val, 28 x 28.

    Val is MNIST's last 5,000 training digits, then its 10,000 test digits, as in the source report. A smaller MNIST is
    cut at the same fraction. Each training digit is blended over `blends` patches, at least 1: the first is the one
    that it has alone, and val is the same whatever their number. Raises UserError as `read_digits` and `read_photos`,
    and where train and test have images of two sizes.
    """
    digits = [read_digits(mnist, "train"), read_digits(mnist, "test")]
    train_size, test_size = ("{} x {}".format(*part.images.shape[1:]) for part in digits)
    if train_size != test_size:
        raise UserError(
            f"{mnist}: train images of {train_size} pixels, test images of {test_size}: one set holds one image size; "
            "download them again"
        )
    photos = read_photos(photos_folder, smallest=max(digits[0].images.shape[1:]))
    total = len(digits[0].labels)
    return _blended(
        digits=digits,
        photos=photos,
        train=total * MNIST_TRAIN_SIZE // 60_000,
        blends=blends,
        seed=seed,
        layout="mnist+photos",
        description=f"{sum(len(part.labels) for part in digits)} digits of MNIST over {len(photos.names)} photos",
    )


def _blended(
    *, digits: Sequence[Digits], photos: Photos, train: int, blends: int, seed: int, layout: str, description: str
) -> Source:
    if blends < 1:
        raise UserError(f"{layout}: {blends} blends of each training digit; accepted are 1 and more")
    images = np.concatenate([part.images for part in digits])
    labels = np.concatenate([part.labels for part in digits])
    return Source(
        layout=layout,
        lineage="regenerated",
        description=description if blends == 1 else f"{description}, {blends} patches for each training digit",
        counts={"train": train * blends, "val": len(labels) - train},
        notes=photos.skipped,
        read=partial(_read_blended, images, labels, photos, train, blends, seed, layout),
    )


def _read_blended(
    digits: np.ndarray, labels: np.ndarray, photos: Photos, train: int, blends: int, seed: int, origin: str
) -> Iterator[Sample]:
    made_train = train * blends
    made = made_train + len(labels) - train
    for start in range(0, made, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, made))
        is_train = numbers < made_train
        chosen = np.where(is_train, numbers % train, numbers - made_train + train)
        # The first blend of a digit has the digit's own position; further ones lie beyond all digits.
        positions = chosen + np.where(is_train, numbers // train, 0) * len(labels)
        for number, digit, pixels in zip(
            numbers.tolist(),
            chosen.tolist(),
            blend(digits[chosen], photos, seed=seed, positions=positions),
            strict=True,
        ):
            split, index = ("train", number) if number < made_train else ("val", number - made_train)
            yield Sample(
                split=split,
                index=index,
                label=int(labels[digit]),
                pixels=pixels,
                origin=f"{origin}: image {number}",
            )
