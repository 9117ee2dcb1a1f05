"""The layout that courses hand out: a folder of images; `train.csv`, `val.csv` with the columns image_name,label."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial

from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import SPLITS, Source
from mnistm_dist.data.sources.labels import Place, image_names, parse_label, read_places
from mnistm_dist.errors import UserError

_NAME, _LABEL = "image_name", "label"


def is_course(tree: Tree, top: str) -> bool:
    """Whether a folder of a tree looks like the top of this layout."""
    return "train.csv" in tree.listing(top).files


def open_course(tree: Tree, top: str) -> Source:
    """Opens the layout whose CSVs stand in `top` of a tree, `test.csv` too; a split is ordered as its CSV.

    The images stand beside the CSVs or in folders there. Images that no CSV names are left out, with a note. Raises
    UserError for wrong columns, an image that is missing, foreign or named twice (in two CSVs too), and a label that is
    no class.
    """
    prefix = f"{top}/" if top else ""
    csv_files = {split: f"{split}.csv" for split in SPLITS if f"{split}.csv" in tree.listing(top).files}
    images = _images(tree, top)
    places: dict[str, Place] = {}
    counts: dict[str, int] = {}
    for split, file in csv_files.items():
        counts[split] = 0
        for origin, name, label in _rows(tree, prefix + file):
            found = images.get(name)
            if found is None:
                raise UserError(f"{origin}: {name}: no such image beside it or in a folder there; leave out the line")
            if found in places:
                raise UserError(
                    f"{origin}: {name} is named a second time; it is in the split {places[found].split} already; "
                    "leave one of the lines"
                )
            places[found] = Place(split, counts[split], parse_label(origin, label))
            counts[split] += 1
    left_out = len(set(images.values())) - len(places)
    return Source(
        layout="course",
        description=f"{tree.path}, images and CSVs",
        counts=counts,
        notes=(f"images that no CSV names are left out: {left_out}",) if left_out else (),
        read=partial(read_places, tree, places),
    )


def _images(tree: Tree, top: str) -> dict[str, str]:
    """Every image under the names that a CSV may give it: bare, or with its folder."""
    prefix = f"{top}/" if top else ""
    listing = tree.listing(top)
    found = {name: prefix + name for name in listing.files if name.lower().endswith(".png")}
    for folder in listing.folders:
        for name in image_names(tree, prefix + folder):
            path = f"{prefix}{folder}/{name}"
            found[f"{folder}/{name}"] = path
            if found.setdefault(name, path) != path:
                raise UserError(f"{tree.origin(path)}: a second image of this name beside {found[name]}; rename one")
    return found


def _rows(tree: Tree, file: str) -> Iterator[tuple[str, str, str]]:
    rows = csv.DictReader(tree.text(file).splitlines(), strict=True)
    try:
        columns = rows.fieldnames or []
        if _NAME not in columns or _LABEL not in columns:
            raise UserError(f"{tree.origin(file)}: columns {', '.join(columns)[:60]!r}; needed are {_NAME},{_LABEL}")
        for row in rows:
            origin = f"{tree.origin(file)}: line {rows.line_num}"
            name, label = row[_NAME], row[_LABEL]
            if not name or label is None or None in row:
                raise UserError(f"{origin}: not one value for each column; correct the line")
            yield origin, name, label.strip()
    except csv.Error as error:
        raise UserError(f"{tree.origin(file)}: line {rows.line_num}: no CSV ({error}); correct it") from error
