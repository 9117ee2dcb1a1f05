"""Pictures as people have them to uint8 RGB: any size, any mode, files of the usual kinds.

`data/png.py` is stricter, since its pixels are trained on; here a person asks what a picture shows.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mnistm_dist.data.damage import UNREADABLE
from mnistm_dist.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
"""Formats that are read, by Pillow's names. Others are not tried: some of them run a program (EPS)."""
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
)
"""File names that are taken for pictures in a folder, in small letters."""
LARGE_SIDE = 4096
"""Pixels of a side from which it is averaged down as soon as it is decoded, to no less than half of this."""


def find_pictures(paths: Iterable[str | Path], tell: Callable[[str], None]) -> Iterator[Path]:
    """The files among ``paths`` as they are, and in place of a folder the pictures in and below it, sorted.

    In a folder names count (`SUFFIXES`), and hidden ones do not. ``tell`` hears of a folder that cannot be read or
    holds no picture. What is no folder is passed on, so that reading it says what is wrong.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        found: list[Path] = []
        for folder, below, names in os.walk(path, onerror=lambda error: tell(f"{error.filename}: {error.strerror}")):
            below[:] = [name for name in below if not name.startswith(".")]
            found += [Path(folder, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        if not found:
            tell(f"{path}: no pictures in it; taken for pictures are {', '.join(SUFFIXES)}")
        yield from sorted(found)


def read_picture(path: str | Path) -> np.ndarray:
    """Reads one file as `to_rgb` does. Raises `UserError`, naming the file, where it is missing, broken or no
    picture."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path}: neither a file nor a folder")
        with Image.open(path, formats=formats_here()) as image:
            return to_rgb(image, str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a picture that can be read; accepted are {', '.join(FORMATS)}") from error
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: a broken picture ({reason})") from error


def formats_here() -> list[str]:
    """Those of `FORMATS` that Pillow was built with, for ``formats=`` of `Image.open`."""
    # Pillow loads its formats on demand; this loads all.
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image, origin: str) -> np.ndarray:
    """A picture of any of Pillow's modes as uint8 (H, W, 3), RGB.

    Its first frame, upright by its EXIF orientation, transparent parts on white. 16 bits are scaled to 8; mode I is
    taken for 16 bits, mode F for 0 to 1. A side of `LARGE_SIDE` pixels or more is averaged down by a whole factor. An
    8-bit RGB picture below that keeps its pixels. Raises `UserError`, naming ``origin``, for values out of range; what
    Pillow raises at a broken file passes through.
    """
    # Each step only where it is needed, since each copies the picture.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), origin))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    factors = [max(1, side // (LARGE_SIDE // 2)) if side >= LARGE_SIDE else 1 for side in image.size]
    if max(factors) > 1:
        image = image.reduce((factors[0], factors[1]))
    return np.array(image)


def _to_8_bits(values: np.ndarray, origin: str) -> np.ndarray:
    """Grey values of 16 bits, or floats from 0 to 1, as uint8."""
    top = 1 if values.dtype.kind == "f" else 65535
    # Not (low >= 0 and high <= top): the comparison is false for NaN.
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise UserError(f"{origin}: values from {low} to {high}; accepted are 0 to {top} in a picture of this kind")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
