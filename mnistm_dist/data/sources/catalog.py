"""Open labelled images in any layout as a `Source`.

1. `sample` and `mnist+photos` are synthesised (`synthesis.py`).
2. The files of a path are listed, at any depth: a file together with the others of its set, an archive as a folder.
   An archive in a folder is only opened if nothing else there can be read.
3. Each layout's reader makes tables of its files (`image_files.py`, `data_files.py`, `columns.py`). A set with labels
   is preferred to one without; several sets are refused. Files that no reader used are noted.
"""

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.image_io import SUFFIXES, UNREADABLE, explain_decode_errors
from mnistm_dist.data.sources.archives import Decompressed, Folder, Mounted, Tree
from mnistm_dist.data.sources.base import NoLabelsError, Source, list_some, make_source, without_split
from mnistm_dist.data.sources.columns import open_columns
from mnistm_dist.data.sources.data_files import LOADERS, open_arrays
from mnistm_dist.data.sources.download import fetch_mnist
from mnistm_dist.data.sources.image_files import LABEL_SUFFIXES, SIDECARS, key_of, open_image_files
from mnistm_dist.data.sources.synthesis import open_mnist_and_photos, open_sample
from mnistm_dist.errors import UserError

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

# The layouts that are made from ingredients, not read from a path, and their readers.
_SYNTHESISED: Mapping[str, Callable[..., Source]] = {"sample": open_sample, "mnist+photos": open_mnist_and_photos}
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "npz": (".npz",),
    "npy": (".npy",),
    "pt": (".pt", ".pth"),
    "hdf5": (".h5", ".hdf5"),
    "mat": (".mat",),
    "pickle": (".pkl", ".pkl.gz", ".pickle", ".pickle.gz"),
    "idx": ("-ubyte", "-ubyte.gz"),
    "archive": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip"),
}
_SIGNATURES: Mapping[bytes, str] = {
    b"PAR1": "parquet",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"MATLAB 5.0 MAT-file": "mat",
    b"\x93NUMPY": "npy",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "pt",  # before PyTorch 1.6
    b"\x80": "pickle",
    b"\0\0\x08": "idx",
}
_TO_IMAGES = "with its own library, write the images into a folder per class, and pack that"
# Files that users take for a set of images, by their first bytes or suffixes: what they are, and what to do.
_FOREIGN: Mapping[str, tuple[bytes, tuple[str, ...]]] = {
    "a MATLAB 7.3 file; save it with -v7, which writes MATLAB 5": (b"MATLAB 7.3", ()),
    "a Git LFS pointer in place of the file; fetch it with git lfs pull": (b"version https://git-lfs", ()),
    "a web page": (b"<", ()),
    f"a TFRecord file, which is not read; {_TO_IMAGES}": (b"?TFRecord", (".tfrecord", ".tfrecords", ".tfrec")),
    f"an LMDB database, which is not read; {_TO_IMAGES}": (b"?LMDB", (".mdb", ".lmdb")),
    "a 7z archive, which is not read; unpack it with 7z x FILE": (b"7z\xbc\xaf\x27\x1c", (".7z",)),
    "a RAR archive, which is not read; unpack it with unrar x FILE": (b"Rar!", (".rar",)),
    "compressed by zstd, which is not read; unpack it with zstd -d FILE": (b"\x28\xb5\x2f\xfd", (".zst", ".zstd")),
}
_DATA_KINDS = (*LOADERS, "parquet", "arrow")  # kinds of files that hold images with their labels
_NESTED = 2  # archives in archives
_PART = re.compile(r"(\d{3,})(?:-of-(\d+))?(?=\D*$)")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A set of images: the reader that opens it, and the files that it uses."""

    layout: str
    top: str
    source: Source
    used: frozenset[str]


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
    tree: Tree = Folder(path if path.is_dir() else path.parent)
    kinds = {name: _kind(name) for name in tree.files()} if path.is_dir() else _siblings(path)
    if "manifest.json" in kinds and any(name.endswith(".index.npy") for name in kinds):
        raise UserError(f"{path}: a packed set; train on it with --shards")
    together = list(kinds)
    for level in range(_NESTED + 1):
        found, problems = _read_sets(tree, path, kinds, layout, mnist)
        archives = [name for name, kind in kinds.items() if kind == "archive"]
        if found or not archives or level == _NESTED:
            break
        _check_parts(tree, archives)
        tree = Mounted(tree, archives)
        kinds = {name: _kind(name) for name in tree.files()}
    if len(found) > 1:
        listed = "; ".join(f"{one.layout}: {one.top}" for one in found)
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
    left = [name for name in kinds if name not in found[0].used] + sorted(tree.empty)
    notes = [f"left out: {list_some(left)}"] if left else []
    if not path.is_dir() and len(together) > 1:
        notes.append(f"read together: {list_some(together)}")
    source = found[0].source
    return replace(source, notes=(*source.notes, *notes))


def _read_sets(
    tree: Tree, path: Path, kinds: Mapping[str, str | None], layout: str | None, mnist: Path | None
) -> tuple[list[_Found], list[UserError]]:
    """Return the sets among files with these kinds, and why other images were none."""
    found: list[_Found] = []
    problems: list[UserError] = []
    images = {key_of(name) for name, kind in kinds.items() if kind == "image"}
    # A metadata file beside a shard, as img2dataset writes it, and parts of samples are no sets of their own.
    stems = images | {key_of(name) for name, kind in kinds.items() if kind == "archive"}
    sets: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds.items():
        if kind in _DATA_KINDS and key_of(name) not in stems and layout in (None, kind):
            sets.setdefault((str(kind), _set_key(tree, name)), []).append(name)
    readers: list[Callable[[], Iterator[_Found]]] = [
        partial(_open_data, tree, kind, files, mnist) for (kind, _), files in sets.items()
    ]
    if images and layout not in _DATA_KINDS:
        of_images = [name for name, kind in kinds.items() if kind in ("image", "text")]
        readers.append(partial(_open_images, tree, path, of_images, layout))
    for reader in readers:
        try:
            found += reader()
        except NoLabelsError as error:
            problems.append(error)
    noted = tuple(f"left out: {error}" for error in problems)
    return [replace(one, source=replace(one.source, notes=(*one.source.notes, *noted))) for one in found], problems


def _open_data(tree: Tree, layout: str, files: Sequence[str], mnist: Path | None) -> Iterator[_Found]:
    _check_parts(tree, files)
    classes = None
    if layout in LOADERS:
        tables, notes, classes = open_arrays(layout, tree, files, mnist)
    else:
        tables, notes = open_columns(layout, tree, files)
    description = list_some([tree.origin(file) for file in files])
    source = make_source(layout, tables, description=description, notes=notes, classes=classes)
    yield _Found(layout=layout, top=description, source=source, used=frozenset(files))


def _open_images(tree: Tree, path: Path, files: Sequence[str], layout: str | None) -> Iterator[_Found]:
    for one in open_image_files(tree, files, layout):
        source = make_source(one.layout, [one.table(tree)], description=str(path), notes=one.notes)
        yield _Found(
            layout=one.layout, top=tree.origin(one.top), source=source, used=frozenset([*one.names, *one.used])
        )


def _set_key(tree: Tree, name: str) -> str:
    """Return what the names of all files of a set have in common: the name without splits, roles and part numbers."""
    folders = [re.sub(r"\d{3,}", "#", without_split(folder)) for folder in tree.folders(name)]
    base = _PART.sub("#", name.rpartition("/")[2])
    base = re.sub(r"images?|imgs?|labels?|targets?|idx\d|(?<![a-z])[xy](?![a-z])", "", without_split(base))
    same = [folder for folder in folders if folder]
    return "/".join([*same, re.sub(r"[\W_]+", "-", base).strip("-")])


def _check_parts(tree: Tree, files: Sequence[str]) -> None:
    """Raise `UserError` if a numbered part of a set is missing."""
    parts: dict[str, dict[int, str]] = {}
    totals: dict[str, int] = {}
    for name in files:
        if match := list(_PART.finditer(name))[-1:]:
            series = name[: match[0].start()] + "#" + name[match[0].end() :]
            parts.setdefault(series, {})[int(match[0][1])] = name
            totals[series] = int(match[0][2] or 0)
    for series, numbers in parts.items():
        total = totals[series]
        wanted = range(total) if total else range(min(numbers), max(numbers))
        missing = [number for number in wanted if number not in numbers]
        if missing and (total or len(numbers) * 2 > len(wanted)):
            part = series.replace("#", f"{missing[0]:05d}")
            raise UserError(
                f"{tree.origin(numbers[min(numbers)])}: {len(missing)} parts of this set are missing, the first like "
                f"{part.rpartition('/')[2]}; put all parts into one folder"
            )


def _siblings(path: Path) -> dict[str, str | None]:
    """Return the kinds of a file and of the others of its set in its folder."""
    kind, folder = _file_kind(path), Folder(path.parent)
    kinds: dict[str, str | None] = {path.name: kind}
    if kind in (*_DATA_KINDS, "archive") and path.suffix:
        key = _set_key(folder, path.name)
        for file in sorted(path.parent.iterdir()):
            of_set = file.suffix == path.suffix and _set_key(folder, file.name) == key
            if of_set and not file.name.startswith(".") and file.is_file() and _kind(file.name) == kind:
                kinds[file.name] = kind
    return dict(sorted(kinds.items()))


def _kind(name: str) -> str | None:
    """Return what a name says of a file: `image`, `text`, `archive`, the layout of a data file, or None."""
    lower = name.lower()
    if lower.endswith(SUFFIXES):
        return "image"
    found = next((kind for kind, suffixes in _SUFFIXES.items() if lower.endswith(suffixes)), None)
    return "text" if found is None and lower.endswith((*LABEL_SUFFIXES, *SIDECARS)) else found


def _file_kind(path: Path) -> str | None:
    """Return the same from the first bytes of a file, or else from its name."""
    head = _head(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(path)
    if head[257:262] == b"ustar":
        return "archive"
    known = next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)
    by_name = _kind(path.name)
    # A file with a signature is what its signature says.
    return known or (by_name if by_name not in _SIGNATURES.values() or by_name == "pickle" else None)


def _describe(path: Path, kinds: Mapping[str, str | None]) -> str:
    """Describe a path that holds no known layout, with the next step if there is one."""
    if path.is_dir():
        for name in kinds:
            if foreign := _foreign(name, _head(path / name) if kinds[name] is None else b""):
                return f"{name}: {foreign}"
        names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        return ", ".join(names[:6]) + ", ..." * (len(names) > 6) or "an empty folder"
    head = _head(path)
    if foreign := _foreign(path.name, head):
        return foreign
    if not head:
        return "an empty file" if path.is_file() else "neither a file nor a folder"
    kind = _file_kind(path)
    if kind == "archive":
        return f"an archive of {list_some([name.partition('/')[2] for name in kinds]) or 'no files'}"
    return f"a {kind} file" if kind else f"a file that starts with {head[:16]!r}"


def _foreign(name: str, head: bytes) -> str | None:
    for description, (signature, suffixes) in _FOREIGN.items():
        if head.lstrip().startswith(signature) or (suffixes and name.lower().endswith(suffixes)):
            return description
    return None


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with explain_decode_errors(path, "compressed as expected"):
        return Decompressed(path).read(512)


def _zip_kind(path: Path) -> str:
    names: list[str] = []
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "pt" if any(name.rpartition("/")[2] == "data.pkl" for name in names) else "archive"
