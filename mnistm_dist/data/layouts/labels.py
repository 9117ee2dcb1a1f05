"""Labelled images in a tree of files: what the layouts made of image files have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mnistm_dist.data.layouts.trees import Tree
from mnistm_dist.data.samples import CLASSES, Sample
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
