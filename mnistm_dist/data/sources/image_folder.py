"""The layout of torchvision's ImageFolder, in a folder, a tar or a zip: `{training,testing}/{0..9}/NAME.png`."""

from __future__ import annotations

import re
from functools import partial

from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import CLASSES, SPLITS, Source
from mnistm_dist.data.sources.labels import Place, image_names, read_places, split_of
from mnistm_dist.errors import UserError

_NUMBER = re.compile(r"[0-9]{1,100}")
"""Names longer than any number of an image stand in hostile archives only; Python refuses to read 4,301 digits."""


def is_image_folder(tree: Tree, top: str) -> bool:
    """Whether a folder of a tree looks like the top of this layout: in it a split's folder that holds a class's."""
    return any(not set(CLASSES).isdisjoint(tree.listing(folder).folders) for _, folder in _split_folders(tree, top))


def open_image_folder(tree: Tree, top: str) -> Source:
    """Opens the layout whose splits stand in `top` of a tree.

    The order that the set had before it was sorted into classes is taken from the names where these are numbers that
    come once in a split; else the classes are spread evenly, since the last train images may become val. Raises
    UserError for two folders of one split and for anything foreign in the folders.
    """
    places: dict[str, Place] = {}
    counts: dict[str, int] = {}
    for split, folder in _split_folders(tree, top):
        if split in counts:
            raise UserError(f"{tree.origin(folder)}: a second folder of the split {split}; leave one of them")
        foreign = [*tree.listing(folder).files, *(name for name in tree.listing(folder).folders if name not in CLASSES)]
        if foreign:
            raise UserError(f"{tree.origin(f'{folder}/{foreign[0]}')}: foreign; accepted there are the folders 0 to 9")
        labelled = {name: image_names(tree, f"{folder}/{name}") for name in tree.listing(folder).folders}
        order = _order(labelled)
        counts[split] = len(order)
        for index, (label, name) in enumerate(order):
            places[f"{folder}/{label}/{name}"] = Place(split, index, int(label))
    return Source(
        layout=f"image-{tree.kind}",
        description=f"{tree.path}, a folder for each class",
        counts=counts,
        read=partial(read_places, tree, places),
    )


def _split_folders(tree: Tree, top: str) -> list[tuple[str, str]]:
    prefix = f"{top}/" if top else ""
    found = ((split_of(name, whole=True), prefix + name) for name in tree.listing(top).folders)
    return sorted(((split, folder) for split, folder in found if split), key=lambda pair: SPLITS.index(pair[0]))


def _order(labelled: dict[str, list[str]]) -> list[tuple[str, str]]:
    pairs = [(label, name) for label, names in labelled.items() for name in names]
    stems = [name[: -len(".png")] for _, name in pairs]
    if all(map(_NUMBER.fullmatch, stems)) and len({int(stem) for stem in stems}) == len(stems):
        return sorted(pairs, key=lambda pair: int(pair[1][: -len(".png")]))
    spread = [
        ((place + 0.5) / len(names), label, name)
        for label, names in labelled.items()
        for place, name in enumerate(names)
    ]
    return [(label, name) for _, label, name in sorted(spread)]
