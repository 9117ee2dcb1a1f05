"""Labelled images in a tree of files: what the layouts made of image files have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import CLASSES, SPLITS, Sample
from mnistm_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """What is known of an image before it is read."""

    split: str
    index: int
    label: int


def read_places(tree: Tree, places: Mapping[str, Place]) -> Iterator[Sample]:
    """Yields the images of a tree that have a place, by name, in the tree's own order."""
    for name, png in tree.read_each(places):
        place = places[name]
        yield Sample(split=place.split, index=place.index, label=place.label, png=png, origin=tree.origin(name))


def image_names(tree: Tree, folder: str) -> list[str]:
    """Names of the PNGs in a folder of a tree, sorted. Raises UserError at anything else in it."""
    listing = tree.listing(folder)
    foreign = [*listing.folders, *(name for name in listing.files if not name.lower().endswith(".png"))]
    if foreign:
        origin = tree.origin(f"{folder}/{foreign[0]}".lstrip("/"))
        raise UserError(f"{origin}: foreign among the images; accepted there are files NAME.png alone")
    return listing.files


def parse_label(origin: str, text: str) -> int:
    """The class that a text stands for. Raises UserError where it is none."""
    if text not in CLASSES:
        raise UserError(f"{origin}: label {text[:20]!r}; accepted are 0 to {len(CLASSES) - 1}")
    return int(text)


_WORD = re.compile(r"(?<![a-z])(?:(train|training)|(val|valid|validation|dev)|(test|testing))(?![a-z])", re.IGNORECASE)


def split_of(name: str, *, whole: bool = False) -> str | None:
    """The split that a file or folder name speaks of, or None; `whole`: only where the name is that word alone."""
    found = _WORD.fullmatch(name) if whole else _WORD.search(name)
    return None if found is None else SPLITS[int(found.lastindex or 1) - 1]


def sets_of_files(files: Iterable[Path]) -> list[dict[str, list[Path]]]:
    """Puts files of several sets apart, and those of each under its splits, sorted by name.

    The files of one set are named alike up to the word of the split; a file that speaks of no split is in no set.
    """
    sets: dict[str, dict[str, list[Path]]] = {}
    for file in sorted(files):
        word = _WORD.search(file.name)
        split = split_of(file.name)
        if word is not None and split is not None:
            sets.setdefault(file.name[: word.start()], {}).setdefault(split, []).append(file)
    return [{split: found[split] for split in SPLITS if split in found} for found in sets.values()]
