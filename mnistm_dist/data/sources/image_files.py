"""Image files and where their labels come from, in a folder, a tar or a zip.

In this order, the first that applies: files beside the images with the same names (`webdataset`), files that list
images with labels (`official`, `csv`), folders of classes (`image-folder`), and the names of the images
(`file-names`).
"""

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import SUFFIXES, explain_decode_errors
from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import (
    CLASSES,
    IMAGE_NAMES,
    LABEL_NAMES,
    SPLIT_NAMES,
    NoLabelsError,
    Table,
    choose,
    list_some,
    parse_labels,
    split_of,
    without_split,
)
from mnistm_dist.errors import UserError

LABEL_SUFFIXES = (".csv", ".tsv", ".txt")
SIDECARS = (".cls", ".json", ".txt")
_CLASS_FILES = re.compile(r"(class(es)?|label)(_?names)?\.txt", re.IGNORECASE)
_OFFICIAL = re.compile(r"mnist_m_(train|val|valid|test)_labels\.txt")
_NUMBER = re.compile(r"[0-9]{1,18}")
_NUMBER_LABEL = re.compile(r"[0-9]+[_-]([0-9]+)")


@dataclass(kw_only=True)
class Labelled:
    """Image files of one set with their labels and splits, in order."""

    layout: str
    top: str = ""
    """The folder of the set in its tree."""
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    classes: Sequence[str] | None = None
    used: set[str] = field(default_factory=set)
    """Files with the labels."""
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, label: str, split: str | None) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.splits.append(split)

    def table(self, tree: Tree) -> Table:
        """Return the images as a table of a tree."""
        rows = {name: row for row, name in enumerate(self.names)}

        def read() -> Iterator[tuple[int, bytes, str]]:
            for name in tree.in_order(rows):
                yield rows[name], tree.read(name), tree.origin(name)

        origin = tree.origin(self.top)
        texts = self.labels if self.layout != "image-folder" else []
        labels = parse_labels(origin, texts) if texts else np.array(self.labels, dtype=object)
        return Table(origin=origin, labels=labels, splits=self.splits, classes=self.classes, read=read)


def key_of(name: str) -> str:
    """Return the name of a file up to the first dot after its folder, as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def open_image_files(tree: Tree, files: Sequence[str], layout: str | None) -> list[Labelled]:
    """Return the sets among files of a tree, usually one; ``layout`` limits them to one kind of labels.

    Raises `NoLabelsError` if images have no labels, and `UserError` for labels that do not fit the images.
    """
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    problems: list[str] = []
    for name, reader in READERS.items():
        if images and name in (layout or name, {"official": "csv"}.get(str(layout))):
            found = reader(tree, images, files, problems)
            if found and (layout is None or {one.layout for one in found} == {layout}):
                for one in found:
                    one.notes += problems
                return found
    reason = f" ({'; '.join(problems[:2])})" if problems else ""
    raise NoLabelsError(
        f"{tree.name or tree.path}: {len(images):,} images without labels, such as {list_some(images[:1])}{reason}; "
        "expected a folder per class, a CSV file with the columns image_name,label, or files .cls beside the images"
    )


def read_sidecars(tree: Tree, images: Sequence[str], files: Sequence[str], problems: list[str]) -> list[Labelled]:
    """Return images with labels in files of the same names, as in WebDataset's shards: .cls, .json or .txt.

    A .json is an object with a label among `LABEL_NAMES`; a .txt with a caption is refused. Every image needs a label.
    """
    by_key: dict[str, str] = {}
    for image in images:
        by_key.setdefault(key_of(image), image)
    for suffix in SIDECARS:
        beside = {key_of(name): name for name in files if name.lower().endswith(suffix) and key_of(name) in by_key}
        if len(beside) * 2 <= len(by_key):
            continue
        texts = {key_of(name): _sidecar_label(tree, name, suffix) for name in tree.in_order(set(beside.values()))}
        if set(texts.values()) == {None}:
            continue
        if suffix == ".txt" and 2 * len(set(texts.values())) >= len(texts) > 2:
            count, first = len(set(texts.values())), tree.origin(beside[min(beside)])
            raise NoLabelsError(
                f"{first}: {count} different texts for {len(texts)} images: captions, not classes; put each class "
                "into a file .cls or a column label"
            )
        found = Labelled(layout="webdataset", used=set(beside.values()))
        for image in images:
            key = key_of(image)
            if by_key[key] != image:
                raise UserError(f"{tree.origin(image)}: a second image of {key}; a sample has one image")
            if not (text := texts.get(key)):
                raise UserError(f"{tree.origin(image)}: no label: no {suffix} beside it; the shard is incomplete")
            found.add(image, text, _split_around(tree, image))
        alone = [name for name in files if name.lower().endswith(".cls") and key_of(name) not in by_key]
        for name in alone[:1]:
            raise UserError(f"{tree.origin(name)}: a label without an image; the shard is incomplete")
        return [found]
    return []


def _sidecar_label(tree: Tree, name: str, suffix: str) -> str | None:
    with explain_decode_errors(tree.origin(name), "a label"):
        text = tree.read(name).decode().strip()
        if suffix != ".json":
            return text
        content = json.loads(text)
        if isinstance(content, dict):
            content = content.get(choose(list(content), LABEL_NAMES) or "")
        return None if content is None or isinstance(content, list | dict) else str(content)


def _split_around(tree: Tree, name: str) -> str | None:
    return next(filter(None, map(split_of, tree.folders(name))), None)


def read_lists(tree: Tree, images: Sequence[str], files: Sequence[str], problems: list[str]) -> list[Labelled]:
    """Return images that CSV files, or text files with lines `NAME LABEL`, list with their labels.

    A list is named by its split, has a column of it, or leaves it to the folders of its images. A file without such
    columns is a problem. The official layout is ::

        mnist_m_train/00000000.png ...    mnist_m_train_labels.txt with lines `00000000.png 5`
        mnist_m_test/00000000.png ...     mnist_m_test_labels.txt
    """
    by_name: dict[str, list[str]] = {}
    for image in images:
        by_name.setdefault(image.rpartition("/")[2].lower(), []).append(image)
        by_name.setdefault(key_of(image).rpartition("/")[2].lower(), []).append(image)
    sets: dict[str, Labelled] = {}
    labelled: set[str] = set()
    classes, class_files = None, set[str]()
    keys = set(map(key_of, images))
    for file in files:
        if not file.lower().endswith(LABEL_SUFFIXES) or key_of(file) in keys:
            continue
        folder, _, base = file.rpartition("/")
        text = _decode(tree, file)
        if _CLASS_FILES.fullmatch(base) and all(len(by_name.get(line.split(" ")[0].lower(), ())) == 0 for line in text):
            classes = [line.strip() for line in text if line.strip()]
            class_files.add(file)
            continue
        rows = list(_read_list(tree, file, text, by_name, problems))
        if not rows:
            continue
        official = _OFFICIAL.fullmatch(base) is not None
        split = split_of(base)
        found = sets.setdefault(folder, Labelled(layout="official" if official else "csv", top=folder))
        if official:
            found.classes = CLASSES
        found.used.add(file)
        strip, start = None, len(found.names)
        where = tree.origin(file)
        for line, name, label, own in rows:
            origin = f"{where}: line {line}"
            parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
            if strip is None:  # folders that the list's author had around the images: the same on all lines
                depths = range(len(parts) or 1)
                strip = next((depth for depth in depths if _matches(tree, by_name, parts[depth:], folder, split)), 0)
            matches = _matches(tree, by_name, parts[strip:], folder, split)
            if len(matches) != 1:
                problem = f"{len(matches)} images of this name; give its folder too" if matches else "no such image"
                raise UserError(f"{origin}: {name}: {problem}")
            if matches[0] in labelled:
                raise UserError(f"{origin}: {name} is labelled twice; remove one of the two lines")
            if official and label not in CLASSES:
                raise UserError(f"{origin}: label {label!r:.20}; accepted are 0 to 9")
            labelled.add(matches[0])
            found.add(matches[0], label, own or split or _split_around(tree, matches[0]))
        if official:
            order = sorted(range(start, len(found.names)), key=found.names.__getitem__)
            columns: tuple[list[Any], ...] = found.names, found.labels, found.splits
            for column in columns:
                column[start:] = [column[row] for row in order]
    if not sets:
        return []
    for image in images:
        folder = image.rpartition("/")[0]
        if image not in labelled and _OFFICIAL.fullmatch(f"{folder.rpartition('/')[2]}_labels.txt"):
            if any(f"{folder}_labels.txt" in found.used for found in sets.values()):
                raise UserError(f"{tree.origin(image)}: no label in {folder}_labels.txt; add its line")
            raise UserError(f"{tree.origin(folder)}: no labels; put {folder.rpartition('/')[2]}_labels.txt beside it")
    for found in sets.values():
        found.classes = classes or found.classes
        found.used |= class_files
    return _join(sets)


def _join(sets: Mapping[str, Labelled]) -> list[Labelled]:
    """Join lists in different folders that have no split in common."""
    joined: list[Labelled] = []
    for one in sets.values():
        first = joined[0] if joined else None
        if first and first.layout == one.layout and not set(first.splits) & set(one.splits):
            for name, label, split in zip(one.names, one.labels, one.splits, strict=True):
                first.add(name, label, split)
            first.used |= one.used
        else:
            joined.append(one)
    return joined


def _matches(
    tree: Tree, by_name: Mapping[str, list[str]], parts: Sequence[str], folder: str, split: str | None
) -> list[str]:
    """Return the images whose paths end in ``parts``; of several, those nearest to the list's folder and split.

    Images in a folder of another split are not among them, unless ``parts`` names it.
    """
    wanted = [part.lower() for part in parts]
    found = []
    for image in by_name.get(wanted[-1] if wanted else "", ()):
        path = image.lower().split("/")
        if path[-len(wanted) : -1] == wanted[:-1] and (
            len(parts) > 1 or split in (None, _split_around(tree, image) or split)
        ):
            found.append(image)
    for prefers in (
        lambda image: image == "/".join(filter(None, [folder, *parts])),
        lambda image: _split_around(tree, image) == split,
        lambda image: image.startswith(f"{folder}/" if folder else ""),
    ):
        if len(found) > 1:
            found = list(filter(prefers, found)) or found
    return found


def _decode(tree: Tree, file: str) -> list[str]:
    with explain_decode_errors(tree.origin(file), "CSV or lines of NAME LABEL, in UTF-8"):
        data = tree.read(file)
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        return data.decode(encoding).splitlines()


def _read_list(
    tree: Tree, file: str, lines: Sequence[str], by_name: Mapping[str, object], problems: list[str]
) -> Iterator[tuple[int, str, str, str | None]]:
    """Yield line number, image, label and perhaps split of a list; nothing, and a problem, if it is none of images."""
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((letter for letter in "\t,;" if letter in first), " ")
    with explain_decode_errors(tree.origin(file), "CSV or lines of NAME LABEL, in UTF-8", csv.Error):
        if delimiter == " ":
            rows: Iterable[tuple[int, list[str]]] = enumerate((line.rsplit(None, 1) for line in lines), start=1)
        else:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            rows = ((reader.line_num, row) for row in reader)
        columns: tuple[int, int, int | None] | None = None
        width = 2
        for line, row in rows:
            if not row or not any(map(str.strip, row)):
                continue
            if columns is None:
                width = len(row)
                image, label, split = (choose(row, names) for names in (IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES))
                if image is not None and label is not None:
                    columns = row.index(image), row.index(label), row.index(split) if split else None
                    continue
                stem = row[0].strip().replace("\\", "/").rpartition("/")[2].lower()
                base = file.rpartition("/")[2].lower()
                is_list = base.endswith(".txt") and ("label" in base or split_of(base) is not None)
                if width != 2 or not (stem in by_name or is_list):
                    if width == 1 and is_list:
                        raise UserError(f"{tree.origin(file)}: line {line}: expected 2 values")
                    problems.append(f"{file} is left out: columns {', '.join(row)[:60]!r}; expected image_name,label")
                    return
                columns = 0, 1, None
            if len(row) != width:
                raise UserError(f"{tree.origin(file)}: line {line}: expected {width} values")
            own = split_of(row[columns[2]]) if columns[2] is not None else None
            if columns[2] is not None and own is None:
                raise UserError(
                    f"{tree.origin(file)}: line {line}: split {row[columns[2]]!r:.20}; accepted: train, val, test"
                )
            yield line, row[columns[0]].strip(), row[columns[1]].strip(), own


def read_class_folders(tree: Tree, images: Sequence[str], files: Sequence[str], problems: list[str]) -> list[Labelled]:
    """Return the images in folders of classes, in folders of splits if there are any: torchvision's ImageFolder.

    Images may lie deeper in the folder of their class. If the names of a split's images are distinct numbers, images
    are ordered by them, as before they were sorted into classes. Otherwise the classes are spread evenly, since the
    last train images may become val.
    """
    paths = {image: tree.folders(image) for image in images}
    depth = _split_depth(paths)
    if depth is None:
        common = _common(list(paths.values()))
        if common and all(len(path) == len(common) for path in paths.values()):
            common = common[:-1]  # one class
        depth = len(common) - 1
        named = {path[depth + 1] for path in paths.values() if len(path) > depth + 1}
        numbered = all(_NUMBER_LABEL.fullmatch(key_of(image).rpartition("/")[2]) for image in images)
        if not named or _are_splits(named) or (len(named) == 1 and numbered):
            return []
    sets: dict[str, Labelled] = {}
    classes: dict[tuple[str, str | None], dict[str, list[str]]] = {}
    names: dict[tuple[str, str | None], str] = {}
    others = [path[depth] for path in paths.values() if 0 <= depth < len(path) and split_of(path[depth])]
    for image, path in paths.items():
        place = tree.origin(image)
        if len(path) <= depth + 1:
            raise UserError(f"{place}: unexpected among the folders of classes; move it into the folder of its class")
        top, split = "/".join(path[: max(0, depth)]), split_of(path[depth]) if depth >= 0 and others else None
        if others and split is None:
            raise UserError(
                f"{place}: {path[depth]} is not train, val or test as {others[0]} beside it is; rename or remove it"
            )
        if split and names.setdefault((top, split), path[depth]) != path[depth]:
            raise UserError(
                f"{place}: {path[depth]} is a second folder of split {split} beside {names[top, split]}; remove one of "
                "the two"
            )
        classes.setdefault((top, split), {}).setdefault(path[depth + 1], []).append(image)
    for (top, split), members in classes.items():
        found = sets.setdefault(top, Labelled(layout="image-folder", top=top))
        for label, image in _restore_order(members):
            found.add(image, label, split)
    return list(sets.values())


def _split_depth(paths: Mapping[str, list[str]]) -> int | None:
    """Return the depth of the folders of splits: the first where folders with others in them are named by splits."""
    for depth in range(max(map(len, paths.values()), default=0)):
        names = {path[depth] for path in paths.values() if len(path) > depth + 1}
        if _are_splits(names) or any(split_of(name, whole=True) for name in names):
            return depth
    return None


def _are_splits(names: Collection[str]) -> bool:
    """Return whether names say splits, and are otherwise the same."""
    return all(map(split_of, names)) and len(set(map(without_split, names))) == 1


def _common(paths: Sequence[list[str]]) -> list[str]:
    """Return the folders that all paths begin with."""
    low, high = min(paths), max(paths)
    count = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:count]


def _restore_order(classes: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Order the images of each class's folder, as `read_class_folders` says; returns (class, image)."""
    images = [(name, image) for name in sorted(classes) for image in sorted(classes[name])]
    stems = [image.rpartition("/")[2].rpartition(".")[0] for _, image in images]
    places = [(index + 0.5) / len(names) for _, names in sorted(classes.items()) for index in range(len(names))]
    if all(map(_NUMBER.fullmatch, stems)) and len(set(map(int, stems))) == len(stems):
        places = list(map(int, stems))
    return [image for _, image in sorted(zip(places, images, strict=True))]


def read_file_names(tree: Tree, images: Sequence[str], files: Sequence[str], problems: list[str]) -> list[Labelled]:
    """Return images that are named NUMBER_LABEL, with folders of splits."""
    found = Labelled(layout="file-names", notes=["labels are taken from the names of the images, NUMBER_LABEL"])
    for image in images:
        match = _NUMBER_LABEL.fullmatch(key_of(image).rpartition("/")[2])
        if match is None:
            return []
        found.add(image, match[1], _split_around(tree, image))
    return [found]


READERS: Mapping[str, Callable[[Tree, Sequence[str], Sequence[str], list[str]], list[Labelled]]] = {
    "webdataset": read_sidecars,
    "csv": read_lists,
    "image-folder": read_class_folders,
    "file-names": read_file_names,
}
