"""MNIST-M as people hold it: a layout on disk, told by looking, becomes a `Source` of labelled images.

1. `sample` and `mnist+photos` are made, not read (`synthesis.py`).
2. A path is told apart (`layouts/detection.py`): a file by its first bytes, a folder or archive by the names in it.
3. The one reader that fits looks the whole of it over, labels too, and only then hands out a `Source`.
"""

from __future__ import annotations

from pathlib import Path

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.sources.base import Source
from mnistm_dist.data.sources.detect import KNOWN_LAYOUTS, MADE_LAYOUTS, detect
from mnistm_dist.data.sources.download import fetch_mnist
from mnistm_dist.data.sources.synthesis import open_mnist_and_photos, open_sample
from mnistm_dist.errors import UserError

__all__ = ["KNOWN_LAYOUTS", "Source", "open_source"]


def open_source(
    source: str,
    *,
    layout: str | None = None,
    mnist: str | None = None,
    photos: str | None = None,
    blends: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Source:
    """Opens `sample`, `mnist+photos`, or a path in a layout of `KNOWN_LAYOUTS`, told by looking unless `layout` is set.

    `mnist` is a folder of MNIST's IDX files, or `auto` to have it downloaded: for `mnist+photos`, and for a pickle,
    which has no labels; `cache_dir` is where it then lies, by default the user's cache. `photos` is a folder of colour
    photos. `blends` is how many training images are made of each digit, each over another patch; 1 where nobody says.
    `seed` chooses photo and place of every patch that is made. Raises UserError, in one line, at whatever is missing,
    damaged, hostile or not known.
    """
    if layout is not None and layout not in KNOWN_LAYOUTS:
        raise UserError(f"--layout {layout}: not known; known are {', '.join(KNOWN_LAYOUTS)}")
    if source in MADE_LAYOUTS and layout not in (None, source):
        raise UserError(f"--layout {layout} is for a path; {source} is made, not read")
    if photos is not None and source != "mnist+photos":
        raise UserError(f"--photos is for the source mnist+photos, not for {source}")
    if blends is not None and source not in MADE_LAYOUTS:
        raise UserError(f"--blends is for {' and '.join(MADE_LAYOUTS)}, whose images are made; {source} has its own")
    made = 1 if blends is None else blends
    if source == "sample":
        if mnist is not None:
            raise UserError("--mnist is for mnist+photos and for pickles; the sample brings its own digits")
        opened = open_sample(seed=seed, blends=made)
    elif source == "mnist+photos":
        if mnist is None or photos is None:
            raise UserError("mnist+photos needs --mnist DIR, with MNIST's IDX files (or auto), and --photos DIR")
        folder = _mnist_folder(mnist, cache_dir)
        opened = open_mnist_and_photos(folder, Path(photos), seed=seed, blends=made)
    else:
        opened = _open_path(Path(source), layout, mnist, cache_dir)
    for split in opened.splits:
        if not opened.counts[split]:
            raise UserError(f"{opened.description}: no images in its split {split}")
    if "train" not in opened.counts:
        raise UserError(f"{opened.description}: no train split, only {', '.join(opened.splits) or 'nothing'}")
    return opened


def _open_path(path: Path, layout: str | None, mnist: str | None, cache_dir: Path | None) -> Source:
    try:
        found = path.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be looked at ({error})") from error
    if not found:
        raise UserError(f"{path}: no such file or folder; accepted are a path, sample and mnist+photos")
    detected = detect(path, layout)
    if mnist is not None and detected.layout != "pickle":
        raise UserError(f"--mnist is for mnist+photos and for pickles; {path} is of the layout {detected.layout}")
    return detected.open(_mnist_folder(mnist, cache_dir) if mnist is not None else None)


def _mnist_folder(mnist: str, cache_dir: Path | None) -> Path:
    return fetch_mnist(choose_cache_dir(cache_dir)) if mnist == "auto" else Path(mnist)
