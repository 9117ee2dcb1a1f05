"""Pictures from anywhere: PNGs of a set, and files of any format for `predict`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from inputs import damaged
from packed_sets import pixels_of, png_with
from PIL import Image
from search import Fuzz

from mnistm_dist.data.image_io import FORMATS, check_png, decode_png, encode_png, read_picture

pytest_plugins = ["counting"]


def test_a_png_gives_pixels_or_a_user_error(fuzz: Fuzz) -> None:
    def attempt(data: bytes) -> None:
        size = check_png(data, "here")
        pixels = decode_png(data, "here")
        assert (pixels.shape, pixels.dtype) == ((*size, 3), np.uint8)

    files = [encode_png(pixels_of("train", 1, (8, 8))), png_with(28, 28, 8, 2), png_with(32, 32, 16, 2)]
    fuzz.search("PNG", 0.0528, damaged(*files), attempt)


def written(kind: str, mode: str) -> bytes | None:
    """A small picture in one of Pillow's formats; None where it cannot write it."""
    target = io.BytesIO()
    image = Image.fromarray(pixels_of("train", 2, (12, 9))).convert(mode)
    try:
        image.save(target, kind)
    except (OSError, KeyError, ValueError):
        return None
    return target.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it passes over; a run_command shows it in a line
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_any_format_gives_pixels_or_a_user_error(fuzz: Fuzz, kind: str) -> None:
    files = [data for mode in ("RGB", "L", "P", "1", "RGBA", "I;16", "F") if (data := written(kind, mode))]
    if not files:
        pytest.skip(f"Pillow cannot write {kind} here")

    def attempt(data: bytes) -> None:
        Path("picture").write_bytes(data)
        pixels = read_picture("picture")
        assert (pixels.ndim, pixels.shape[2], pixels.dtype) == (3, 3, np.uint8)

    fuzz.search(f"picture, {kind}", 0.0066, damaged(*files), attempt)
