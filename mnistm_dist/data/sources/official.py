"""The official layout: folders of PNGs beside text files of labels, in a folder, a tar or a zip.

mnist_m_train/00000000.png ...      mnist_m_train_labels.txt with lines `00000000.png 5`
mnist_m_test/00000000.png ...       mnist_m_test_labels.txt
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from mnistm_dist.data.sources.archives import Tree
from mnistm_dist.data.sources.base import Source
from mnistm_dist.data.sources.labels import Place, image_names, parse_label, read_places
from mnistm_dist.errors import UserError

_SPLITS = ("train", "test")


def is_official(tree: Tree, top: str) -> bool:
    """Whether a folder of a tree looks like the top of this layout."""
    listing = tree.listing(top)
    return any(
        f"mnist_m_{split}" in listing.folders or f"mnist_m_{split}_labels.txt" in listing.files for split in _SPLITS
    )


def open_official(tree: Tree, top: str) -> Source:
    """Opens the layout whose folders stand in `top` of a tree; images are ordered by file name.

    Raises UserError for images without their file of labels, an image without a label and the other way round, a name
    that is labelled twice, a label that is no class, and a foreign file among the images.
    """
    listing = tree.listing(top)
    prefix = f"{top}/" if top else ""
    places: dict[str, Place] = {}
    counts: dict[str, int] = {}
    for split in _SPLITS:
        folder, labels_file = f"mnist_m_{split}", f"mnist_m_{split}_labels.txt"
        if labels_file in listing.files:
            labels = _read_labels(tree, prefix + labels_file)
        elif folder in listing.folders:
            raise UserError(f"{tree.origin(prefix + folder)}: images without labels; put {labels_file} beside it")
        else:
            continue
        names = image_names(tree, prefix + folder)
        _match(tree, prefix + labels_file, prefix + folder, labels, names)
        counts[split] = len(names)
        for index, name in enumerate(names):
            places[f"{prefix}{folder}/{name}"] = Place(split, index, labels[name])
    return Source(
        layout=f"official-{tree.kind}",
        description=f"{tree.path}, official layout",
        counts=counts,
        read=partial(read_places, tree, places),
    )


def _read_labels(tree: Tree, file: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    for number, line in enumerate(tree.text(file).splitlines(), start=1):
        if not line.strip():
            continue
        origin = f"{tree.origin(file)}: line {number}"
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{origin}: {line[:60]!r}; accepted are lines NAME.png LABEL")
        if words[0] in labels:
            raise UserError(f"{origin}: {words[0]} is labelled twice; leave one of the lines")
        labels[words[0]] = parse_label(origin, words[1])
    return labels


def _match(tree: Tree, labels_file: str, folder: str, labels: Mapping[str, int], names: list[str]) -> None:
    known = set(names)
    absent = [name for name in labels if name not in known]
    if absent:
        more = f" ({len(absent)} labels without an image)" if len(absent) > 1 else ""
        raise UserError(
            f"{tree.origin(f'{folder}/{absent[0]}')}: labelled in {labels_file}, but not there{more}; "
            "put it there, or leave out its line"
        )
    nameless = [name for name in names if name not in labels]
    if nameless:
        more = f" ({len(nameless)} images without one)" if len(nameless) > 1 else ""
        raise UserError(
            f"{tree.origin(f'{folder}/{nameless[0]}')}: no label for it in {labels_file}{more}; "
            "add its line, or leave out the image"
        )
