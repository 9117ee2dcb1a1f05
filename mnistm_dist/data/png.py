"""PNG bytes of one image to uint8 RGB pixels and back, and the one place that says which PNGs are accepted.

Accepted is what MNIST-M's own archive holds: 8 bits per channel, RGB, 1 to 1,024 pixels a side. Everything else is
refused by name rather than converted: PNG bytes are kept as they are in the shards, so whatever a conversion would do
here, another reader of the shards might do otherwise.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mnistm_dist.data.damage import UNREADABLE
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
