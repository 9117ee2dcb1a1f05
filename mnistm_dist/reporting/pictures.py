"""``mistakes/SPLIT.png`` of a run: the images of its mistakes, one below the other, for the report.

Their keys are in the metadata of the file, so that no image is shown beside another's key.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mnistm_dist.files import write_atomic

KEYS = "keys"


def write_pictures(path: Path, images: Sequence[np.ndarray], keys: Sequence[str]) -> None:
    """Write images, uint8 (H, W, 3) of one size each, atomically. Raises `OSError`."""
    path.parent.mkdir(exist_ok=True)
    info = PngInfo()
    info.add_text(KEYS, json.dumps(list(keys)))
    pixels = np.concatenate(images) if images else np.zeros((1, 1, 3), np.uint8)
    write_atomic(path, _to_png(pixels, info))


def read_pictures(path: Path) -> dict[str, str]:
    """Return each image by its key, as the ``data:`` address of a PNG; nothing if the file is missing or damaged."""
    try:
        with Image.open(path) as image:
            keys, pixels = json.loads(image.info[KEYS]), np.asarray(image.convert("RGB"))
        parts = np.split(pixels, len(keys)) if keys else []
    except (OSError, KeyError, ValueError, TypeError):
        return {}
    encoded = (base64.b64encode(_to_png(part)).decode("ascii") for part in parts)
    return {str(key): f"data:image/png;base64,{text}" for key, text in zip(keys, encoded, strict=True)}


def _to_png(pixels: np.ndarray, info: PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()
