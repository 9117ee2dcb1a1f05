"""Open labelled images in any layout as a `Source`.

1. `sample` and `mnist+photos` are synthesised (`synthesis.py`).
2. The files of a path are listed, at any depth: a file together with the others of its set, an archive as a folder.
   An archive in a folder is only opened if nothing else there can be read.
3. Each layout's reader makes tables of its files (`image_files.py`, `data_files.py`, `columns.py`). A set with labels
   is preferred to one without; several sets are refused. Files that no reader used are noted.
"""

import contextlib
import glob
import re
import zipfile
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.image_io import SUFFIXES, UNREADABLE, explain_decode_errors
from mnistm_dist.data.sources.archives import ZIP_STARTS, Decompressed, Tree
from mnistm_dist.data.sources.base import (
    ImageSet,
    NoLabelsError,
    Source,
    key_of,
    list_some,
    make_source,
    without_split,
)
from mnistm_dist.data.sources.columns import open_columns
from mnistm_dist.data.sources.data_files import LOADERS, open_arrays
from mnistm_dist.data.sources.download import fetch_mnist
from mnistm_dist.data.sources.image_files import LABEL_SUFFIXES, SIDECARS, open_image_files
from mnistm_dist.data.sources.synthesis import open_mnist_and_photos, open_sample
from mnistm_dist.errors import UserError
from mnistm_dist.files import GIT_LFS_ADVICE, GIT_LFS_START

# Every layout, with its structure in one line. Those of files may also lie in a tar or zip.
KNOWN_LAYOUTS: Mapping[str, str] = {
    "sample": "the digits and photos bundled with this package",
    "mnist+photos": "made of MNIST (--mnist DIR|auto) and colour photos (--photos DIR)",
    "official": "mnist_m_train/*.png, mnist_m_train_labels.txt with lines NAME.png LABEL; the same for test",
    "image-folder": "a folder of images per class, in folders train, val and test if there are any",
    "csv": "images, and CSV files with the columns image_name,label: train.csv, val.csv; or a column split",
    "webdataset": "shards train-000000.tar ..., each image with KEY.cls, KEY.json or KEY.txt",
    "file-names": "train_images/NUMBER_LABEL.png; the same for test",
    "parquet": "train-*.parquet, test-*.parquet with the columns image {bytes, path} and label",
    "arrow": "train/*.arrow, test/*.arrow of Dataset.save_to_disk, with the same columns",
    "idx": "train-images-idx3-ubyte, train-labels-idx1-ubyte, the same for t10k: MNIST's files",
    "pt": "train.pt, test.pt: each a tuple (uint8 N x H x W x 3, int64 N), a dict or a TensorDataset",
    "npz": "train.npz, test.npz with images and labels; or one file with x_train, y_train, x_test, y_test",
    "npy": "train_images.npy, train_labels.npy; the same for test",
    "hdf5": "one file, groups train and test with the datasets X and Y",
    "mat": "one file of MATLAB 5: train, test, label_train, label_test",
    "pickle": "a dict of images and labels; labels from --mnist DIR|auto if it has none",
}

_SYNTHESISED = ("sample", "mnist+photos")  # made from ingredients, not read from a path
_TO_IMAGES = "with its own library, write the images into a folder per class, and pack that"
# What users take for a set of images, and what to do; by the first bytes of a file, or else by its suffix.
_NOT_READ: Mapping[str, tuple[tuple[bytes, ...], tuple[str, ...]]] = {
    GIT_LFS_ADVICE: ((GIT_LFS_START,), ()),
    "a web page": ((b"<",), ()),
    f"a TFRecord file, which is not read; {_TO_IMAGES}": ((), (".tfrecord", ".tfrecords", ".tfrec")),
    f"an LMDB database, which is not read; {_TO_IMAGES}": ((), (".mdb", ".lmdb")),
    "a 7z archive, which is not read; unpack it with 7z x FILE": ((b"7z\xbc\xaf\x27\x1c",), (".7z",)),
    "a RAR archive, which is not read; unpack it with unrar x FILE": ((b"Rar!",), (".rar",)),
    "compressed by zstd, which is not read; unpack it with zstd -d FILE": ((b"\x28\xb5\x2f\xfd",), (".zst", ".zstd")),
}
_KINDS: Mapping[str, tuple[tuple[bytes, ...], tuple[str, ...]]] = {
    "image": ((), SUFFIXES),
    **_NOT_READ,
    "parquet": ((b"PAR1",), (".parquet",)),
    "arrow": ((), (".arrow",)),
    "npz": ((), (".npz",)),
    "npy": ((b"\x93NUMPY",), (".npy",)),
    "pt": ((b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",), (".pt", ".pth")),  # the bytes: before PyTorch 1.6
    "hdf5": ((b"\x89HDF\r\n\x1a\n",), (".h5", ".hdf5")),
    "mat": ((b"MATLAB",), (".mat",)),
    "pickle": ((b"\x80",), (".pkl", ".pkl.gz", ".pickle", ".pickle.gz")),
    "idx": ((b"\0\0\x08",), ("-ubyte", "-ubyte.gz")),
    "archive": ((), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")),
    "text": ((), (*LABEL_SUFFIXES, *SIDECARS)),
}
_DATA_KINDS = (*LOADERS, "parquet", "arrow")  # kinds of files that hold images with their labels
_NESTED = 2  # archives in archives
_PART = re.compile(r"(\d{3,})(?:-of-(\d+))?(?=\D*$)")


def open_source(
    source: str,
    *,
    layout: str | None = None,
    mnist: str | None = None,
    photos: str | None = None,
    blends: int = 1,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> Source:
    """Open `sample`, `mnist+photos`, or a path in any of `KNOWN_LAYOUTS`, which is detected unless ``layout`` is set.

    ``mnist`` is a folder of MNIST's IDX files, or `auto` to download them into ``cache_dir`` (by default the user's
    cache): for `mnist+photos`, and for a pickle, which has no labels. ``photos`` is a folder of colour photos.
    ``blends`` is the number of training images made of each digit, each over another patch. ``seed`` chooses photo and
    position of every patch. Raises `UserError` for missing, damaged, hostile or unknown input.
    """
    if layout is not None and layout not in KNOWN_LAYOUTS:
        raise UserError(f"--layout {layout}: unknown; choose {', '.join(KNOWN_LAYOUTS)}")
    made = source in _SYNTHESISED
    if layout is not None and made | (layout in _SYNTHESISED) and layout != source:
        raise UserError(
            f"--layout {layout}: only for {layout if layout in _SYNTHESISED else 'a path'}, not for {source}"
        )
    if photos is not None and source != "mnist+photos":
        raise UserError(f"--photos: only for mnist+photos, not for {source}")
    if blends != 1 and not made:
        raise UserError(f"--blends: only for {' and '.join(_SYNTHESISED)}, not for {source}")
    for flag, value in (("--mnist", mnist), ("--photos", photos)):
        if source == "mnist+photos" and value is None:
            raise UserError(f"{source}: add {flag} DIR; {source}: {KNOWN_LAYOUTS[source]}")
    digits = fetch_mnist(choose_cache_dir(cache_dir)) if mnist == "auto" else None if mnist is None else Path(mnist)
    if source == "mnist+photos":
        return open_mnist_and_photos(Path(str(digits)), Path(str(photos)), seed=seed, blends=blends)
    opened = open_sample(seed=seed, blends=blends) if made else _open_path(Path(source), layout, digits)
    if mnist is not None and opened.layout != "pickle":
        raise UserError(f"--mnist: only for mnist+photos and pickle, not for layout {opened.layout}")
    if not opened.counts.get("train"):
        listed = ", ".join(f"{count} {split}" for split, count in opened.counts.items()) or "0 train"
        notes = "".join(f"; {note}" for note in opened.notes[:3])
        raise UserError(f"{opened.description}: found {listed} images; expected train{notes}")
    return opened


def _open_path(path: Path, layout: str | None, mnist: Path | None) -> Source:
    """Return the only set of a path, limited to ``layout`` if it is set. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a path, sample or mnist+photos")
    own = {} if path.is_dir() else {path.name: _file_kind(path)}
    tree = Tree(path) if path.is_dir() else Tree(path.parent, _siblings(path, own[path.name]))
    together = [] if path.is_dir() else tree.files()
    if "manifest.json" in tree.files() and any(name.endswith(".index.npy") for name in tree.files()):
        raise UserError(f"{path}: a packed set; train on it with --shards")
    beside, archives = set[str](), list[str]()
    for _ in range(_NESTED + 1):
        if archives:
            _check_parts(tree, archives)
            tree.mount(archives)
        kinds = {name: own.get(name, _kind(name)) for name in tree.files()}
        stems = {key_of(name) for name, kind in kinds.items() if kind in ("image", "archive")} | set(
            map(key_of, archives)
        )
        # Images beside archives without labels of their own are taken only if the archives label them.
        inside = {name: kind for name, kind in kinds.items() if name not in beside}
        found, problems = _read_sets(tree, inside, stems, layout, mnist)
        if not found and beside:
            found, problems = _read_sets(tree, kinds, stems, layout, mnist)
        beside |= {name for name, kind in kinds.items() if kind == "image"}
        archives = [name for name, kind in kinds.items() if kind == "archive"]
        if found or not archives:
            break
    if len(found) > 1:
        listed = "; ".join(f"{one.layout}: {one.place}" for one in found)
        raise UserError(f"{path}: several sets of images ({listed}); give the path of one, or --layout")
    if not found:
        for problem in problems:
            raise problem
        expected = "" if layout is None else f"{layout}: {KNOWN_LAYOUTS[layout]}"
        known = ", ".join(name for name in KNOWN_LAYOUTS if name not in _SYNTHESISED)
        raise UserError(
            f"{path}: unrecognised layout: found {_describe(path, kinds)}; expected {expected or f'one of {known}'} "
            "(see pack --layouts)"
        )
    left = [name for name in kinds if name not in found[0].used] + tree.empty_folders()
    notes = [f"left out: {error}" for error in problems]
    notes += [f"left out: {list_some(left)}"] if left else []
    notes += [f"read together: {list_some(together)}"] if len(together) > 1 else []
    is_data = found[0].layout in _DATA_KINDS
    return make_source(found[0], found[0].place if is_data else str(path), notes)


def _read_sets(
    tree: Tree, kinds: Mapping[str, str | None], stems: Container[str], layout: str | None, mnist: Path | None
) -> tuple[list[ImageSet], list[UserError]]:
    """Return the sets among files with these kinds, and why other images were none.

    Data files named as the images or archives of ``stems`` are metadata beside them, as img2dataset writes it, or parts
    of samples: no sets of their own.
    """
    sets: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds.items():
        if kind in _DATA_KINDS and key_of(name) not in stems and layout in (None, kind):
            sets.setdefault((str(kind), _set_key(tree.folders(name), name)), []).append(name)
    readers: list[Callable[[], list[ImageSet]]] = [
        partial(_open_data, tree, kind, files, mnist) for (kind, _), files in sets.items()
    ]
    if "image" in kinds.values() and layout not in _DATA_KINDS:
        of_images = [name for name, kind in kinds.items() if kind in ("image", "text")]
        readers.append(partial(open_image_files, tree, of_images, layout))
    found: list[ImageSet] = []
    problems: list[UserError] = []
    for reader in readers:
        try:
            found += reader()
        except NoLabelsError as error:
            problems.append(error)
    return found, problems


def _open_data(tree: Tree, layout: str, files: Sequence[str], mnist: Path | None) -> list[ImageSet]:
    _check_parts(tree, files)
    return [open_arrays(layout, tree, files, mnist) if layout in LOADERS else open_columns(layout, tree, files)]


def _set_key(folders: Sequence[str], name: str) -> str:
    """Return what the names of all files of a set have in common: the name without splits, roles and part numbers."""
    common = [re.sub(r"\d{3,}", "#", without_split(folder)) for folder in folders]
    base = _PART.sub("#", name.rpartition("/")[2])
    base = re.sub(r"images?|imgs?|labels?|targets?|idx\d|(?<![a-z])[xy](?![a-z])", "", without_split(base))
    return "/".join([*filter(None, common), re.sub(r"[\W_]+", "-", base).strip("-")])


def _check_parts(tree: Tree, files: Sequence[str]) -> None:
    """Raise `UserError` if a numbered part of a set is missing."""
    series: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in files:
        for match in [*_PART.finditer(name)][-1:]:
            parts = series.setdefault((name[: match.start()], name[match.end() :], int(match[2] or 0)), {})
            parts[int(match[1])] = name
    for (start, end, total), parts in series.items():
        wanted = range(total) if total else range(min(parts), max(parts))
        missing = [number for number in wanted if number not in parts]
        if missing and (total or len(parts) * 2 > len(wanted)):
            first = f"{start.rpartition('/')[2]}{missing[0]:05d}{end}"
            raise UserError(
                f"{tree.origin(parts[min(parts)])}: {len(missing)} parts of this set are missing, the first like "
                f"{first}; put all parts into one folder"
            )


def _siblings(path: Path, kind: str | None) -> list[str]:
    """Return the names of a file of this kind and of the others of its set in its folder."""
    if kind not in (*_DATA_KINDS, "archive") or not path.suffix:
        return [path.name]
    names = [file.name for file in path.parent.glob(f"*{glob.escape(path.suffix)}") if file.is_file()]
    of_set = {name for name in names if _set_key([], name) == _set_key([], path.name) and _kind(name) == kind}
    return sorted({path.name} | {name for name in of_set if not name.startswith(".")})


def _kind(name: str, head: bytes = b"") -> str | None:
    """Return what the first bytes of a file, or else its name, say of it: one of `_KINDS`, or None."""
    head, name = head.lstrip(), name.lower()
    if head and (by_head := next((kind for kind, (starts, _) in _KINDS.items() if head.startswith(starts)), None)):
        return by_head
    return next((kind for kind, (_, suffixes) in _KINDS.items() if name.endswith(suffixes)), None)


def _file_kind(path: Path) -> str | None:
    """Return the kind of a file on disk, which may be compressed."""
    head = _head(path)
    if head[257:262] == b"ustar":
        return "archive"
    if not head.startswith(ZIP_STARTS):
        return _kind(path.name, head)
    names: list[str] = []
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(path) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    arrays = names and all(name.endswith(".npy") for name in names)
    return "npz" if arrays else "pt" if "data.pkl" in names else "archive"


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with explain_decode_errors(path, "compressed as expected"):
        return Decompressed(path).read(512)


def _describe(path: Path, kinds: Mapping[str, str | None]) -> str:
    """Describe a path that holds no known layout, with the next step if there is one."""
    for name, kind in kinds.items():
        if (kind := kind or _file_kind(path / name)) in _NOT_READ:
            return f"{name}: {kind}" if path.is_dir() else str(kind)
    if path.is_dir():
        names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        return ", ".join(names[:6]) + ", ..." * (len(names) > 6) or "an empty folder"
    if not (head := _head(path)):
        return "an empty file" if path.is_file() else "neither a file nor a folder"
    kind = _file_kind(path)
    if kind == "archive":
        return f"an archive of {list_some([name.partition('/')[2] for name in kinds]) or 'no files'}"
    return f"a {kind} file" if kind else f"a file that starts with {head[:16]!r}"
