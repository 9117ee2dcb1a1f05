"""Which split a name speaks of: train, training, val, valid, validation, dev, test, testing, as a word of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mnistm_dist.data.samples import SPLITS

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
