"""The formats of a packed set beside its tars: ``manifest.json`` and ``SPLIT.index.npy``.

``shards/README.md`` documents both. A manifest may come from anywhere, so `parse` accepts only what the models below
allow: plain file names, counts that add up, and an identity that matches the content.
"""

import hashlib
import json
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import (
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mnistm_dist.data.image_io import MAX_SIDE, explain_decode_errors
from mnistm_dist.data.sources.base import MAX_CLASSES, SPLITS
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.files import refuse_pointer

MANIFEST_NAME = "manifest.json"
# Version of the format. A reader accepts only its own.
FORMAT_VERSION = 1
# The groups of splits whose pixels are hashed in key order, across the splits of a group.
PIXEL_GROUPS = {"train+val": ("train", "val"), "test": ("test",)}
MAX_KEY = 96  # bytes; with its suffix it is the name of a tar's member, of 100 at most
# What to do about a damaged set: the end of an error message.
REPAIR = "copy the set again, or pack it again"


# One line without control characters.
Text = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Channels = tuple[Fraction, Fraction, Fraction]


class SetFile(BaseModel, frozen=True, extra="forbid"):
    """A file of the set."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    """File name within the set's folder. It leads out of no folder."""
    size: int = Field(strict=True, ge=1, lt=2**63)
    """Bytes."""
    sha256: Sha256


class Shard(SetFile, frozen=True):
    """One tar."""

    count: Count
    """Samples."""


class Split(BaseModel, frozen=True, extra="forbid"):
    """One split: train, val or test."""

    count: Count
    """Samples."""
    class_counts: tuple[Count, ...]
    """Samples of each class, in the order of the classes."""
    mean: Channels
    """Mean of the pixels per channel (R, G, B), on a scale of 0 to 1."""
    std: Channels
    """Standard deviation (of the population) of the pixels per channel, on the same scale."""
    pixels_sha256: Sha256
    """sha256 of all RGB bytes of the split in key order."""
    index: SetFile
    """Where each sample is: see `index_dtype`."""
    shards: tuple[Shard, ...]
    """In storage order: the ids of the split's samples count through them."""

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """The id of each shard's first sample, followed by the split's count: int64 (shards + 1,)."""
        return np.cumsum([0, *(shard.count for shard in self.shards)], dtype=np.int64)

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        in_shards, in_classes = sum(shard.count for shard in self.shards), sum(self.class_counts)
        if not 0 < self.count == in_shards == in_classes:
            raise ValueError(
                f"counts do not add up: {self.count} samples, {in_shards} in its shards, {in_classes} in its classes"
            )
        return self


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What ``manifest.json`` says of a packed set."""

    format_version: Annotated[int, Field(strict=True, ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    lineage: Annotated[str, Field(pattern="^(official|regenerated|unknown)$")]
    layout: Text
    """The source's layout when it was packed."""
    description: Text
    """Where it came from, one line."""
    notes: tuple[Text, ...] = ()
    """What was left out of the source or converted; one line each."""
    resize: Side | None = None
    """``--resize`` of `pack`, pixels: `predict` prepares its pictures in the same way."""
    classes: Annotated[tuple[Annotated[Text, Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_CLASSES)]
    image_size: tuple[Side, Side]
    """(height, width) of every image, pixels."""
    seed: Count
    """Seed of the storage order."""
    pixels_sha256: dict[str, Sha256]
    """sha256 of all RGB bytes in key order: of "train+val" together and, if there is one, of "test"."""
    splits: Annotated[dict[str, Split], Field(min_length=1)]

    @field_validator("splits")
    @classmethod
    def _sort_splits(cls, splits: dict[str, Split]) -> dict[str, Split]:
        if unknown := splits.keys() - set(SPLITS):
            raise ValueError(f"unknown split {min(unknown)!r:.60}; accepted are {', '.join(SPLITS)}")
        return {name: splits[name] for name in SPLITS if name in splits}

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        files = [MANIFEST_NAME, *(file.name for split in self.splits.values() for file in (split.index, *split.shards))]
        if len(set(files)) < len(files):
            raise ValueError("two files have the same name")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if any(len(split.class_counts) != len(self.classes) for split in self.splits.values()):
            raise ValueError(f"class_counts must have {len(self.classes)} numbers, one per class")
        groups = [group for group, names in PIXEL_GROUPS.items() if self.splits.keys() & set(names)]
        if self.pixels_sha256.keys() != set(groups):
            raise ValueError(f"pixels_sha256 must have the keys {', '.join(groups)}")
        return self

    @cached_property
    def identity(self) -> str:
        """sha256 (hex) that names the set: of the canonical JSON of all fields except layout, description, notes and
        resize.

        The same images packed from a folder and from its archive are one set.
        """
        content = self.model_dump(mode="json", exclude={"layout", "description", "notes", "resize"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def render(manifest: Manifest) -> str:
    """Return the text of ``manifest.json``."""
    content = manifest.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({**content, "identity": manifest.identity}, indent=1) + "\n"


def parse(data: bytes, where: str) -> Manifest:
    """Read and validate the bytes of a ``manifest.json``; ``where`` names the file in messages. Raises `UserError`."""
    refuse_pointer(where, data)
    try:
        content = TypeAdapter(dict[str, Any]).validate_json(data)
        identity = content.pop("identity", None)
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ": ".join([where, *(escape_control(str(key))[:60] for key in first["loc"])])
        found = "" if isinstance(first["input"], dict) else f", found {reprlib.repr(first['input'])}"
        raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}{found}; {REPAIR}") from error
    if identity != manifest.identity:
        raise UserError(f"{where}: its identity does not match its content: it was changed; {REPAIR}")
    return manifest


def index_dtype(key_length: int) -> np.dtype:
    """Return the row of an index: key, offset of the PNG in its shard (bytes), its size (bytes), label."""
    return np.dtype([("key", f"S{key_length}"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])


def open_index(path: Path, count: int) -> np.ndarray:
    """Map an index of ``count`` rows read-only: `index_dtype`, shape (count,).

    Raises `UserError` if the file cannot be read or is not such an index. The values of the rows are not checked.
    """
    with explain_decode_errors(path, f"an index of {count:,} samples"):
        index = np.lib.format.open_memmap(path, mode="r")
        if index.shape == (count,) and index.dtype == index_dtype(min(index.dtype["key"].itemsize, MAX_KEY)):
            return index
        raise ValueError(f"{index.dtype} {index.shape}")
