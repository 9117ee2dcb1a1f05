"""Open MNIST-M in any layout as a `Source` of labelled images.

1. `sample` and `mnist+photos` are synthesised (`synthesis.py`).
2. The layout of a path is detected: a file's by its first bytes, a folder's or an archive's by the names in it. These
   are searched two folders deep, since archives often wrap their content; the first depth where a layout fits counts.
3. The layout's reader checks structure and labels, and returns the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.sources.archives import Folder, Tar, Tree, Zip
from mnistm_dist.data.sources.base import Source, group_by_split
from mnistm_dist.data.sources.data_files import open_hdf5, open_mat, open_npz, open_parquet, open_pt
from mnistm_dist.data.sources.download import fetch_mnist
from mnistm_dist.data.sources.file_types import describe, file_type, is_data_file
from mnistm_dist.data.sources.image_files import (
    is_csv,
    is_image_folder,
    is_official,
    open_csv,
    open_image_folder,
    open_official,
)
from mnistm_dist.data.sources.pickles import open_pickle
from mnistm_dist.data.sources.synthesis import open_mnist_and_photos, open_sample
from mnistm_dist.errors import UserError

# The layouts that are made from ingredients, not read from a path.
_SYNTHESISED = ("sample", "mnist+photos")
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
"""Every layout, with its structure in one line."""

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
    "hdf5": (lambda file: file_type(file) == "hdf5", open_hdf5),
    "mat": (lambda file: file_type(file) == "mat", open_mat),
    "pickle": (lambda file: file_type(file) == "pickle", open_pickle),
}
# Layouts, also file types, with files for each split: the names of the files, and the reader of all of them.
_FILE_SETS: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Sequence[Path]]], Source]]] = {
    "parquet": ((".parquet",), open_parquet),
    "pt": ((".pt", ".pth"), open_pt),
    "npz": ((".npz",), open_npz),
}
_DEPTH, _MAX_FOLDERS = 2, 1_000  # of the search for a layout; folders per depth


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
    """Open `sample`, `mnist+photos`, or a path in any of `KNOWN_LAYOUTS`, which is detected unless ``layout`` is set.

    ``mnist`` is a folder of MNIST's IDX files, or `auto` to download them into ``cache_dir`` (by default the user's
    cache): for `mnist+photos`, and for a pickle, which has no labels. ``photos`` is a folder of colour photos.
    ``blends`` is the number of training images made of each digit, each over another patch (default: 1). ``seed``
    chooses photo and position of every patch. Raises `UserError` for missing, damaged, hostile or unknown input.
    """
    if layout is not None and layout not in KNOWN_LAYOUTS:
        raise UserError(f"--layout {layout}: unknown; choose {', '.join(KNOWN_LAYOUTS)}")
    if source in _SYNTHESISED and layout not in (None, source):
        raise UserError(f"--layout {layout}: only for a path, not for {source}")
    for flag, value, accepted in (("--blends", blends, _SYNTHESISED), ("--photos", photos, _SYNTHESISED[1:])):
        if value is not None and source not in accepted:
            raise UserError(f"{flag}: only for {' and '.join(accepted)}, not for {source}")
    if source == "sample" and mnist is not None:
        raise UserError("--mnist: only for mnist+photos and pickles; the sample has its own digits")
    if source == "mnist+photos" and (mnist is None or photos is None):
        raise UserError("mnist+photos needs --mnist DIR (or auto) with MNIST's IDX files, and --photos DIR")
    digits = fetch_mnist(choose_cache_dir(cache_dir)) if mnist == "auto" else Path(mnist or "")
    if source == "sample":
        opened = open_sample(seed=seed, blends=1 if blends is None else blends)
    elif source == "mnist+photos":
        opened = open_mnist_and_photos(digits, Path(photos or ""), seed=seed, blends=1 if blends is None else blends)
    else:
        opened = _open_path(Path(source), layout, None if mnist is None else digits)
    if not all(opened.counts.get(split) for split in ("train", *opened.counts)):
        found = ", ".join(f"{count} {split}" for split, count in opened.counts.items()) or "no"
        raise UserError(f"{opened.description}: found {found} images; expected train, and no empty split")
    return opened


def _open_path(path: Path, layout: str | None, mnist: Path | None) -> Source:
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
            f"{path}: unrecognised layout: found {describe(path)}; expected {expected} (see pack --layouts)"
        )
    if found[0].layout == "pickle":
        return found[0].open(mnist=mnist)
    if mnist is not None:
        raise UserError(f"--mnist: only for mnist+photos and pickles; {path} is in layout {found[0].layout}")
    return found[0].open()


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A layout that fits a path."""

    layout: str
    paths: list[Path]  # the folder or files that it fits
    open: Callable[..., Source]

    def is_wanted(self, layout: str | None) -> bool:
        """Return whether ``layout`` is this one, its family or not set."""
        return layout in (None, self.layout, self.layout.partition("-")[0])


def _detect(path: Path, layout: str | None) -> list[_Candidate]:
    """Return every layout that fits a path, limited to ``layout`` if it is set."""
    kind = None if path.is_dir() else file_type(path)
    if not path.is_dir() and kind not in ("tar", "zip"):
        siblings = {file for file in path.parent.iterdir() if file.suffix == path.suffix and is_data_file(file)}
        found = _in_files(sorted({path, *siblings}))
        return [one for one in found if path in one.paths and one.is_wanted(layout)]
    tree = Tar(path) if kind == "tar" else Zip(path) if kind == "zip" else Folder(path)
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
        files = (tree.path / top / name for name in tree.listing(top)[1])
        yield from _in_files([file for file in files if is_data_file(file)])


def _in_files(files: Sequence[Path]) -> Iterator[_Candidate]:
    for layout, (fits, open_file) in _FILES.items():
        for file in files:
            if fits(file):
                yield _Candidate(layout=layout, paths=[file], open=partial(open_file, file))
    for layout, (suffixes, open_files) in _FILE_SETS.items():
        of_type = (file for file in files if file.name.lower().endswith(suffixes) or file_type(file) == layout)
        for splits in group_by_split(of_type):
            paths = [path for parts in splits.values() for path in parts]
            yield _Candidate(layout=layout, paths=paths, open=partial(open_files, splits))
