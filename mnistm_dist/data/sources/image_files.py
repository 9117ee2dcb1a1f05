"""Image files and where their labels come from, in a folder, a tar or a zip.

In this order, the first that applies: files beside the images with the same names (`webdataset`), files that list
images with labels (`official`, `csv`), folders of classes (`image-folder`), and the names of the images
(`file-names`). Each reader makes rows of (image, label, split), a `Row`, of its files.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnistm_dist.data.image_io import SUFFIXES, explain_decode_errors
from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import (
    CLASSES,
    IMAGE_NAMES,
    LABEL_NAMES,
    SPLIT_NAMES,
    ImageSet,
    NoLabelsError,
    Table,
    choose,
    key_of,
    list_some,
    parse_labels,
    split_of,
    without_split,
)
from mnistm_dist.errors import UserError

LABEL_SUFFIXES = (".csv", ".tsv", ".txt")
SIDECARS = (".cls", ".json", ".txt")
_CLASS_FILES = re.compile(r"(class(es)?|label)(_?names)?\.txt", re.IGNORECASE)
_OFFICIAL = re.compile(r"mnist_m_(train|val|valid|test)(_labels\.txt)?")
_NUMBER = re.compile(r"[0-9]{1,18}")
_NUMBER_LABEL = re.compile(r"[0-9]+[_-]([0-9]+)")
_Entry = tuple[int, str, str, str | None]  # of a list: line number, name of an image, label, split


class Row(NamedTuple):
    """An image file with its label."""

    image: str
    """Its name in the tree."""
    label: str
    split: str | None


def open_image_files(tree: Tree, files: Sequence[str], layout: str | None) -> list[ImageSet]:
    """Return the sets among files of a tree, usually one; ``layout`` limits them to one kind of labels.

    Raises `NoLabelsError` if images have no labels, and `UserError` for labels that do not fit the images.
    """
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    notes: list[str] = []
    for name, reader in _READERS.items():
        if images and name in (layout or name, {"official": "csv"}.get(str(layout))):
            found = reader(tree, images, files, notes)
            if found and (layout is None or {one.layout for one in found} == {layout}):
                return found
    reason = f" ({'; '.join(notes[:2])})" if notes else ""
    raise NoLabelsError(
        f"{tree.path}: {len(images):,} images without labels, such as {list_some(images[:1])}{reason}; "
        "expected a folder per class, a CSV file with the columns image_name,label, or files .cls beside the images"
    )


def _image_set(
    tree: Tree,
    layout: str,
    rows: Sequence[Row],
    *,
    top: str = "",
    used: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> ImageSet:
    """Return a set of one table: ``rows`` in order, in the folder ``top``, with labels from the files ``used``."""
    places = {row.image: place for place, row in enumerate(rows)}

    def read() -> Iterator[tuple[int, bytes, str]]:
        for name in tree.in_order(places):
            yield places[name], tree.read(name), tree.origin(name)

    origin, texts = tree.origin(top), [row.label for row in rows]
    labels = np.array(texts, dtype=object) if layout == "image-folder" else parse_labels(origin, texts)
    table = Table(origin=origin, labels=labels, splits=[row.split for row in rows], classes=classes, read=read)
    return ImageSet(layout=layout, place=origin, tables=[table], used={*places, *used}, notes=notes)


def _read_sidecars(tree: Tree, images: Sequence[str], files: Sequence[str], notes: list[str]) -> list[ImageSet]:
    """Return images with labels in files of the same names, as in WebDataset's shards: .cls, .json or .txt.

    A .json is an object with a label among `LABEL_NAMES`; a .txt with a caption is refused. Every image needs a label.
    """
    by_key = {key_of(image): image for image in reversed(images)}
    for suffix in SIDECARS:
        beside = {key_of(name): name for name in files if name.lower().endswith(suffix) and key_of(name) in by_key}
        if len(beside) * 2 <= len(by_key):
            continue
        texts = {key_of(name): _sidecar_label(tree, name, suffix) for name in tree.in_order(set(beside.values()))}
        count = len(set(texts.values()))
        if set(texts.values()) == {None}:
            continue
        if suffix == ".txt" and 2 * count >= len(texts) > 2:
            raise NoLabelsError(
                f"{tree.origin(min(beside.values()))}: {count} different texts for {len(texts)} images: captions, not "
                "classes; put each class into a file .cls or a column label"
            )
        for image in images:
            if by_key[key_of(image)] != image:
                raise UserError(f"{tree.origin(image)}: a second image of {key_of(image)}; a sample has one image")
            if not texts.get(key_of(image)):
                raise UserError(f"{tree.origin(image)}: no label: no {suffix} beside it; the shard is incomplete")
        for name in files:
            if name.lower().endswith(".cls") and key_of(name) not in by_key:
                raise UserError(f"{tree.origin(name)}: a label without an image; the shard is incomplete")
        rows = [Row(image, texts[key_of(image)] or "", _split_around(tree, image)) for image in images]
        return [_image_set(tree, "webdataset", rows, used=list(beside.values()))]
    return []


def _sidecar_label(tree: Tree, name: str, suffix: str) -> str | None:
    with explain_decode_errors(tree.origin(name), "a label"):
        text = tree.read(name).decode().strip()
        content = json.loads(text) if suffix == ".json" else text
        if isinstance(content, dict):
            content = content.get(choose(list(content), LABEL_NAMES) or "")
        return None if content is None or isinstance(content, list | dict) else str(content)


def _split_around(tree: Tree, name: str) -> str | None:
    return next(filter(None, map(split_of, tree.folders(name))), None)


def _read_lists(tree: Tree, images: Sequence[str], files: Sequence[str], notes: list[str]) -> list[ImageSet]:
    """Return images that CSV files, or text files with lines `NAME LABEL`, list with their labels.

    A list is named by its split, has a column of it, or leaves it to the folders of its images. A file without such
    columns is noted. Lists in one folder, or without a common split, are one set. The official layout is ::

        mnist_m_train/00000000.png ...    mnist_m_train_labels.txt with lines `00000000.png 5`
        mnist_m_test/00000000.png ...     mnist_m_test_labels.txt
    """
    by_name: dict[str, list[str]] = {}
    for image in images:
        for name in (image, key_of(image)):
            by_name.setdefault(name.rpartition("/")[2].lower(), []).append(image)
    keys, labelled = set(map(key_of, images)), set[str]()
    classes, class_files = None, list[str]()
    sets: list[tuple[str, str, list[str], list[Row]]] = []  # layout, folder, lists and rows of each set
    for file in files:
        if not file.lower().endswith(LABEL_SUFFIXES) or key_of(file) in keys:
            continue
        lines, (folder, _, base) = _decode(tree, file), file.rpartition("/")
        if _CLASS_FILES.fullmatch(base) and not any(line.split(" ")[0].lower() in by_name for line in lines):
            classes, class_files = [line.strip() for line in lines if line.strip()], [*class_files, file]
            continue
        if not (entries := _read_list(tree, file, lines, by_name, notes)):
            continue
        layout, rows = "official" if _OFFICIAL.fullmatch(base) else "csv", list[Row]()
        for number, row in _match(tree, by_name, file, entries):
            if row.image in labelled:
                raise UserError(
                    f"{tree.origin(file)}: line {number}: {row.image} is labelled twice; remove one of the two lines"
                )
            if layout == "official" and row.label not in CLASSES:
                raise UserError(f"{tree.origin(file)}: line {number}: label {row.label!r:.20}; accepted are 0 to 9")
            labelled.add(row.image)
            rows.append(row)
        rows = sorted(rows) if layout == "official" else rows
        splits = {row.split for row in rows}
        for other, top, lists, found in sets:
            if other == layout and (top == folder or splits.isdisjoint(row.split for row in found)):
                lists.append(file)
                found += rows
                break
        else:
            sets.append((layout, folder, [file], rows))
    for image in images if sets else ():
        folder = image.rpartition("/")[0]
        if image not in labelled and _OFFICIAL.fullmatch(folder.rpartition("/")[2]):
            raise UserError(f"{tree.origin(image)}: no label in {folder}_labels.txt; add its line, or that file")
    return [
        _image_set(
            tree,
            layout,
            rows,
            top=top,
            used=lists + class_files,
            classes=classes or (CLASSES if layout == "official" else None),
            notes=notes,
        )
        for layout, top, lists, rows in sets
    ]


def _match(
    tree: Tree, by_name: Mapping[str, list[str]], file: str, entries: Sequence[_Entry]
) -> Iterator[tuple[int, Row]]:
    """Yield the line number and the image of each entry of a list, with its split."""
    folder, _, base = file.rpartition("/")
    split, strip = split_of(base), None
    for number, name, label, own in entries:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if strip is None:  # folders that the list's author had around the images: the same on all lines
            depths = range(len(parts))
            strip = next((at for at in depths if _find(tree, by_name, parts[at:], folder, split)), 0)
        found = _find(tree, by_name, parts[strip:], folder, split)
        if len(found) != 1:
            problem = f"{len(found)} images of this name; give its folder too" if found else "no such image"
            raise UserError(f"{tree.origin(file)}: line {number}: {name}: {problem}")
        yield number, Row(found[0], label, own or split or _split_around(tree, found[0]))


def _find(
    tree: Tree, by_name: Mapping[str, list[str]], parts: Sequence[str], folder: str, split: str | None
) -> list[str]:
    """Return the images whose paths end in ``parts``; of several, those nearest to the list's folder and split.

    Images in a folder of another split are not among them, unless ``parts`` names it.
    """
    wanted = [part.lower() for part in parts]
    ranks: dict[str, tuple[bool, ...]] = {}
    for image in by_name.get(wanted[-1] if wanted else "", ()):
        around = _split_around(tree, image)
        same_path = image.lower().split("/")[-len(wanted) : -1] == wanted[:-1]
        if same_path and (len(parts) > 1 or split in (None, around or split)):
            exact = image == "/".join(filter(None, [folder, *parts]))
            ranks[image] = exact, around == split, image.startswith(f"{folder}/" if folder else "")
    return [image for image, rank in ranks.items() if rank == max(ranks.values())]


def _decode(tree: Tree, file: str) -> list[str]:
    with explain_decode_errors(tree.origin(file), "CSV or lines of NAME LABEL, in UTF-8"):
        data = tree.read(file)
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        return data.decode(encoding).splitlines()


def _read_list(
    tree: Tree, file: str, lines: Sequence[str], by_name: Mapping[str, object], notes: list[str]
) -> list[_Entry]:
    """Return the entries of a list; none, and a note, if it is not one of images."""
    origin, base = tree.origin(file), file.rpartition("/")[2]
    delimiter = next((letter for letter in "\t,;" if letter in next(filter(str.strip, lines), "")), None)
    with explain_decode_errors(origin, "CSV or lines of NAME LABEL, in UTF-8", csv.Error):
        if delimiter is None:
            rows = [(number, line.rsplit(None, 1)) for number, line in enumerate(lines, start=1)]
        else:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader]
    rows = [(number, row) for number, row in rows if any(map(str.strip, row))]
    if not rows:
        return []
    first, header = rows[0]
    image, label, split = (choose(header, names) for names in (IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES))
    if image is not None and label is not None:
        columns = header.index(image), header.index(label), header.index(split) if split else None
        if others := [name for place, name in enumerate(header) if place not in columns]:
            notes.append(f"{origin}: columns {list_some(others)} are left out")
        del rows[0]
    else:
        columns = 0, 1, None
        is_list = base.lower().endswith(".txt") and ("label" in base.lower() or split_of(base) is not None)
        stem = header[0].strip().replace("\\", "/").rpartition("/")[2].lower()
        if len(header) == 1 and is_list:
            raise UserError(f"{origin}: line {first}: expected 2 values")
        if len(header) != 2 or not (stem in by_name or is_list):
            notes.append(f"{file} is left out: columns {', '.join(header)[:60]!r}; expected image_name,label")
            return []
    entries = []
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{origin}: line {number}: expected {len(header)} values")
        text, own = row[columns[1]].strip(), split_of(row[columns[2]]) if columns[2] is not None else None
        if columns[2] is not None and own is None:
            raise UserError(f"{origin}: line {number}: split {row[columns[2]]!r:.20}; accepted: train, val, test")
        entries.append((number, row[columns[0]].strip(), text, own))
    return entries


def _read_class_folders(tree: Tree, images: Sequence[str], files: Sequence[str], notes: list[str]) -> list[ImageSet]:
    """Return the images in folders of classes, in folders of splits if there are any: torchvision's ImageFolder.

    Images may lie deeper in the folder of their class. If the names of a split's images are distinct numbers, images
    are ordered by them, as before they were sorted into classes. Otherwise the classes are spread evenly, since the
    last train images may become val.
    """
    paths = {image: tree.folders(image) for image in images}
    first, depth = _split_depths(list(paths.values()))
    at = depth + 1  # of the folders of classes
    if depth < 0:
        at = _common_depth(list(paths.values()))
        first = max(0, at - 1)
        named = {path[at] for path in paths.values() if len(path) > at}
        numbered = all(_NUMBER_LABEL.fullmatch(key_of(image).rpartition("/")[2]) for image in images)
        if not named or _are_splits(named) or (len(named) == 1 and numbered):
            return []
    # The classes of each split in each folder, and the images of each class.
    splits: dict[tuple[str, str | None], dict[str, list[str]]] = {}
    words: dict[str, str] = {}
    for image, path in paths.items():
        place, top = tree.origin(image), "/".join(path[:first])
        if len(path) <= depth:
            continue
        if len(path) <= at:
            raise UserError(f"{place}: unexpected among the folders of classes; move it into the folder of its class")
        word = path[depth] if depth >= 0 else ""
        # A folder of a class may have folders of splits.
        split = split_of(word) or next(filter(None, (split_of(part, whole=True) for part in path[at + 1 :])), None)
        if depth >= 0 and split is None:
            other = next(
                name for name in (path[depth] for path in paths.values() if len(path) > depth) if split_of(name)
            )
            raise UserError(f"{place}: {word} is not train, val or test as {other} beside it is; rename or remove it")
        if words.setdefault(f"{top}/{split}", word) != word:
            other = words[f"{top}/{split}"]
            raise UserError(
                f"{place}: {word} is a second folder of split {split} beside {other}; remove one of the two"
            )
        splits.setdefault((top, split), {}).setdefault(path[at], []).append(image)
    rows: dict[str, list[Row]] = {}
    for (top, split), classes in splits.items():
        rows.setdefault(top, []).extend(Row(image, label, split) for label, image in _restore_order(classes))
    return [_image_set(tree, "image-folder", found, top=top, notes=notes) for top, found in rows.items()]


def _split_depths(paths: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return the depths of the first and last folders of splits: folders with others in them, named by splits.

    Usually they are the same; train.zip may contain the folder pets/train. Returns -1 for both if there are none.
    """
    first = last = -1
    for depth in range(max(map(len, paths), default=0)):
        names = {path[depth] for path in paths if len(path) > depth + 1}
        if _are_splits(names) or (first < 0 and any(split_of(name, whole=True) for name in names)):
            first, last = depth if first < 0 else first, depth
        elif first >= 0 and len(names) > 1:
            break
    return first, last


def _are_splits(names: set[str]) -> bool:
    """Return whether names say splits, and are otherwise the same."""
    return all(map(split_of, names)) and len(set(map(without_split, names))) == 1


def _common_depth(paths: Sequence[list[str]]) -> int:
    """Return how many folders all paths begin with, without that of a single class."""
    low, high = min(paths), max(paths)
    count = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return count - (count > 0 and all(len(path) == count for path in paths))


def _restore_order(classes: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Order the images of each class's folder, as `_read_class_folders` says; returns (class, image)."""
    images = [(name, image) for name in sorted(classes) for image in sorted(classes[name])]
    stems = [image.rpartition("/")[2].rpartition(".")[0] for _, image in images]
    places = [(index + 0.5) / len(names) for _, names in sorted(classes.items()) for index in range(len(names))]
    if all(map(_NUMBER.fullmatch, stems)) and len(set(map(int, stems))) == len(stems):
        places = list(map(int, stems))
    return [image for _, image in sorted(zip(places, images, strict=True))]


def _read_file_names(tree: Tree, images: Sequence[str], files: Sequence[str], notes: list[str]) -> list[ImageSet]:
    """Return images that are named NUMBER_LABEL, with folders of splits."""
    matches = [(image, _NUMBER_LABEL.fullmatch(key_of(image).rpartition("/")[2])) for image in images]
    rows = [Row(image, match[1], _split_around(tree, image)) for image, match in matches if match]
    if len(rows) < len(images):
        return []
    note = "labels are taken from the names of the images, NUMBER_LABEL"
    return [_image_set(tree, "file-names", rows, notes=[note, *notes])]


_READERS: Mapping[str, Callable[[Tree, Sequence[str], Sequence[str], list[str]], list[ImageSet]]] = {
    "webdataset": _read_sidecars,
    "csv": _read_lists,
    "image-folder": _read_class_folders,
    "file-names": _read_file_names,
}
