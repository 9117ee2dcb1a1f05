"""Writes a packed set: a source's images as WebDataset tars, reproducibly, with a manifest that can be checked.

1. The splits are cut and the keys given, by the counts alone.
2. The source is read once, in its own order, into a spool; every image's header is checked.
3. The images are checked and decoded in key order, in parallel, and their pixels summed.
4. The shards are written, each split in a permuted order, and the index beside them.
5. The manifest is written, all is synced, and the folder gets its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnistm_dist.data.files import OutputFile
from mnistm_dist.data.hashing import derive_key, permute
from mnistm_dist.data.index import index_bytes, index_dtype
from mnistm_dist.data.manifest import FORMAT_VERSION, MANIFEST_NAME, PIXEL_GROUPS, Manifest, Shard, Split, parse, render
from mnistm_dist.data.packing.lineage import find_lineage
from mnistm_dist.data.packing.splits import Part, count_shards, cut_splits
from mnistm_dist.data.packing.spool import Spool
from mnistm_dist.data.packing.staging import staged_folder
from mnistm_dist.data.packing.statistics import Encoded, PixelSums, sum_pixels
from mnistm_dist.data.progress import Progress, stage
from mnistm_dist.data.sources.base import CLASSES, SPLITS, Source
from mnistm_dist.errors import UserError

TRAIN_SHARDS = 64
"""Shards of the train split by default; fewer where there are fewer samples."""
_MAX_SEED = 2**63 - 1
_TAG_STORAGE = 5  # keeps the keys of the order of storage apart from those of data/order.py at the same seed


def pack(
    source: Source,
    out: Path,
    *,
    num_shards: int | None = None,
    val_size: int | None = None,
    seed: int = 0,
    lineage: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Packs a source into the new folder ``out`` and returns its manifest.

    ``num_shards``: tars of the train split (`TRAIN_SHARDS` by default, never more than it has samples); val and test
    get as many in proportion. ``val_size``: see `cut_splits`. ``seed``: of the order of storage. The same PNGs and seed
    give the same tars, byte for byte, on every machine. ``lineage``: what the pixels must prove the set to be.
    ``progress(done, total)`` counts images.

    Raises `UserError` for an ``out`` that exists, for what is broken in the source, naming file and member, and where
    it cannot write; then nothing is left behind.
    """
    if num_shards is not None and num_shards < 1:
        raise UserError(f"{num_shards} shards: accepted are 1 or more")
    if not 0 <= seed <= _MAX_SEED:
        raise UserError(f"seed {seed}: accepted are 0 to {_MAX_SEED}")
    parts = cut_splits(source, val_size)
    with staged_folder(out) as folder:
        with OutputFile(folder / "spool") as file:
            spool = Spool(file, source)
            spool.fill(stage(progress, 0, 3))
            sums = sum_pixels(
                _in_key_order(spool, parts),
                count=sum(part.count for part in parts.values()),
                size=spool.image_size,
                progress=stage(progress, 1, 3),
            )
            found = find_lineage(sums.groups, _labels_of_groups(spool, parts), source.lineage)
            if lineage not in (None, found):
                raise UserError(
                    f"{source.description}: by its pixels and labels it is not the {lineage} set, so nothing is packed"
                )
            splits = _write_splits(folder, spool, parts, num_shards or TRAIN_SHARDS, seed, sums, stage(progress, 2, 3))
        (folder / "spool").unlink()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            lineage=found,
            layout=source.layout,
            description="".join(letter if letter.isprintable() else "?" for letter in source.description),
            classes=CLASSES,
            image_size=spool.image_size,
            seed=seed,
            pixels_sha256=sums.groups,
            splits=splits,
        )
        text = render(manifest).encode()
        assert parse(text, MANIFEST_NAME) == manifest
        with OutputFile(folder / MANIFEST_NAME) as file:
            file.append(text)
    return manifest


def _in_key_order(spool: Spool, parts: dict[str, Part]) -> Iterator[Encoded]:
    for part in parts.values():
        for index in range(part.start, part.start + part.count):
            png, origin = spool.png_and_origin(part.source_split, index)
            yield Encoded(split=part.name, png=png, origin=origin)


def _labels(spool: Spool, part: Part) -> np.ndarray:
    return spool.places[part.source_split].label[part.start : part.start + part.count]


def _labels_of_groups(spool: Spool, parts: dict[str, Part]) -> dict[str, np.ndarray]:
    return {
        group: np.concatenate([_labels(spool, parts[name]) for name in names if name in parts])
        for group, names in PIXEL_GROUPS.items()
        if any(name in parts for name in names)
    }


def _write_splits(
    folder: Path,
    spool: Spool,
    parts: dict[str, Part],
    train_shards: int,
    seed: int,
    sums: PixelSums,
    progress: Progress,
) -> dict[str, Split]:
    total, done = sum(part.count for part in parts.values()), 0
    splits = {}
    for part in parts.values():
        key = int(derive_key(seed, _TAG_STORAGE, SPLITS.index(part.name))[0])
        places = permute(np.arange(part.count), part.count, key)
        index = np.zeros(part.count, dtype=index_dtype(len(part.keys(places[:1])[0])))
        index["label"] = _labels(spool, part)[places]
        num_shards = count_shards(part, parts["train"], train_shards)
        shards = []
        for number in range(num_shards):
            # Cut in this way, shards differ by at most one sample.
            span = slice(number * part.count // num_shards, (number + 1) * part.count // num_shards)
            name = f"{part.name}-{number:0{max(6, len(str(num_shards - 1)))}d}.tar"
            shards.append(_write_shard(folder / name, spool, part, places[span], index[span]))
            done += shards[-1].count
            progress(done, total)
        index_name = f"{part.name}.index.npy"
        with OutputFile(folder / index_name) as file:
            file.append(index_bytes(index))
        mean, std = sums.moments[part.name]
        splits[part.name] = Split(
            name=part.name,
            count=part.count,
            class_counts=tuple(np.bincount(index["label"], minlength=len(CLASSES)).tolist()),
            mean=mean,
            std=std,
            pixels_sha256=sums.splits[part.name],
            index_name=index_name,
            index_size=file.size,
            index_sha256=file.sha256,
            shards=tuple(shards),
        )
    return splits


def _write_shard(path: Path, spool: Spool, part: Part, places: np.ndarray, rows: np.ndarray) -> Shard:
    """Writes one tar of the samples at these places of the part, and fills in key, offset and size of their rows."""
    keys = part.keys(places)
    with OutputFile(path) as tar:
        for row, (key, place) in enumerate(zip(keys, places.tolist(), strict=True)):
            png = spool.png(part.source_split, part.start + place)
            rows["offset"][row] = add_member(tar, f"{key}.png", png)
            rows["size"][row] = len(png)
            add_member(tar, f"{key}.cls", b"%d" % rows["label"][row])
        end_tar(tar)
    rows["key"] = keys
    return Shard(name=path.name, size=tar.size, sha256=tar.sha256, count=len(keys))


BLOCK = 512
"""Bytes; a header is one block, and a member's data is padded to whole ones."""
_MAX_MEMBER = 8**11 - 1
_OWNER = b"0000644\0" + b"0000000\0" * 2  # mode, user, group
_TIME = b"00000000000\0"
_END = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)  # from the kind of member on
_END_SUM = sum(_END)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes of a USTAR header (POSIX.1-1988) of a regular file of ``size`` bytes: mode 644, owner 0, time 0."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100, name
    assert size <= _MAX_MEMBER, size
    start = encoded.ljust(100, b"\0") + _OWNER + b"%011o\0" % size + _TIME
    # The checksum is the sum of all bytes, its own field counted as eight spaces.
    return start + b"%06o\0 " % (sum(start) + sum(b" " * 8) + _END_SUM) + _END


def add_member(tar: OutputFile, name: str, data: bytes) -> int:
    """Appends a member to a tar; returns the offset of its data in the tar, bytes."""
    return tar.append(tar_header(name, len(data)) + data + bytes(-len(data) % BLOCK)) + BLOCK


def end_tar(tar: OutputFile) -> None:
    """Appends the two empty blocks that end an archive."""
    tar.append(bytes(2 * BLOCK))
