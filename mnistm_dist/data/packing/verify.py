"""Verify a packed set completely, trusting nothing in it but what the manifest says should be there.

1. Check every index and shard: present, of the right size and sha256? Are there others that look like them?
2. Compare every tar with its index: are its members, their places and labels what `pack` writes for it?
3. Decode every image, in key order: do the hashes, means and class counts match the manifest?

A later step only runs on what the earlier ones found intact.
"""

import mmap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from mnistm_dist.data.integrity import CHANGED, EXTRA, OK, Finding, examine
from mnistm_dist.data.manifest import MANIFEST_NAME, PIXEL_GROUPS, SetFile
from mnistm_dist.data.packing.statistics import Encoded, measure_pixels
from mnistm_dist.data.packing.writer import TAR_END, tar_member
from mnistm_dist.data.parallel import Progress, ordered_map, stage, workers_for
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

_PART_SUFFIXES = (".tar", ".index.npy")
# A shard, and its rows of the index unless that is damaged.
_Task = tuple[Path, SetFile, np.ndarray | None]
_READ_AT_ONCE = 1024  # images whose bytes are read together; each of their shards is opened once


def inspect(shards: ShardSet, progress: Progress | None = None) -> list[Finding]:
    """Verify a set in parallel: a finding for each index, shard and other file, and for the manifest.

    ``progress(done, total)`` counts images.
    """
    findings = _inspect_files(shards, stage(progress, 0, 2))
    others = {path.name for path in shards.root.iterdir()} - {finding.name for finding in findings}
    extra = sorted(name for name in others if name.endswith(_PART_SUFFIXES))
    findings += [Finding(name=name, status=EXTRA, detail="not in the manifest") for name in extra]
    if all(finding.status == OK for finding in findings):
        wrong = _compare_images(shards, stage(progress, 1, 2))
        findings.append(Finding(name=MANIFEST_NAME, status=CHANGED if wrong else OK, detail=wrong))
    return findings


def _inspect_files(shards: ShardSet, progress: Progress) -> list[Finding]:
    findings: list[Finding] = []
    tasks: list[_Task] = []
    for name, split in shards.manifest.splits.items():
        (path, claim), *tars = shards.files([name]).items()
        finding = examine(path, claim, {})
        rows: list[np.ndarray | None] = [None] * len(tars)
        if finding.status == OK:
            try:
                rows = [*np.split(np.array(shards.index(name)), split.shard_starts[1:-1])]
            except UserError as error:
                finding = Finding(name=finding.name, status=CHANGED, detail=str(error))
        findings.append(finding)
        tasks += [(*tar, tar_rows) for tar, tar_rows in zip(tars, rows, strict=True)]
    total, done = sum(split.count for split in shards.manifest.splits.values()), 0
    counts = [shard.count for split in shards.manifest.splits.values() for shard in split.shards]
    for count, finding in zip(counts, ordered_map(_inspect_tar, tasks, workers=workers_for(total)), strict=True):
        findings.append(finding)
        done += count
        progress(done, total)
    return findings


def _inspect_tar(task: _Task) -> Finding:
    """Check a shard, and its members against its rows of the index."""
    path, claim, rows = task
    finding = examine(path, claim, {})
    if finding.status == OK and rows is not None and (wrong := _first_difference(path, rows)):
        return Finding(name=path.name, status=CHANGED, detail=wrong)
    return finding


def _first_difference(path: Path, rows: np.ndarray) -> str:
    """Return how a tar differs from what `pack` writes for its rows of the index, or an empty text."""
    place = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        for key, offset, size, label in rows.tolist():
            for name, data in ((key + b".png", tar[offset : offset + size]), (key + b".cls", b"%d" % label)):
                member = tar_member(name, data)
                if tar[place : place + len(member)] != member:
                    return f"{name.decode('ascii', 'backslashreplace')} is not as the index says"
                place += len(member)
        return "" if tar[place:] == TAR_END else "it does not end after its last member"


def _compare_images(shards: ShardSet, progress: Progress) -> str:
    """Return what the manifest says differently from the keys, images and labels, or an empty text."""
    try:
        wrong = _wrong_keys(shards) or _wrong_claims(shards, progress)
    except UserError as error:
        return str(error)
    return f"does not match the shards: {', '.join(wrong)}" if wrong else ""


def _wrong_claims(shards: ShardSet, progress: Progress) -> list[str]:
    manifest = shards.manifest
    count = sum(split.count for split in manifest.splits.values())
    measured = measure_pixels(_in_key_order(shards), count=count, size=manifest.image_size, progress=progress)
    wrong = [f"the pixels of {group}" for group, sha in manifest.pixels_sha256.items() if measured.groups[group] != sha]
    for name, split in manifest.splits.items():
        counts = np.bincount(shards.labels(name), minlength=len(manifest.classes))
        facts = (measured.splits[name], *measured.moments[name], tuple(counts.tolist()))
        claims = (split.pixels_sha256, split.mean, split.std, split.class_counts)
        what = ("pixels", "mean", "std", "class counts")
        wrong += [f"the {w} of {name}" for w, claim, fact in zip(what, claims, facts, strict=True) if claim != fact]
    return wrong


def _wrong_keys(shards: ShardSet) -> list[str]:
    """Keys must be unique in their group of splits, without dots, and those of val must follow those of train."""
    wrong = []
    for group, names in PIXEL_GROUPS.items():
        splits = [name for name in names if name in shards.manifest.splits]
        keys = [key for name in splits for key in np.sort(shards.index(name)["key"]).tolist()]
        if any(a >= b for a, b in pairwise([b"", *keys])) or any(b"." in key for key in keys):
            wrong.append(f"the keys of {group}")
    return wrong


def _in_key_order(shards: ShardSet) -> Iterator[Encoded]:
    for name, split in shards.manifest.splits.items():
        order = np.argsort(shards.index(name)["key"], kind="stable")
        for start in range(0, split.count, _READ_AT_ONCE):
            ids = order[start : start + _READ_AT_ONCE]
            for key, png in zip(shards.keys(name, ids), shards.read(name, ids), strict=True):
                yield name, png, f"{shards.root}: {key}.png of {name}"
