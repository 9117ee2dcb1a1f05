"""``manifest.json`` of a packed set: what stands in it, and a reader that trusts none of it.

The format is written down for people in ``shards/README.md``. `parse` accepts exactly that and raises `UserError` for
everything else, since a manifest may come from anywhere: names that climb out of the folder, counts that do not add up,
wrong types.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mnistm_dist.data.image_io import MAX_SIDE
from mnistm_dist.data.json_fields import MAX_INTEGER, Fields, read_json
from mnistm_dist.data.progress import AGAIN
from mnistm_dist.data.sources.base import SPLITS
from mnistm_dist.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
"""Version of the format; a reader takes its own only."""
LINEAGES = ("official", "regenerated", "unknown")
PIXEL_GROUPS = {"train+val": ("train", "val"), "test": ("test",)}
"""The groups of splits whose pixels are summed in key order, across the splits of a group."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar."""

    name: str
    """File name within the set's folder."""
    size: int
    """Bytes."""
    sha256: str
    count: int
    """Samples."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: train, val or test."""

    name: str
    count: int
    """Samples."""
    class_counts: tuple[int, ...]
    """Samples of each class, in the order of the classes."""
    mean: tuple[float, float, float]
    """Mean of the pixels per channel (R, G, B), on a scale of 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation (of the population) of the pixels per channel, on the same scale."""
    pixels_sha256: str
    """sha256 of all RGB bytes of the split in key order."""
    index_name: str
    index_size: int
    """Bytes."""
    index_sha256: str
    shards: tuple[Shard, ...]
    """In storage order: the ids of the split's samples count through them."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a packed set says of itself."""

    format_version: int
    lineage: str
    """"official", "regenerated" or "unknown"."""
    layout: str
    """The source's layout when it was packed."""
    description: str
    """Where it came from, one line."""
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    """(height, width) of every image, pixels."""
    seed: int
    """Seed of the order of storage."""
    pixels_sha256: dict[str, str]
    """sha256 of all RGB bytes in key order: of "train+val" together and, where there is one, of "test"."""
    splits: dict[str, Split]

    @cached_property
    def identity(self) -> str:
        """sha256 (hex) that names the set: of the canonical JSON of all but layout and description.

        The same images packed from a folder and from its archive are one set.
        """
        content = _to_json_without_identity(self)
        del content["layout"], content["description"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def render(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps({**_to_json_without_identity(manifest), "identity": manifest.identity}, indent=1) + "\n"


def parse(data: bytes, where: str) -> Manifest:
    """Reads the bytes of a ``manifest.json`` and validates all of it; ``where`` names the file in messages.

    Raises `UserError` for what is not JSON, of another version, of wrong types, or does not add up.
    """
    top = read_json(data, where)
    version = top.integer("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{where}: format version {version}, this program reads {FORMAT_VERSION}: pack the set again")
    classes = tuple(top.texts("classes"))
    height, width = top.integers("image_size", 2, 1, MAX_SIDE)
    splits_value = top.fields("splits")
    manifest = Manifest(
        format_version=version,
        lineage=top.choice("lineage", LINEAGES),
        layout=top.text("layout"),
        description=top.text("description"),
        classes=classes,
        image_size=(height, width),
        seed=top.integer("seed"),
        pixels_sha256={
            group: top.fields("pixels_sha256").sha256(group)
            for group, names in PIXEL_GROUPS.items()
            if any(name in splits_value.value for name in names)
        },
        splits={
            name: _parse_split(name, splits_value.fields(name), len(classes))
            for name in SPLITS
            if name in splits_value.value
        },
    )
    top.only(
        "format_version",
        "lineage",
        "layout",
        "description",
        "classes",
        "image_size",
        "seed",
        "pixels_sha256",
        "splits",
        "identity",
    )
    splits_value.only(*SPLITS)
    top.fields("pixels_sha256").only(*manifest.pixels_sha256)
    if not manifest.splits:
        raise UserError(f"{where}: it lists no split: pack the set again")
    _check_names(manifest, where)
    if top.sha256("identity") != manifest.identity:
        raise UserError(f"{where}: its identity does not match its content: it was changed: {AGAIN}")
    return manifest


def _parse_split(name: str, fields: Fields, classes: int) -> Split:
    index = fields.fields("index")
    shards = []
    for number, value in enumerate(fields.items("shards")):
        shard = Fields(value, f"{fields.where}, shard {number}")
        shards.append(
            Shard(
                name=shard.name("name"),
                size=shard.integer("size"),
                sha256=shard.sha256("sha256"),
                count=shard.integer("count"),
            )
        )
        shard.only("name", "size", "sha256", "count")
    means, stds = fields.fractions("mean"), fields.fractions("std")
    split = Split(
        name=name,
        count=fields.integer("count"),
        class_counts=tuple(fields.integers("class_counts", classes, 0, MAX_INTEGER)),
        mean=means,
        std=stds,
        pixels_sha256=fields.sha256("pixels_sha256"),
        index_name=index.name("name"),
        index_size=index.integer("size"),
        index_sha256=index.sha256("sha256"),
        shards=tuple(shards),
    )
    index.only("name", "size", "sha256")
    fields.only("count", "class_counts", "mean", "std", "pixels_sha256", "index", "shards")
    in_shards, in_classes = sum(shard.count for shard in shards), sum(split.class_counts)
    if not split.count == in_shards == in_classes or split.count < 1:
        raise UserError(
            f"{fields.where}: its counts do not add up ({split.count} samples, {in_shards} in its shards, "
            f"{in_classes} in its classes): pack the set again"
        )
    return split


def _check_names(manifest: Manifest, where: str) -> None:
    seen = {MANIFEST_NAME}
    for split in manifest.splits.values():
        for name in (split.index_name, *(shard.name for shard in split.shards)):
            if name in seen:
                raise UserError(f"{where}: it lists {name} twice: pack the set again")
            seen.add(name)


def _to_json_without_identity(manifest: Manifest) -> dict[str, Any]:
    return {
        "format_version": manifest.format_version,
        "lineage": manifest.lineage,
        "layout": manifest.layout,
        "description": manifest.description,
        "classes": list(manifest.classes),
        "image_size": list(manifest.image_size),
        "seed": manifest.seed,
        "pixels_sha256": manifest.pixels_sha256,
        "splits": {
            name: {
                "count": split.count,
                "class_counts": list(split.class_counts),
                "mean": list(split.mean),
                "std": list(split.std),
                "pixels_sha256": split.pixels_sha256,
                "index": {"name": split.index_name, "size": split.index_size, "sha256": split.index_sha256},
                "shards": [
                    {"name": shard.name, "size": shard.size, "sha256": shard.sha256, "count": shard.count}
                    for shard in split.shards
                ],
            }
            for name, split in manifest.splits.items()
        },
    }
