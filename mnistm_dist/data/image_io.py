"""PNG bytes of one image to uint8 RGB pixels and back, and the one place that says which PNGs are accepted.

Accepted is what MNIST-M's own archive holds: 8 bits per channel, RGB, 1 to 1,024 pixels a side. Everything else is
refused by name rather than converted: PNG bytes are kept as they are in the shards, so whatever a conversion would do
here, another reader of the shards might do otherwise.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.errors import UserError

MAX_SIDE = 1024
"""Largest accepted height and width, pixels: a header that promises more is refused before anything is decompressed."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_ADVICE = "accepted are 8-bit RGB PNGs: replace or leave out this image"


def png_size(data: bytes, origin: str) -> tuple[int, int]:
    """Reads the header of a PNG: its (height, width) in pixels.

    Raises `UserError`, naming ``origin``, for what is no PNG or not an accepted one.
    """
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        raise UserError(f"{origin}: not a PNG: {_looks_like(data)} ({_ADVICE})")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if depth != 8 or colour != 2:
        kind = _COLOUR_TYPES.get(colour, f"colour type {colour}")
        raise UserError(f"{origin}: a PNG of {depth} bits, {kind} ({_ADVICE})")
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(
            f"{origin}: a PNG of {height} x {width} pixels; accepted are 1 to {MAX_SIDE:,} a side: "
            "make it smaller, or leave it out"
        )
    return height, width


def check_png(data: bytes, origin: str) -> tuple[int, int]:
    """Like `png_size`, and goes through all bytes: the CRC of every chunk, the pixel data's checksum and length.

    Decoders let some of this pass: Pillow fills up missing rows with black. Raises `UserError` for a PNG that is cut
    short, has changed, or holds too few pixels.
    """
    height, width = png_size(data, origin)
    place, pixel_data, kind = len(_SIGNATURE), [], b""
    while kind != b"IEND":
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        if end > len(data):
            raise UserError(f"{origin}: a PNG cut short after {len(data):,} bytes ({_ADVICE})")
        kind = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise UserError(f"{origin}: a damaged PNG: a checksum (CRC) does not match ({_ADVICE})")
        if kind == b"IDAT":
            pixel_data.append(data[place + 8 : end - 4])
        place = end
    interlaced = data[28] != 0
    expected = height * (1 + 3 * width)  # each row has a byte in front that says how it is filtered
    inflater = zlib.decompressobj()
    try:
        found = len(inflater.decompress(b"".join(pixel_data), 2 * expected + 64))
    except zlib.error as error:
        raise UserError(f"{origin}: a broken PNG: {error} ({_ADVICE})") from error
    if not inflater.eof or (found != expected and not interlaced):
        raise UserError(f"{origin}: a broken PNG: {found:,} bytes of pixels and more, not {expected:,} ({_ADVICE})")
    return height, width


def decode_png(data: bytes, origin: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes one PNG to uint8 (H, W, 3), RGB, read-only.

    ``size`` is the (height, width) that it must have; None accepts any up to `MAX_SIDE`. Raises `UserError`, naming
    ``origin`` ("file: member"), for what is no PNG, not an accepted one, of another size, or broken.
    """
    found = png_size(data, origin)
    if size is not None and found != tuple(size):
        raise UserError(
            f"{origin}: {found[0]} x {found[1]} pixels, where the set's images have {size[0]} x {size[1]}: "
            "one set holds one image size"
        )
    try:
        # The plugin itself, and not Image.open, which spends a tenth of the time on finding it.
        image = PngImageFile(io.BytesIO(data))
        # A second header may promise more than any memory holds.
        if image.mode != "RGB" or image.size != found[::-1]:
            raise UserError(f"{origin}: a broken PNG: decoded to {image.mode} {image.size} ({_ADVICE})")
        pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: a broken PNG: {error} ({_ADVICE})") from error
    return pixels.reshape(*found, 3)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) as PNG. The pixels survive exactly; the bytes depend on Pillow's version."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def _looks_like(data: bytes) -> str:
    if not data:
        return "it is empty"
    if data[:2] == b"\xff\xd8":
        return "it is a JPEG"
    if data[:8] == _SIGNATURE:
        return "it is cut short"
    head = data[:64]
    return "it is text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "it has no PNG signature"


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
