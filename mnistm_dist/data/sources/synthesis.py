"""MNIST digits blended over colour photos: MNIST-M.

Y. Ganin and V. Lempitsky, "Unsupervised Domain Adaptation by Backpropagation" (ICML 2015, arXiv 1409.7495), section 4:
`|patch - digit|` per channel, with the patch cut at a random position from a random photo. Digits are binarised first
(ink > 0 becomes 255), as in the common regenerated copies of the set, so a digit inverts the colours of its patch.

1. `read_digits`: MNIST's own files, in the format IDX (Y. LeCun, http://yann.lecun.com/exdb/mnist).
2. `read_photos`: a folder of photos.
3. `blend`: digits over patches of photos.
4. `open_sample` and `open_mnist_and_photos`: sources of such images.
"""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from mnistm_dist.data.hashing import uniform
from mnistm_dist.data.image_io import UNREADABLE, explain_decode_errors, formats_here
from mnistm_dist.data.sources.archives import Decompressed
from mnistm_dist.data.sources.base import CLASSES, Sample, Source, check_labels
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors

_PHOTO_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")  # in lower case
# The ingredients of the bundled sample; their licences are in SOURCES.md.
_SAMPLE_DIR = Path(__file__).resolve().parents[1] / "sample"
_SAMPLE_TRAIN_SIZE = 8_000  # the first of the 10,000 bundled digits are train, the others val
# The first of MNIST's 60,000 training digits are train; the others and MNIST's 10,000 test digits are val.
_MNIST_TRAIN_SIZE = 55_000
_CHUNK = 1_024


def read_digits(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split, `train` or `test`, from a folder with MNIST's IDX files.

    Return images, uint8 (n, height, width), ink on 0, and labels, int64 (n,). Looks in ``folder`` and in torchvision's
    `MNIST/raw` below it, for names with `-idx` or `.idx`, with or without `.gz`. Raises `UserError` if a file is
    missing, is not IDX or has another size than its header says, and if images and labels do not match.
    """
    images = read_idx(_find(folder, split, "images-idx3"), dimensions=3)
    labels_file = _find(folder, split, "labels-idx1")
    labels = check_labels(str(labels_file), read_idx(labels_file, dimensions=1), len(images))
    for index in np.flatnonzero(labels >= len(CLASSES))[:1]:
        raise UserError(f"{labels_file}: label {labels[index]} at index {index}; accepted are 0 to 9")
    return images, labels


def _find(folder: Path, split: str, content: str) -> Path:
    name = f"{'train' if split == 'train' else 't10k'}-{content}-ubyte"
    pattern = name.replace("-idx", "[-.]idx") + "*"
    files = [file for place in (folder, folder / "MNIST" / "raw") for file in sorted(place.glob(pattern))]
    if not files:
        raise UserError(f"{folder}: no {name}(.gz); expected a folder with MNIST's four IDX files")
    return files[0]


def read_idx(file: Path, *, dimensions: int | None = None) -> np.ndarray:
    """Read an IDX file of uint8, compressed or not. Raises `UserError` if it is another file or has other
    ``dimensions``."""
    with explain_decode_errors(file, f"an IDX file of {dimensions or '1 to 4'} dimensions"):
        stream = Decompressed(file)
        start = int.from_bytes(stream.read(4), "big")
        if start - 0x800 not in ((1, 2, 3, 4) if dimensions is None else (dimensions,)):
            raise ValueError(f"it starts with {start:08x}")
        shape = tuple(np.frombuffer(stream.read(4 * (start - 0x800)), ">u4").tolist())
        data = stream.read(prod(shape) + 1)
        if not data or len(data) != prod(shape):
            raise ValueError(f"its data do not fit its shape {shape}")
        return np.frombuffer(data, np.uint8).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Photos laid end to end, so that patches of many of them are cut by one indexing operation."""

    pixels: np.ndarray
    """uint8 (pixels of all photos, 3), RGB, photo after photo, row after row."""
    sizes: np.ndarray
    """int64 (photos, 2): height and width, pixels."""
    skipped: tuple[str, ...]
    """One line per file that was left out because it is too small or broken."""


def read_photos(folder: Path, *, min_size: int) -> Photos:
    """Read the photos in ``folder``, sorted by name, as RGB.

    Decoded photos are kept in a memory-mapped temporary file, so memory does not grow with their number. A photo with a
    side below ``min_size`` pixels, or a broken one, is left out and listed in `Photos.skipped`. Raises `UserError` if
    no photo is left. JPEGs may decode to slightly different pixels with another libjpeg; PNGs never do.
    """
    with explain_decode_errors(folder, "a folder of photos"):
        files = [file for file in sorted(folder.iterdir()) if file.name.lower().endswith(_PHOTO_SUFFIXES)]
    sizes: list[tuple[int, ...]] = []
    skipped: list[str] = []
    with (
        explain_os_errors(tempfile.gettempdir(), advice="set $TMPDIR to another folder"),
        tempfile.TemporaryFile() as store,
    ):
        for file in filter(Path.is_file, files):
            try:
                photo = _decode(file, min_size)
            except UNREADABLE as error:
                skipped.append(f"photo {file.name} left out: {' '.join(str(error).split())}")
            else:
                store.write(photo.tobytes())
                sizes.append(photo.shape[:2])
        if not sizes:
            reasons = "; ".join(skipped[:5]) or f"no file named {', '.join(_PHOTO_SUFFIXES)}"
            raise UserError(f"{folder}: no usable photo ({reasons}); check --photos")
        store.flush()
        pixels = np.memmap(store, dtype=np.uint8, mode="r").reshape(-1, 3)
    return Photos(pixels=pixels, sizes=np.array(sizes), skipped=tuple(skipped))


def _decode(file: Path, min_size: int) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(file, formats=formats_here()) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if min(image.size) < min_size:
            raise ValueError(f"{image.width} x {image.height} pixels, smaller than a digit of {min_size}")
        return np.asarray(image.convert("RGB"))


def blend(digits: np.ndarray, photos: Photos, *, seed: int, positions: np.ndarray) -> np.ndarray:
    """Blend ``digits``, uint8 (n, height, width), over patches of ``photos``: uint8 (n, height, width, 3), RGB.

    The photo and the position in it are a pure function of ``seed`` and ``positions``, int64 (n,): the same for any
    chunks and any version of any library.
    """
    height, width = digits.shape[1:]
    draws = uniform(seed, positions, 3).astype(np.float64)
    photo = np.floor(draws[:, 0] * len(photos.sizes)).astype(np.int64)
    photo_heights, photo_widths = photos.sizes[photo].T
    top = np.floor(draws[:, 1] * (photo_heights - height + 1)).astype(np.int64)
    left = np.floor(draws[:, 2] * (photo_widths - width + 1)).astype(np.int64)
    areas = photos.sizes.prod(axis=1)
    corners = (np.cumsum(areas) - areas)[photo] + top * photo_widths + left
    rows = corners[:, None] + photo_widths[:, None] * np.arange(height)
    patches = photos.pixels[rows[:, :, None] + np.arange(width)]
    return np.where((digits > 0)[..., None], 255 - patches, patches)


def open_sample(*, seed: int, blends: int = 1) -> Source:
    """Open the bundled sample: MNIST's first 10,000 training digits over free photos; 8,000 train, 2,000 val, 28 x 28.

    Its ingredients are in the package, so it needs no files and no network. ``blends`` as in `open_mnist_and_photos`.
    """
    images, labels = read_digits(_SAMPLE_DIR, "train")
    photos = read_photos(_SAMPLE_DIR, min_size=images.shape[1])
    return _synthesise(images, labels, photos, num_train=_SAMPLE_TRAIN_SIZE, blends=blends, seed=seed, layout="sample")


def open_mnist_and_photos(mnist: Path, photos: Path, *, seed: int, blends: int = 1) -> Source:
    """Open MNIST's 70,000 digits over the photos of a folder, the regenerated lineage: 55,000 train and 15,000 val.

    Val is MNIST's last 5,000 training digits, then its 10,000 test digits. A smaller MNIST is cut at the same fraction.
    Each training digit is blended over ``blends`` patches; the first is the one that it has with a single blend, and
    val does not depend on ``blends``. Raises `UserError` as `read_digits` and `read_photos`, and if the training and
    test images have different sizes.
    """
    (train_images, train_labels), (test_images, test_labels) = (read_digits(mnist, s) for s in ("train", "test"))
    with explain_decode_errors(mnist, "MNIST"):
        images, labels = np.concatenate([train_images, test_images]), np.concatenate([train_labels, test_labels])
    pool = read_photos(photos, min_size=max(images.shape[1:]))
    num_train = len(train_labels) * _MNIST_TRAIN_SIZE // 60_000
    return _synthesise(images, labels, pool, num_train=num_train, blends=blends, seed=seed, layout="mnist+photos")


def _synthesise(
    digits: np.ndarray, labels: np.ndarray, photos: Photos, *, num_train: int, blends: int, seed: int, layout: str
) -> Source:
    """Return a source of digits over photos: the first ``num_train`` digits are train, the others val."""
    counts = {"train": num_train * blends, "val": len(labels) - num_train}

    def read() -> Iterator[Sample]:
        for split, count in counts.items():
            for start in range(0, count, _CHUNK):
                numbers = np.arange(start, min(start + _CHUNK, count))
                turn, chosen = np.divmod(numbers, num_train) if split == "train" else (0, numbers + num_train)
                # The first blend of a digit has the digit's own position; the positions of others follow all digits.
                positions = chosen + turn * len(labels)
                images = blend(digits[chosen], photos, seed=seed, positions=positions)
                for index, (label, pixels) in enumerate(zip(labels[chosen], images, strict=True), start):
                    yield Sample(
                        split=split,
                        index=index,
                        label=int(label),
                        pixels=pixels,
                        origin=f"{layout}: {split} image {index}",
                    )

    return Source(
        layout=layout,
        lineage="regenerated",
        description=f"{len(labels)} digits of MNIST over {len(photos.sizes)} photos"
        + (f", {blends} patches for each training digit" if blends > 1 else ""),
        counts=counts,
        notes=photos.skipped,
        read=read,
    )
