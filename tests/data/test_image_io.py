"""Image files: PNGs are decoded strictly for packed sets; any picture becomes the RGB pixels that a viewer shows."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_sets import pixels_of, png_with
from PIL import Image

from mnistm_dist.data.image_io import (
    LARGE_SIDE,
    check_png,
    decode_png,
    encode_png,
    find_pictures,
    read_picture,
    to_rgb,
)
from mnistm_dist.errors import UserError

REFUSED_PNGS = {
    "bomb": (png_with(50_000, 50_000, 8, 2), "50000 x 50000"),
    "empty": (b"", "empty"),
    "text": (b"P6 is another format, and this is a text\n", "no PNG header"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
    "16-bit RGB": (png_with(32, 32, 16, 2), "16 bits, RGB"),
    "grey": (png_with(32, 32, 8, 0), "grey"),
    "palette": (png_with(32, 32, 8, 3), "palette"),
    "RGB with alpha": (png_with(32, 32, 8, 6), "alpha"),
    "no pixels": (png_with(0, 32, 8, 2), "32 x 0"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", "no PNG header"),
    "another size": (png_with(28, 28, 8, 2), "28 x 28"),
}


@pytest.mark.parametrize(("data", "named"), REFUSED_PNGS.values(), ids=REFUSED_PNGS)
def test_only_8_bit_rgb_pngs_of_the_right_size_are_decoded(data: bytes, named: str) -> None:
    with pytest.raises(UserError, match=f"file: member.*{named}"):
        decode_png(data, "file: member", (32, 32))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"zTXt"]),
    data=st.binary(max_size=40),
)
@example(kind=b"IHDR", data=struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
def test_an_additional_chunk_ends_in_pixels_or_a_user_error(kind: bytes, data: bytes) -> None:
    good = encode_png(pixels_of("train", 1, (8, 8)))
    with contextlib.suppress(UserError):
        decode_png(good[:33] + chunk(kind, data) + good[33:], "here", (8, 8))


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 400), bit=st.integers(0, 7), cut=st.booleans())
def test_check_png_finds_all_damage(place: int, bit: int, cut: bool) -> None:
    good = bytearray(encode_png(pixels_of("train", 1, (8, 8))))
    place %= len(good)
    bad = good[:place] if cut else good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
    with pytest.raises(UserError, match="here"):
        check_png(bytes(bad), "here")


GREY = np.random.default_rng(0).integers(0, 256, (14, 9), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (14, 9, 3), dtype=np.uint8)


def of_grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_an_rgb_picture_keeps_its_pixels(tmp_path_factory, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path_factory.getbasetemp() / "keeps.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_picture(path), pixels)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), of_grey(GREY)),
        ("grey16.png", Image.fromarray(GREY.astype(np.uint16) * 257), of_grey(GREY)),
        ("grey16.tif", Image.fromarray(GREY.astype(np.uint16) * 257), of_grey(GREY)),
        ("grey16.pgm", Image.fromarray(GREY.astype(np.uint16) * 257), of_grey(GREY)),
        ("float.tif", Image.fromarray(GREY.astype(np.float32) / 255), of_grey(GREY)),
        ("bits.png", Image.fromarray(GREY > 99), of_grey((GREY > 99).astype(np.uint8) * 255)),
        ("palette.png", Image.fromarray(GREY // 2).convert("P"), of_grey(GREY // 2)),
        ("palette.gif", Image.fromarray(GREY // 2).convert("P"), of_grey(GREY // 2)),
        ("opaque.png", Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])), RGB),
        ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), RGB),
        ("rgb.webp", "lossless", RGB),
        ("rgb.bmp", Image.fromarray(RGB), RGB),
        ("UPPER.PNG", Image.fromarray(RGB), RGB),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_is_converted_to_the_visible_rgb(tmp_path, name, image, expected):
    if image == "lossless":
        Image.fromarray(RGB).save(tmp_path / name, lossless=True)
    else:
        image.save(tmp_path / name)
    assert np.array_equal(read_picture(tmp_path / name), expected)


def test_transparent_parts_become_white(tmp_path):
    """Transparent pixels are often black, and a black digit would not be visible on them."""
    alpha = np.where(GREY > 99, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "alpha.png")
    expected = np.where(alpha[..., None] > 0, RGB, 255)
    assert np.array_equal(read_picture(tmp_path / "alpha.png"), expected)
    palette = Image.fromarray((GREY > 99).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(read_picture(tmp_path / "palette.png")[GREY <= 99], np.full(((GREY <= 99).sum(), 3), 255))


@pytest.mark.parametrize("name", ["turned.png", "turned.tif"])
def test_a_photo_is_turned_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that a viewer turns the picture right by 90 degrees
    Image.fromarray(np.rot90(RGB)).save(tmp_path / name, exif=exif)
    assert np.array_equal(read_picture(tmp_path / name), RGB)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(of_grey(np.full_like(GREY, value))) for value in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "film.gif").max() == 0


def test_a_huge_picture_is_reduced_and_a_large_one_is_not():
    side = LARGE_SIDE
    huge = np.zeros((3, 2 * side, 3), np.uint8)
    huge[:, ::2] = 200
    shrunk = to_rgb(Image.fromarray(huge), "huge")
    assert shrunk.shape == (3, side // 2, 3)
    assert (shrunk == 100).all()
    large = np.zeros((3, side - 1, 3), np.uint8)
    assert to_rgb(Image.fromarray(large), "large").shape == large.shape


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.png", b"", "damaged or not a picture"),
        ("text.png", b"a letter to a friend", "damaged or not a picture"),
        ("cut.png", png_with(50, 50, 8, 2)[:60], "damaged or not a picture"),
        ("bomb.png", png_with(60_000, 60_000, 8, 2), "damaged or not a picture"),
        (
            "program.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "damaged or not a picture",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{named}"):
        read_picture(tmp_path / name)


def test_a_path_that_is_not_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png: .*No such file"):
        read_picture(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: not a file"):
        read_picture(tmp_path / "pipe.png")


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_floats_out_of_range_are_refused(tmp_path, value):
    """A file does not define whether 1.5 is bright or nearly black."""
    Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif.*accepted are 0 to 1"):
        read_picture(tmp_path / "float.tif")


def test_folders_are_walked_in_sorted_order(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.png", "b/notes.txt", ".hidden/3.png", "b/._1.png", "c/d/4.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    complaints: list[str] = []
    result = find_pictures([tmp_path / "c" / "d" / "4.webp", tmp_path, "nowhere"], complaints.append)
    names = ["c/d/4.webp", "a.png", "b/1.png", "b/2.JPG", "c/d/4.webp"]
    assert list(result) == [*(tmp_path / name for name in names), Path("nowhere")]
    assert not complaints


def test_a_folder_without_pictures_is_reported(tmp_path):
    complaints: list[str] = []
    assert list(find_pictures([tmp_path], complaints.append)) == []
    assert complaints[0].startswith(f"{tmp_path}: no pictures in it")
