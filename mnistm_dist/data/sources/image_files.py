"""Layouts of image files in a folder, tar or zip: the official one, folders of classes, and CSV files.

Each reader finds the images of every split with their labels; `image_source` makes a source of them.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import CLASSES, SPLITS, Sample, Source, parse_label, split_of
from mnistm_dist.errors import UserError

# (name in the tree, label) of each image of a split, in order.
Labelled = list[tuple[str, int]]

_OFFICIAL = {split: f"mnist_m_{split}" for split in ("train", "test")}
_COLUMNS = ("image_name", "label")
_NUMBER = re.compile(r"[0-9]{1,18}")


def image_source(tree: Tree, *, layout: str, splits: Mapping[str, Labelled], notes: tuple[str, ...] = ()) -> Source:
    """Return a source of labelled images of a tree."""
    rows = {
        name: (split, index, label) for split, images in splits.items() for index, (name, label) in enumerate(images)
    }

    def read() -> Iterator[Sample]:
        for name in tree.in_order(rows):
            split, index, label = rows[name]
            yield Sample(split=split, index=index, label=label, png=tree.read(name), origin=tree.origin(name))

    return Source(
        layout=layout,
        description=str(tree.path),
        counts={split: len(splits[split]) for split in SPLITS if split in splits},
        notes=notes,
        read=read,
    )


def image_names(tree: Tree, folder: str) -> list[str]:
    """Return the names of the PNGs in a folder of a tree, sorted. Raises `UserError` for anything else in it."""
    folders, files = tree.listing(folder)
    for name in [*folders, *(name for name in files if not name.lower().endswith(".png"))]:
        raise UserError(f"{tree.origin(f'{folder}/{name}')}: unexpected among images; accepted are NAME.png files")
    return files


def is_official(tree: Tree, top: str) -> bool:
    """Return whether the official layout starts in folder ``top`` of a tree."""
    folders, files = tree.listing(top)
    return any(name in folders or f"{name}_labels.txt" in files for name in _OFFICIAL.values())


def open_official(tree: Tree, top: str) -> Source:
    """Open the official layout; images are ordered by file name.

    ::

        mnist_m_train/00000000.png ...    mnist_m_train_labels.txt with lines `00000000.png 5`
        mnist_m_test/00000000.png ...     mnist_m_test_labels.txt

    Raises `UserError` for images without their labels file, an image without a label and the other way round, an image
    that is labelled twice, and anything else among the images.
    """
    folders, files = tree.listing(top)
    splits: dict[str, Labelled] = {}
    for split, name in _OFFICIAL.items():
        folder, labels_file = f"{top}{name}", f"{top}{name}_labels.txt"
        if f"{name}_labels.txt" in files:
            images = {image: [f"{folder}/{image}"] for image in image_names(tree, folder)}
            labelled: set[str] = set()
            splits[split] = sorted(_match(tree, labels_file, images, labelled))
            for path in sorted({path for (path,) in images.values()} - labelled):
                raise UserError(f"{tree.origin(path)}: no label in {labels_file}; add its line")
        elif name in folders:
            raise UserError(f"{tree.origin(folder)}: no labels; put {name}_labels.txt beside it")
    return image_source(tree, layout=f"official-{tree.kind}", splits=splits)


def is_image_folder(tree: Tree, top: str) -> bool:
    """Return whether a folder of a tree holds a split's folder with a class's folder in it."""
    return any(not set(CLASSES).isdisjoint(tree.listing(folder)[0]) for _, folder in _split_folders(tree, top))


def open_image_folder(tree: Tree, top: str) -> Source:
    """Open `{training,testing}/{0..9}/NAME.png`, the layout of torchvision's ImageFolder.

    If the names of a split's images are distinct numbers, images are ordered by them, as before they were sorted into
    classes. Otherwise the classes are spread evenly, since the last train images may become val. Raises `UserError`
    for two folders of one split and for anything else in the folders.
    """
    splits: dict[str, Labelled] = {}
    for split, folder in _split_folders(tree, top):
        if split in splits:
            raise UserError(f"{tree.origin(folder)}: a second folder of split {split}; remove one of the two")
        classes, files = tree.listing(folder)
        for name in files:
            raise UserError(f"{tree.origin(f'{folder}/{name}')}: unexpected among the folders of classes; remove it")
        labels = {name: parse_label(tree.origin(f"{folder}/{name}"), name) for name in classes}
        images = _restore_order({name: image_names(tree, f"{folder}/{name}") for name in labels})
        splits[split] = [(f"{folder}/{name}/{image}", labels[name]) for name, image in images]
    return image_source(tree, layout=f"image-{tree.kind}", splits=splits)


def _split_folders(tree: Tree, top: str) -> list[tuple[str, str]]:
    return [(split, f"{top}{name}") for name in tree.listing(top)[0] if (split := split_of(name, whole=True))]


def _restore_order(classes: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Order the images of each class's folder, as `open_image_folder` says; returns (folder, image)."""
    images = [(name, image) for name, images in classes.items() for image in images]
    stems = [image.rpartition(".")[0] for _, image in images]
    places = [(index + 0.5) / len(names) for names in classes.values() for index in range(len(names))]
    if all(map(_NUMBER.fullmatch, stems)) and len(set(map(int, stems))) == len(stems):
        places = list(map(int, stems))
    return [image for _, image in sorted(zip(places, images, strict=True))]


def is_csv(tree: Tree, top: str) -> bool:
    """Return whether a folder of a tree holds `train.csv`."""
    return "train.csv" in tree.listing(top)[1]


def open_csv(tree: Tree, top: str) -> Source:
    """Open images that `train.csv`, `val.csv` and `test.csv` name, with the columns image_name,label.

    The images lie beside the CSV files or in folders there, and are named with or without their folder. A split is
    ordered as its CSV file. Images that no CSV file names are left out, with a note. Raises `UserError` for other
    columns, and for an image that is missing, ambiguous or named twice, in two CSV files too.
    """
    folders, files = tree.listing(top)
    images = {name: [f"{top}{name}"] for name in files if name.lower().endswith(".png")}
    for folder in folders:
        for name in image_names(tree, f"{top}{folder}"):
            path = f"{top}{folder}/{name}"
            images.setdefault(name, []).append(path)
            images[f"{folder}/{name}"] = [path]
    labelled: set[str] = set()
    splits = {
        split: _match(tree, file, images, labelled)
        for split in SPLITS
        if f"{split}.csv" in files and (file := f"{top}{split}.csv")
    }
    left_out = len({path for paths in images.values() for path in paths} - labelled)
    notes = (f"{left_out} images that no CSV file names are left out",) if left_out else ()
    return image_source(tree, layout="csv", splits=splits, notes=notes)


def _match(tree: Tree, file: str, images: Mapping[str, Sequence[str]], labelled: set[str]) -> Labelled:
    """Find the image of each row of a labels file among ``images``, by its name, and add it to ``labelled``.

    Raises `UserError` if there is not exactly one image of that name, or if it is labelled already.
    """
    found: Labelled = []
    for line, name, label in _read_rows(tree, file):
        origin = f"{tree.origin(file)}: line {line}"
        paths = images.get(name, ())
        if len(paths) != 1:
            problem = f"{len(paths)} images of this name; give its folder too" if paths else "no such image"
            raise UserError(f"{origin}: {name}: {problem}")
        if paths[0] in labelled:
            raise UserError(f"{origin}: {name} is labelled twice; remove one of the two lines")
        labelled.add(paths[0])
        found.append((paths[0], parse_label(origin, label)))
    return found


def _read_rows(tree: Tree, file: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, image name and label from a CSV file, or from a text file with lines `NAME LABEL`."""
    with explain_decode_errors(tree.origin(file), "CSV or lines of NAME LABEL, in UTF-8", csv.Error):
        lines = tree.read(file).decode("utf-8-sig").splitlines()
        if file.endswith(".txt"):
            rows = csv.DictReader((" ".join(line.split()) for line in lines), _COLUMNS, delimiter=" ", strict=True)
        else:
            rows = csv.DictReader(lines, strict=True)
        columns = rows.fieldnames or ()
        if not set(_COLUMNS) <= set(columns):
            raise UserError(f"{tree.origin(file)}: columns {', '.join(columns)[:60]!r}; expected {','.join(_COLUMNS)}")
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{tree.origin(file)}: line {rows.line_num}: expected {len(columns)} values")
            yield rows.line_num, row[_COLUMNS[0]], row[_COLUMNS[1]].strip()
