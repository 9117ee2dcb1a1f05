"""Open MNIST-M in any layout as a `Source` of labelled images.

1. `sample` and `mnist+photos` are synthesised (`synthesis.py`).
2. The layout of a path is detected: a file's by its first bytes, a folder's or an archive's by the names in it. These
   are searched two folders deep, since archives often wrap their content; the first depth where a layout fits counts.
3. The layout's reader checks structure and labels, and returns the source.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.image_io import UNREADABLE, explain_decode_errors
from mnistm_dist.data.sources.archives import Decompressed, Folder, Tar, Tree, Zip
from mnistm_dist.data.sources.base import Source, group_by_split, split_of
from mnistm_dist.data.sources.data_files import open_hdf5, open_mat, open_npz, open_parquet, open_pickle, open_pt
from mnistm_dist.data.sources.download import fetch_mnist
from mnistm_dist.data.sources.image_files import (
    is_csv,
    is_image_folder,
    is_official,
    open_csv,
    open_image_folder,
    open_official,
)
from mnistm_dist.data.sources.synthesis import open_mnist_and_photos, open_sample
from mnistm_dist.errors import UserError

# Every layout, with its structure in one line.
KNOWN_LAYOUTS: Mapping[str, str] = {
    "sample": "the digits and photos bundled with this package",
    "mnist+photos": "made of MNIST (--mnist DIR|auto) and colour photos (--photos DIR)",
    "official": "any of the next three",
    "official-folder": "mnist_m_train/*.png, mnist_m_train_labels.txt with lines NAME.png LABEL; the same for test",
    "official-tar": "the same in a tar, compressed or not",
    "official-zip": "the same in a zip",
    "image": "any of the next three",
    "image-folder": "{training,testing}/{0..9}/*.png",
    "image-tar": "the same in a tar, compressed or not",
    "image-zip": "the same in a zip",
    "csv": "a folder of images, train.csv and val.csv with the columns image_name,label; also in a tar or zip",
    "parquet": "train-*.parquet, test-*.parquet with the columns image {bytes, path} and label",
    "pt": "mnist_m_train.pt, mnist_m_test.pt: each a tuple (uint8 N x H x W x 3, int64 N)",
    "npz": "train.npz, test.npz: each with images uint8 N x H x W x 3 and labels",
    "hdf5": "one file, groups train and test with the datasets X and Y",
    "mat": "one file of MATLAB 5: train, test, label_train, label_test",
    "pickle": "one .pkl or .pkl.gz, a dict of the images train and test; labels from --mnist DIR|auto",
}

# The layouts that are made from ingredients, not read from a path, and their readers.
_SYNTHESISED: Mapping[str, Callable[..., Source]] = {"sample": open_sample, "mnist+photos": open_mnist_and_photos}
# Layouts of image files: whether one starts in a folder of a tree, and its reader.
_TREES: Mapping[str, tuple[Callable[[Tree, str], bool], Callable[[Tree, str], Source]]] = {
    "official": (is_official, open_official),
    "image": (is_image_folder, open_image_folder),
    "csv": (is_csv, open_csv),
}
# Layouts whose full names say whether they lie in a folder, a tar or a zip.
_FAMILIES = ("official", "image")
# Layouts of one file: whether a file has this layout, and its reader.
_FILES: Mapping[str, tuple[Callable[[Path], bool], Callable[..., Source]]] = {
    "hdf5": (lambda file: _file_type(file) == "hdf5", open_hdf5),
    "mat": (lambda file: _file_type(file) == "mat", open_mat),
    "pickle": (lambda file: _file_type(file) == "pickle", open_pickle),
}
# Layouts, also file types, with files for each split: the names of the files, and the reader of all of them.
_FILE_SETS: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Sequence[Path]]], Source]]] = {
    "parquet": ((".parquet",), open_parquet),
    "pt": ((".pt", ".pth"), open_pt),
    "npz": ((".npz",), open_npz),
}
# File types that hold files under names.
_TREE_TYPES: Mapping[str | None, Callable[[Path], Tree]] = {"folder": Folder, "tar": Tar, "zip": Zip}
_PICKLE_SUFFIXES = (".pkl", ".pkl.gz", ".pickle", ".pickle.gz")
_DATA_SUFFIXES = (".h5", ".hdf5", ".mat", ".npz", ".parquet", ".pt", ".pth", *_PICKLE_SUFFIXES)
_SIGNATURES: Mapping[bytes, str] = {
    b"PAR1": "parquet",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"MATLAB 5.0 MAT-file": "mat",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "pt",  # before PyTorch 1.6
    b"\x80": "pickle",
}
_MNIST = "MNIST itself; blend it over photos: pack mnist+photos --mnist DIR --photos DIR"
# Files that users take for a set of images, by their first bytes.
_FOREIGN: Mapping[bytes, str] = {
    b"\0\0\x08": _MNIST,
    b"MATLAB 7.3": "a MATLAB 7.3 file; save it with -v7, which writes MATLAB 5",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch it with git lfs pull",
    b"<": "a web page",
}
_DEPTH, _MAX_FOLDERS = 2, 1_000  # of the search for a layout; folders per depth


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A layout that fits a source."""

    layout: str
    paths: list[Path]  # the folder or files that it fits
    open: Callable[..., Source]

    def is_wanted(self, layout: str | None) -> bool:
        """Return whether ``layout`` is this one, its family or not set."""
        return layout in (None, self.layout, self.layout.partition("-")[0])


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
    if source in _SYNTHESISED:
        found = _Candidate(layout=source, paths=[], open=_SYNTHESISED[source])
    else:
        found = _find(Path(source), layout)
    if not found.is_wanted(layout):
        raise UserError(f"--layout {layout}: only for a path, not for {source}")
    for flag, folder, layouts in (
        ("--mnist", mnist, ("mnist+photos", "pickle")),
        ("--photos", photos, ("mnist+photos",)),
    ):
        if folder is None and found.layout in layouts:
            raise UserError(f"{source}: add {flag} DIR; {found.layout}: {KNOWN_LAYOUTS[found.layout]}")
        if folder is not None and found.layout not in layouts:
            raise UserError(f"{flag}: only for {' and '.join(layouts)}, not for layout {found.layout}")
    if blends != 1 and source not in _SYNTHESISED:
        raise UserError(f"--blends: only for {' and '.join(_SYNTHESISED)}, not for layout {found.layout}")
    options: dict[str, Any] = {"seed": seed, "blends": blends} if source in _SYNTHESISED else {}
    if mnist is not None:
        options["mnist"] = fetch_mnist(choose_cache_dir(cache_dir)) if mnist == "auto" else Path(mnist)
    if photos is not None:
        options["photos"] = Path(photos)
    opened = found.open(**options)
    if not all(opened.counts.get(split, 0) > 0 for split in ("train", *opened.counts)):
        listed = ", ".join(f"{count} {split}" for split, count in opened.counts.items()) or "no"
        raise UserError(f"{opened.description}: found {listed} images; expected train, and no empty split")
    return opened


def _find(path: Path, layout: str | None) -> _Candidate:
    """Return the only layout that fits a path, limited to ``layout`` if it is set. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a path, sample or mnist+photos")
    found = _detect(path, layout)
    if len(found) > 1:
        listed = "; ".join(f"{one.layout}: {', '.join(map(str, one.paths))}" for one in found)
        raise UserError(f"{path}: several sets of images ({listed}); give the path of one, or --layout")
    if not found:
        known = [name for name in KNOWN_LAYOUTS if name not in (*_SYNTHESISED, *_FAMILIES)]
        expected = f"one of {', '.join(known)}" if layout is None else f"{layout}: {KNOWN_LAYOUTS[layout]}"
        raise UserError(
            f"{path}: unrecognised layout: found {_describe(path)}; expected {expected} (see pack --layouts)"
        )
    return found[0]


def _detect(path: Path, layout: str | None) -> list[_Candidate]:
    kind = _file_type(path)
    if kind not in _TREE_TYPES:
        alike = (file for file in path.parent.iterdir() if file.suffix == path.suffix)
        found = _in_files(sorted({path, *(file for file in alike if file.name.lower().endswith(_DATA_SUFFIXES))}))
        return [one for one in found if path in one.paths and one.is_wanted(layout)]
    tree = _TREE_TYPES[kind](path)
    level = [""]
    for _ in range(_DEPTH + 1):
        if fitting := [one for top in level for one in _in_folder(tree, top) if one.is_wanted(layout)]:
            return fitting
        level = [f"{top}{name}/" for top in level for name in tree.listing(top)[0]][:_MAX_FOLDERS]
    return []


def _in_folder(tree: Tree, top: str) -> Iterator[_Candidate]:
    for name, (starts, opener) in _TREES.items():
        if starts(tree, top):
            layout = f"{name}-{tree.kind}" if name in _FAMILIES else name
            yield _Candidate(layout=layout, paths=[tree.path / top], open=partial(opener, tree, top))
    if isinstance(tree, Folder):
        names = (name for name in tree.listing(top)[1] if name.lower().endswith(_DATA_SUFFIXES))
        yield from _in_files([tree.path / top / name for name in names])


def _in_files(files: Sequence[Path]) -> Iterator[_Candidate]:
    for layout, (fits, open_file) in _FILES.items():
        for file in files:
            if fits(file):
                yield _Candidate(layout=layout, paths=[file], open=partial(open_file, file))
    for layout, (suffixes, open_files) in _FILE_SETS.items():
        of_type = (file for file in files if file.name.lower().endswith(suffixes) or _file_type(file) == layout)
        for splits in group_by_split(of_type):
            paths = [path for parts in splits.values() for path in parts]
            yield _Candidate(layout=layout, paths=paths, open=partial(open_files, splits))


def _file_type(path: Path) -> str | None:
    """Return `folder`, `tar`, `zip`, the layout of a data file, or None for any other file.

    Raises `UserError` if the file cannot be read.
    """
    if path.is_dir():
        return "folder"
    head = _head(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_type(path)
    if head[257:262] == b"ustar":
        return "tar"
    known = next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)
    # The oldest pickles have no first bytes of their own.
    return "pickle" if known is None and path.name.lower().endswith(_PICKLE_SUFFIXES) else known


def _describe(path: Path) -> str:
    """Describe a path that holds no known layout, with the next step if there is one."""
    if path.is_dir():
        names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        if "manifest.json" in names:
            return "a packed set; train on it with --shards"
        if any(name.startswith(("train-images", "t10k-images")) for name in names):
            return _MNIST
        return ", ".join(names[:6]) + ", ..." * (len(names) > 6) or "an empty folder"
    head = _head(path)
    if not head:
        return "an empty file" if path.is_file() else "neither a file nor a folder"
    for signature, description in _FOREIGN.items():
        if head.lstrip().startswith(signature):
            return description
    kind = _file_type(path)
    no_split = "" if split_of(path.name) else " without train, val or test in its name"
    return f"a {kind} file{no_split}" if kind else f"a file that starts with {head[:16]!r}"


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with explain_decode_errors(path, "compressed as expected"):
        return Decompressed(path).read(512)


def _zip_type(path: Path) -> str:
    names: list[str] = []
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "pt" if any(name.rpartition("/")[2] == "data.pkl" for name in names) else "zip"
