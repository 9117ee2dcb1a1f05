"""Image files to uint8 RGB pixels: the PNGs of a packed set, strictly, and any picture for prediction.

`explain_decode_errors` turns what the readers of all kinds of files raise at a damaged one into one line.

A packed set contains PNGs of 8-bit RGB, 1 to 1,024 pixels a side, and nothing else: another reader of the shards might
convert other images differently. `pack` keeps such PNGs and converts all other files with `convert_to_png`.
"""

import contextlib
import io
import lzma
import os
import pickle
import stat
import struct
import tarfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from mnistm_dist.errors import UserError, os_error_reason

# What libraries raise when a file is damaged, hostile or of another format. A `UserError` is a ValueError: code that
# catches these must raise a `UserError` again.
UNREADABLE: tuple[type[Exception], ...] = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    *(lzma.LZMAError, pickle.UnpicklingError, struct.error, tarfile.TarError, tokenize.TokenError, zlib.error),
    *(zipfile.BadZipFile, Image.DecompressionBombError, Image.DecompressionBombWarning),
)

# Largest accepted height and width, pixels: a larger header is refused before anything is decompressed.
MAX_SIDE = 1024

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_ADVICE = "a packed set contains 8-bit RGB PNGs: pack it again"


@contextlib.contextmanager
def explain_decode_errors(origin: object, expected: str, *extra: type[Exception]) -> Iterator[None]:
    """Turn an error of a library's reader into a `UserError`: ``ORIGIN: damaged or not EXPECTED (REASON)``.

    ``extra`` are further exceptions of one library. A `UserError` of the block passes through.
    """
    try:
        yield
    except UserError:
        raise
    except (*UNREADABLE, *extra) as error:
        problem = "cannot be read" if getattr(error, "errno", None) else f"damaged or not {expected}"
        raise UserError(f"{origin}: {problem} ({' '.join(os_error_reason(error).split())[:120]})") from error


def png_size(data: bytes, origin: str) -> tuple[int, int]:
    """Return (height, width) from the header of a PNG, pixels.

    Raises `UserError`, naming ``origin``, if it is not a PNG or not an accepted one.
    """
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        kind = "an empty file" if not data else "a JPEG" if data.startswith(b"\xff\xd8") else "no PNG header"
        raise UserError(f"{origin}: not a PNG: {kind} ({_ADVICE})")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if depth != 8 or colour != 2:
        kind = _COLOUR_TYPES.get(colour, f"colour type {colour}")
        raise UserError(f"{origin}: a PNG of {depth} bits, {kind} ({_ADVICE})")
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(
            f"{origin}: a PNG of {height} x {width} pixels; accepted are 1 to {MAX_SIDE:,} a side: add "
            "--resize N to shrink all images"
        )
    return height, width


def is_plain_png(data: bytes, size: int | None = None) -> bool:
    """Return whether a file is a PNG of 8-bit RGB by its header, and, if ``size`` is set, of ``size`` x ``size``."""
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or data[24:26] != b"\x08\x02":
        return False
    return size is None or data[16:24] == struct.pack(">II", size, size)


def convert_to_png(data: bytes, origin: str, size: int | None = None) -> tuple[bytes, str]:
    """Convert an image file of any of `FORMATS` to a PNG of 8-bit RGB, as `to_rgb`; return it and what the file was.

    ``size``: scale and crop to ``size`` x ``size``. Raises `UserError`, naming ``origin``, if it cannot be read or has
    too many pixels.
    """
    with explain_decode_errors(origin, f"an image of {', '.join(FORMATS)}"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not data:
            raise ValueError("an empty file")
        if data.startswith(_SIGNATURE):
            Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # decoding does not check every CRC
        with Image.open(io.BytesIO(data), formats=formats_here()) as image:
            form = f"{image.format} {image.mode}"
            pixels = to_rgb(image, origin)
    if size is None and max(pixels.shape[:2]) > MAX_SIDE:
        height, width = pixels.shape[:2]
        raise UserError(
            f"{origin}: {height} x {width} pixels; accepted are 1 to {MAX_SIDE:,} a side: add --resize N to shrink all "
            "images"
        )
    return encode_png(resize_and_crop(pixels, size)), form


def resize_and_crop(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """Scale uint8 (H, W, 3) so that its short side is ``size``, bilinear and antialiased, and crop its centre.

    None leaves it as it is.
    """
    height, width = pixels.shape[:2]
    if size is None or (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    target = max(size, round(width * scale)), max(size, round(height * scale))
    image = Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def check_png(data: bytes, origin: str) -> None:
    """Verify all bytes of an accepted PNG: the CRC of every chunk, and the checksum and length of the pixel data.

    Decoders accept some damage: Pillow fills missing rows with black. Raises `UserError` for a PNG that is truncated,
    was changed, or has too few pixels.
    """
    height, width = png_size(data, origin)
    place, pixel_data, kind = len(_SIGNATURE), [], b""
    with explain_decode_errors(origin, "an 8-bit RGB PNG"):
        while kind != b"IEND":
            end = place + 12 + int.from_bytes(data[place : place + 4], "big")
            if end > len(data):
                raise ValueError(f"truncated after {len(data):,} bytes")
            kind = data[place + 4 : place + 8]
            if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError("a checksum (CRC) does not match")
            if kind == b"IDAT":
                pixel_data.append(data[place + 8 : end - 4])
            place = end
        expected, interlaced = height * (1 + 3 * width), data[28] != 0  # each row begins with a byte for its filter
        inflater = zlib.decompressobj()
        found = len(inflater.decompress(b"".join(pixel_data), 2 * expected + 64))
        if not inflater.eof or (found != expected and not interlaced):
            raise ValueError(f"{found:,} or more bytes of pixels, not {expected:,}")


def decode_png(data: bytes, origin: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a PNG to uint8 (H, W, 3), RGB, read-only.

    ``size`` is the (height, width) that it must have; None accepts any up to `MAX_SIDE`. Raises `UserError`, naming
    ``origin`` ("file: member"), if it is not an accepted PNG, of another size, or broken.
    """
    found = png_size(data, origin)
    if size is not None and found != tuple(size):
        raise UserError(
            f"{origin}: {found[0]} x {found[1]} pixels instead of {size[0]} x {size[1]}: all images of a set have one "
            "size"
        )
    with explain_decode_errors(origin, "an 8-bit RGB PNG"):
        # The plugin itself: Image.open spends a tenth of the time on finding it.
        image = PngImageFile(io.BytesIO(data))
        # A second header may announce more than any memory holds.
        if image.mode != "RGB" or image.size != found[::-1]:
            raise ValueError(f"decoded to {image.mode} {image.size}")
        pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    return pixels.reshape(*found, 3)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) as PNG. The pixels are kept exactly; the bytes depend on Pillow's version."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


# Accepted formats, by Pillow's names. Others are not tried: some of them run a program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
# Suffixes of file names, in lower case, that make a file in a folder a picture.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
)
# A side of this many pixels or more is averaged down after decoding, to no less than half of this.
LARGE_SIDE = 4096


def find_pictures(paths: Iterable[str | Path], complain: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files among ``paths`` as they are, and for a folder the pictures in and below it, sorted.

    In a folder, a picture is a file whose suffix is in `SUFFIXES`; hidden files and folders are skipped. ``complain``
    is called for a folder that cannot be read or has no picture. A path that does not exist is yielded: reading it
    raises the error.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        found: list[Path] = []
        for folder, below, names in os.walk(
            path, onerror=lambda error: complain(f"{error.filename}: {error.strerror}")
        ):
            below[:] = [name for name in below if not name.startswith(".")]
            found += [Path(folder, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        if not found:
            complain(f"{path}: no pictures in it; accepted suffixes are {', '.join(SUFFIXES)}")
        yield from sorted(found)


def read_picture(path: str | Path) -> np.ndarray:
    """Read an image file as `to_rgb` does. Raises `UserError`, naming the file, if it is missing or cannot be read."""
    with explain_decode_errors(path, f"a picture of {', '.join(FORMATS)}"):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path}: not a file")
        with Image.open(path, formats=formats_here()) as image:
            return to_rgb(image, str(path))


def formats_here() -> list[str]:
    """Return those of `FORMATS` that Pillow was built with, for the argument ``formats`` of `Image.open`."""
    Image.init()  # loads all formats, which Pillow loads on demand
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image, origin: str) -> np.ndarray:
    """Convert a picture of any of Pillow's modes to uint8 (H, W, 3), RGB.

    The result is its first frame, turned upright by its EXIF orientation, with transparent parts white. 16 bits are
    scaled to 8; mode I is taken as 16 bits, mode F as 0 to 1. A side of `LARGE_SIDE` pixels or more is averaged down by
    an integer factor. A smaller 8-bit RGB picture keeps its pixels. Raises `UserError`, naming ``origin``, for values
    out of range; Pillow's errors at a broken file pass through.
    """
    # Each step only if it is needed, since each copies the picture.
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
    """Convert grey values of 16 bits, or floats from 0 to 1, to uint8."""
    top = 1 if values.dtype.kind == "f" else 65535
    low, high = values.min(), values.max()
    # Not low < 0 or high > top, which is False for NaN.
    if not (low >= 0 and high <= top):
        raise UserError(f"{origin}: values from {low} to {high}; accepted are 0 to {top} in a picture of this mode")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
