"""Which layout a path holds, told by looking: by a file's first bytes, by the names in a folder or archive.

Names are looked at down to two folders deep, since archives like to wrap what they hold. The first depth at which a
layout fits decides; where two fit there, or none at all, what was found is said and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mnistm_dist.data.sources.archives import Folder, Tar, Tree, Zip
from mnistm_dist.data.sources.arrays import open_hdf5, open_mat, open_npz, open_pt
from mnistm_dist.data.sources.base import Source
from mnistm_dist.data.sources.csv_files import is_course, open_course
from mnistm_dist.data.sources.file_types import PICKLE_SUFFIXES, contents, kind_of
from mnistm_dist.data.sources.image_folder import is_image_folder, open_image_folder
from mnistm_dist.data.sources.labels import sets_of_files
from mnistm_dist.data.sources.official import is_official, open_official
from mnistm_dist.data.sources.parquet import open_parquet
from mnistm_dist.data.sources.pickles import open_pickle
from mnistm_dist.errors import UserError

MADE_LAYOUTS = ("sample", "mnist+photos")
"""The layouts that are made from ingredients, not read from a path."""
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
    "course": "a folder of images, train.csv and val.csv with the columns image_name,label; also in a tar or zip",
    "parquet": "train-*.parquet, test-*.parquet with the columns image {bytes, path} and label",
    "pt": "mnist_m_train.pt, mnist_m_test.pt: each a tuple (uint8 N x H x W x 3, int64 N)",
    "npz": "train.npz, test.npz: each with images uint8 N x H x W x 3 and labels",
    "hdf5": "one file, groups train and test with the datasets X and Y",
    "mat": "one file of MATLAB 5: train, test, label_train, label_test",
    "pickle": "one .pkl or .pkl.gz, a dict of the images train and test; labels from --mnist DIR|auto",
}
"""Every layout that is known, with its structure in a line."""

_DEPTH = 2
_MAX_FOLDERS = 1_000

TreeReader = tuple[Callable[[Tree, str], bool], Callable[[Tree, str], Source]]
"""Whether a folder of a tree is the top of a layout, and what opens it there."""
_IN_TREES: Mapping[str, TreeReader] = {
    "official": (is_official, open_official),
    "image": (is_image_folder, open_image_folder),
    "course": (is_course, open_course),
}
_FAMILIES = ("official", "image")
"""Names that stand for a layout in a folder, a tar or a zip."""
FileReader = tuple[tuple[str, ...], Callable[[Path], bool], Callable[[Path], Source]]
"""How files that hold a whole set are named in a folder, whether a file is one, by what is in it, and what opens it."""
_IN_ONE_FILE: Mapping[str, FileReader] = {
    "hdf5": ((".h5", ".hdf5"), lambda file: kind_of(file) == "hdf5", open_hdf5),
    "mat": ((".mat",), lambda file: kind_of(file) == "mat", open_mat),
}
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "pt": (".pt", ".pth"),
    "npz": (".npz",),
    "pickle": PICKLE_SUFFIXES,
}


@dataclass(frozen=True, kw_only=True)
class Detected:
    """A layout that fits a path."""

    layout: str
    """A key of `KNOWN_LAYOUTS`."""
    where: str
    """For messages: the folder or files that it fits."""
    open: Callable[[Path | None], Source]
    """Opens it; takes the folder of MNIST, for a layout that has no labels."""


def detect(path: Path, layout: str | None) -> Detected:
    """Tells which layout a path holds, or takes `layout` for it. Raises UserError where none fits, or more than one."""
    found = list(_candidates(path, layout))
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(f"{one.layout}, {one.where}" for one in found)
        raise UserError(f"{path}: more than one set of images ({listed}): give the path of one of them, or --layout")
    if layout is not None:
        raise UserError(f"{path}: not of the layout {layout} ({KNOWN_LAYOUTS[layout]}): it is {contents(path)}")
    known = ", ".join(name for name in KNOWN_LAYOUTS if name not in (*MADE_LAYOUTS, *_FAMILIES))
    raise UserError(
        f"{path}: no layout that is known: it is {contents(path)}; known are {known} (pack --layouts shows each)"
    )


def _candidates(path: Path, layout: str | None) -> Iterator[Detected]:
    if path.is_dir():
        yield from _in_tree(Folder(path), layout)
        return
    kind = kind_of(path)
    if kind in ("tar", "zip"):
        yield from _in_tree(Tar(path) if kind == "tar" else Zip(path), layout)
    elif found := [one for name in _IN_ONE_FILE for one in _whole_set(name, path, layout)]:
        yield from found
    elif kind is not None and layout in (None, kind):
        yield from _files(kind, _set_of(kind, path))


def _in_tree(tree: Tree, layout: str | None) -> Iterator[Detected]:
    level = [""]
    for _ in range(_DEPTH + 1):
        found = [one for top in level for one in _at(tree, top, layout)]
        if found:
            yield from found
            return
        level = [f"{top}/{name}".lstrip("/") for top in level for name in tree.listing(top).folders][:_MAX_FOLDERS]


def _at(tree: Tree, top: str, layout: str | None) -> Iterator[Detected]:
    for family, (fits, opener) in _IN_TREES.items():
        name = f"{family}-{tree.kind}" if family in _FAMILIES else family
        if layout in (None, name, family) and fits(tree, top):
            yield Detected(layout=name, where=tree.origin(top or "."), open=partial(_open_tree, opener, tree, top))
    if not isinstance(tree, Folder):
        return
    for name, (suffixes, _, _) in _IN_ONE_FILE.items():
        for file in _named(tree, top, suffixes):
            yield from _whole_set(name, file, layout)
    for kind, suffixes in _SUFFIXES.items():
        if layout in (None, kind):
            files = _named(tree, top, suffixes)
            for one_set in [[file] for file in files] if kind == "pickle" else _sets(files):
                yield from _files(kind, one_set)


def _named(tree: Tree, top: str, suffixes: tuple[str, ...]) -> list[Path]:
    return [tree.path / top / name for name in tree.listing(top).files if name.lower().endswith(suffixes)]


def _whole_set(name: str, file: Path, layout: str | None) -> Iterator[Detected]:
    _, fits, opener = _IN_ONE_FILE[name]
    if layout in (None, name) and fits(file):
        yield Detected(layout=name, where=str(file), open=partial(_open_file, opener, file))


def _sets(files: list[Path]) -> list[list[Path]]:
    return [[file for parts in splits.values() for file in parts] for splits in sets_of_files(files)]


def _set_of(kind: str, path: Path) -> list[Path]:
    """The files of the set that one of them was named of."""
    if kind == "pickle":
        return [path]
    beside = [file for file in path.parent.iterdir() if file.suffix == path.suffix and file.is_file()]
    for files in _sets(beside):
        if path in files:
            return files
    raise UserError(f"{path}: of the layout {kind}, but its name tells no split: put the word train, val or test in it")


def _files(kind: str, files: list[Path]) -> Iterator[Detected]:
    where = ", ".join(str(file) for file in files)
    yield Detected(layout=kind, where=where, open=partial(_open_files, kind, files))


def _open_tree(opener: Callable[[Tree, str], Source], tree: Tree, top: str, mnist: Path | None) -> Source:
    return opener(tree, top)


def _open_file(opener: Callable[[Path], Source], file: Path, mnist: Path | None) -> Source:
    return opener(file)


def _open_files(kind: str, files: list[Path], mnist: Path | None) -> Source:
    if kind == "pickle":
        return open_pickle(files[0], mnist=mnist)
    splits = sets_of_files(files)[0]
    if kind == "parquet":
        return open_parquet(splits)
    for split, parts in splits.items():
        if len(parts) > 1:
            raise UserError(f"{parts[1]}: a second file of the split {split} beside {parts[0].name}; leave one of them")
    each = {split: parts[0] for split, parts in splits.items()}
    return open_pt(each) if kind == "pt" else open_npz(each)
