"""PNGs: which are taken, and what is wrong with the others."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_sets import pixels_of, png_with

from mnistm_dist.data.image_io import check_png, decode_png, encode_png
from mnistm_dist.errors import UserError

REFUSED_PNGS = {
    "bomb": (png_with(50_000, 50_000, 8, 2), "50000 x 50000"),
    "empty": (b"", "empty"),
    "text": (b"P6 is another format, and this is a text\n", "text"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
    "16-bit RGB": (png_with(32, 32, 16, 2), "16 bits, RGB"),
    "grey": (png_with(32, 32, 8, 0), "grey"),
    "palette": (png_with(32, 32, 8, 3), "palette"),
    "RGB with alpha": (png_with(32, 32, 8, 6), "alpha"),
    "no pixels": (png_with(0, 32, 8, 2), "32 x 0"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", "cut short"),
    "another size": (png_with(28, 28, 8, 2), "28 x 28"),
}


@pytest.mark.parametrize(("data", "named"), REFUSED_PNGS.values(), ids=REFUSED_PNGS)
def test_only_8_bit_rgb_pngs_of_the_right_size_are_decoded(data: bytes, named: str) -> None:
    with pytest.raises(UserError, match=f"file: member.*{named}"):
        decode_png(data, "file: member", (32, 32))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"zTXt"]),
    data=st.binary(max_size=40),
)
@example(kind=b"IHDR", data=struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
def test_a_chunk_too_many_whose_checksum_is_right_ends_in_pixels_or_a_users_error(kind: bytes, data: bytes) -> None:
    good = encode_png(pixels_of("train", 1, (8, 8)))
    with contextlib.suppress(UserError):
        decode_png(good[:33] + chunk(kind, data) + good[33:], "here", (8, 8))


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_to_a_png_passes_its_checksums(place: int, bit: int, cut: bool) -> None:
    good = bytearray(encode_png(pixels_of("train", 1, (8, 8))))
    place %= len(good)
    bad = good[:place] if cut else good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
    with pytest.raises(UserError, match="here"):
        check_png(bytes(bad), "here")


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), start=st.integers(0, 200))
def test_decoding_ends_in_pixels_or_a_users_error(data: bytes, start: int) -> None:
    good = encode_png(pixels_of("train", 1, (8, 8)))
    try:
        pixels = decode_png(good[:start] + data + good[start + len(data) :], "here", (8, 8))
    except UserError:
        return
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
