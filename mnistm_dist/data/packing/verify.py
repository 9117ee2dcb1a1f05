"""Verify a packed set completely, trusting nothing in it but what the manifest says should be there.

1. Check every index and shard: present, of the right size and sha256? Which other files are in the folder?
2. Read every shard as a tar: are its members those of the index, in the same places and with the same labels?
3. Decode every image, in key order: do the hashes, means and class counts match the manifest?

A later step only runs on what the earlier ones found intact.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.integrity import CHANGED, EXTRA, FOREIGN, OK, FileClaim, Finding, examine
from mnistm_dist.data.manifest import MANIFEST_NAME
from mnistm_dist.data.packing.statistics import Encoded, PixelStatistics, measure_pixels
from mnistm_dist.data.packing.writer import BLOCK
from mnistm_dist.data.parallel import ordered_map, workers_for
from mnistm_dist.data.progress import Progress, stage
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

_PART_SUFFIXES = (".tar", ".index.npy")
_READ_AT_ONCE = 1024
"""Images whose bytes are read together; each of their shards is opened once."""


def inspect(shards: ShardSet, progress: Progress | None = None) -> list[Finding]:
    """Verify a set in parallel: a finding for each index, shard and other file, and for the manifest.

    ``progress(done, total)`` counts images.
    """
    findings = _inspect_files(shards, stage(progress, 0, 2))
    listed = {MANIFEST_NAME, *(finding.name for finding in findings)}
    for name in sorted({path.name for path in shards.root.iterdir()} - listed):
        status = EXTRA if name.endswith(_PART_SUFFIXES) else FOREIGN
        findings.append(Finding(name=name, status=status, detail="not in the manifest"))
    if not any(finding.damaged for finding in findings):
        try:
            wrong = _compare_images(shards, stage(progress, 1, 2))
        except UserError as error:
            wrong = str(error)
        findings.append(Finding(name=MANIFEST_NAME, status=CHANGED if wrong else OK, detail=wrong))
    return findings


def _inspect_files(shards: ShardSet, progress: Progress) -> list[Finding]:
    findings, tars = [], []
    for name, split in shards.manifest.splits.items():
        index, (index_claim, *claims) = None, shards.files([name])
        finding = examine(index_claim)
        if not finding.damaged:
            try:
                index = shards.index(name)
            except UserError as error:
                finding = Finding(name=finding.name, status=CHANGED, detail=str(error))
        findings.append(finding)
        for claim, start, stop in zip(claims, split.shard_starts, split.shard_starts[1:], strict=False):
            tars.append((claim, None if index is None else np.array(index[start:stop])))
    total, done = sum(split.count for split in shards.manifest.splits.values()), 0
    counts = [shard.count for split in shards.manifest.splits.values() for shard in split.shards]
    for count, finding in zip(counts, ordered_map(_inspect_tar, tars, workers=workers_for(total)), strict=True):
        findings.append(finding)
        done += count
        progress(done, total)
    return findings


def _inspect_tar(task: tuple[FileClaim, np.ndarray | None]) -> Finding:
    """Check a shard, and its members against its rows of the index, unless the index is damaged."""
    claim, rows = task
    finding = examine(claim)
    if not finding.damaged and rows is not None:
        try:
            wrong = _first_difference(claim.path, rows)
        except UNREADABLE as error:
            wrong = f"cannot be read as a tar ({error})"
        if wrong:
            return Finding(name=finding.name, status=CHANGED, detail=wrong)
    return finding


def _first_difference(path: Path, rows: np.ndarray) -> str:
    """Return how a tar differs from its rows of the index, or an empty text."""
    with tarfile.open(path, "r:") as tar:
        members, end = iter(tar), 0
        for row in rows:
            key, label = row["key"].decode("ascii", "replace"), b"%d" % row["label"]
            for name in (f"{key}.png", f"{key}.cls"):
                member = next(members, None)
                if member is None or not member.isreg() or member.issparse() or member.name != name:
                    return f"{'the end' if member is None else member.name} instead of {name}, which the index has here"
                if name.endswith(".png"):
                    if (member.offset_data, member.size) != (row["offset"], row["size"]):
                        return f"{name} is not where the index says"
                elif member.size != len(label) or _content(tar, member) != label:
                    return f"{name} is not the label of the index, {row['label']}"
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        extra = next(members, None)
        if extra is not None:
            return f"{extra.name} is not in the index"
    return "" if path.stat().st_size == end + 2 * BLOCK else "it does not end after its last member"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def _compare_images(shards: ShardSet, progress: Progress) -> str:
    """Return what the manifest says differently from the keys, images and labels, or an empty text."""
    count = sum(split.count for split in shards.manifest.splits.values())
    wrong = _wrong_keys(shards)
    if not wrong:
        images, size = _in_key_order(shards), shards.manifest.image_size
        wrong = _wrong_claims(shards, measure_pixels(images, count=count, size=size, progress=progress))
    return f"does not match the shards: {', '.join(wrong)}" if wrong else ""


def _wrong_claims(shards: ShardSet, measured: PixelStatistics) -> list[str]:
    manifest = shards.manifest
    wrong = [f"the pixels of {group}" for group, sha in manifest.pixels_sha256.items() if measured.groups[group] != sha]
    for name, split in manifest.splits.items():
        counts = np.bincount(shards.labels(name), minlength=len(manifest.classes))
        facts = (measured.splits[name], *measured.moments[name], tuple(counts.tolist()))
        claims = (split.pixels_sha256, split.mean, split.std, split.class_counts)
        what = ("pixels", "mean", "std", "class counts")
        wrong += [f"the {w} of {name}" for w, claim, fact in zip(what, claims, facts, strict=True) if claim != fact]
    return wrong


def _wrong_keys(shards: ShardSet) -> list[str]:
    """Within a group of splits each key must occur once, and those of val must follow those of train."""
    wrong, last = [], b""
    for name in shards.manifest.splits:
        keys = np.sort(shards.index(name)["key"])
        if name == "test":
            last = b""
        if keys[0] <= last or (keys[1:] == keys[:-1]).any() or any(b"." in key or not key for key in keys.tolist()):
            wrong.append(f"the keys of {name}")
        last = keys[-1]
    return wrong


def _in_key_order(shards: ShardSet) -> Iterator[Encoded]:
    for name, split in shards.manifest.splits.items():
        order = np.argsort(shards.index(name)["key"], kind="stable")
        for start in range(0, split.count, _READ_AT_ONCE):
            ids = order[start : start + _READ_AT_ONCE]
            for key, png in zip(shards.keys(name, ids), shards.read(name, ids), strict=True):
                yield Encoded(split=name, png=png, origin=f"{shards.root}: {key}.png of {name}")
