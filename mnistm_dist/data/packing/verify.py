"""Looks a packed set over from end to end, trusting nothing in it but the manifest's words on what should be there.

1. Every index and shard: is it there, of the right size, of the right sha256? What else lies in the folder?
2. Every shard is read as a tar: are its members the ones, at the places and with the labels, of the index?
3. Every image is decoded, in key order: are the sums, the means and the class counts those of the manifest?

A later step is taken only with what the earlier ones found whole.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.integrity import CHANGED, WHOLE, FileClaim, examine
from mnistm_dist.data.manifest import MANIFEST_NAME
from mnistm_dist.data.packing.statistics import Encoded, PixelSums, sum_pixels
from mnistm_dist.data.packing.writer import BLOCK
from mnistm_dist.data.parallel import ordered_map, workers_for
from mnistm_dist.data.progress import Progress, stage
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

EXTRA, FOREIGN = "extra", "foreign"
"""Of a file that the manifest does not list: one that looks like a part of the set (damage, since a reader that takes
all tars would take it too), and any other."""
_PART_SUFFIXES = (".tar", ".index.npy")
_READ_AT_ONCE = 1024
"""Images whose bytes are read together, each shard among them opened once."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a file of the set was found to be."""

    name: str
    status: str
    """`WHOLE`, `CUT`, `CHANGED` or `MISSING` of wholeness.py, `EXTRA` or `FOREIGN`."""
    detail: str
    """What exactly, in words."""

    @property
    def damaged(self) -> bool:
        """Whether the set is not whole by this finding alone."""
        return self.status not in (WHOLE, FOREIGN)


def inspect(shards: ShardSet, progress: Progress | None = None) -> list[Finding]:
    """Looks over a whole set, in parallel: a finding for each index, shard and other file, and for the manifest.

    ``progress(done, total)`` counts images.
    """
    findings = _inspect_files(shards, stage(progress, 0, 2))
    findings += _find_others(shards)
    if not any(finding.damaged for finding in findings):
        findings.append(_inspect_samples(shards, stage(progress, 1, 2)))
    return findings


@dataclass(frozen=True, kw_only=True)
class _Tar:
    """A shard to read through, and what should be in it."""

    claim: FileClaim
    rows: np.ndarray | None
    """Its rows of the index; None where the index is damaged."""
    count: int


def _inspect_files(shards: ShardSet, progress: Progress) -> list[Finding]:
    findings, tars = [], []
    for name, split in shards.manifest.splits.items():
        index, claims = None, iter(shards.files([name]))
        finding = _of_file(next(claims), f"{split.count:,} rows")
        if finding.status == WHOLE:
            try:
                index = shards.index(name)
            except UserError as error:
                finding = Finding(name=finding.name, status=CHANGED, detail=str(error))
        findings.append(finding)
        starts = shards.shard_starts(name)
        for number, claim in enumerate(claims):
            rows = None if index is None else np.array(index[starts[number] : starts[number + 1]])
            tars.append(_Tar(claim=claim, rows=rows, count=split.shards[number].count))
    total, done = sum(tar.count for tar in tars), 0
    for tar, finding in zip(tars, ordered_map(_inspect_tar, tars, workers=workers_for(total)), strict=True):
        findings.append(finding)
        done += tar.count
        progress(done, total)
    return findings


def _of_file(claim: FileClaim, whole_detail: str) -> Finding:
    found = examine(claim)
    detail = whole_detail if found.status == WHOLE else found.detail
    return Finding(name=claim.path.name, status=found.status, detail=detail)


def _inspect_tar(tar: _Tar) -> Finding:
    finding = _of_file(tar.claim, f"{tar.count:,} images")
    if finding.status == WHOLE and tar.rows is not None:
        try:
            wrong = _first_difference(tar.claim.path, tar.rows)
        except UNREADABLE as error:
            wrong = f"not readable as a tar ({error})"
        if wrong:
            return Finding(name=finding.name, status=CHANGED, detail=wrong)
    return finding


def _first_difference(path: Path, rows: np.ndarray) -> str:
    """How a tar differs from its rows of the index; empty where it does not."""
    with tarfile.open(path, "r:") as tar:
        members, end = iter(tar), 0
        for row in rows:
            key = row["key"].decode("ascii", "replace")
            for suffix in ("png", "cls"):
                member = next(members, None)
                found = "the end" if member is None else member.name
                if member is None or not member.isreg() or member.issparse() or found != f"{key}.{suffix}":
                    return f"{found} where the index has {key}.{suffix}"
                if suffix == "png" and (member.offset_data, member.size) != (row["offset"], row["size"]):
                    return f"{found} does not lie where the index says"
                if suffix == "cls":
                    content, label = tar.extractfile(member), b"%d" % row["label"]
                    assert content is not None
                    if member.size != len(label) or content.read() != label:
                        return f"{found} is not the label of the index, {row['label']}"
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        extra = next(members, None)
        if extra is not None:
            return f"{extra.name} is one member more than the index has"
    if path.stat().st_size != end + 2 * BLOCK:
        return "it does not end after its last member"
    return ""


def _find_others(shards: ShardSet) -> Iterator[Finding]:
    listed = {MANIFEST_NAME, *(claim.path.name for claim in shards.files(shards.manifest.splits))}
    for name in sorted(path.name for path in shards.root.iterdir()):
        if name not in listed:
            status = EXTRA if name.endswith(_PART_SUFFIXES) else FOREIGN
            yield Finding(name=name, status=status, detail="not in the manifest")


def _inspect_samples(shards: ShardSet, progress: Progress) -> Finding:
    """What the manifest says of the samples, against all of them."""
    count, size = sum(split.count for split in shards.manifest.splits.values()), shards.manifest.image_size
    try:
        wrong = _wrong_keys(shards)
        if not wrong:
            wrong = _wrong_claims(shards, sum_pixels(_in_key_order(shards), count=count, size=size, progress=progress))
    except UserError as error:
        return Finding(name=MANIFEST_NAME, status=CHANGED, detail=str(error))
    if wrong:
        return Finding(name=MANIFEST_NAME, status=CHANGED, detail=f"not as in the shards: {', '.join(wrong)}")
    return Finding(name=MANIFEST_NAME, status=WHOLE, detail="its sums, means and class counts are those of the images")


def _wrong_claims(shards: ShardSet, sums: PixelSums) -> list[str]:
    """What the manifest says otherwise than the images and labels."""
    manifest = shards.manifest
    wrong = [f"the pixels of {name}" for name, said in manifest.pixels_sha256.items() if sums.groups[name] != said]
    for name, split in manifest.splits.items():
        counts = np.bincount(shards.labels(name), minlength=len(manifest.classes))
        mean, std = sums.moments[name]
        claims = {
            "pixels": split.pixels_sha256 == sums.splits[name],
            "mean": np.allclose(split.mean, mean, rtol=0, atol=1e-9),
            "std": np.allclose(split.std, std, rtol=0, atol=1e-9),
            "class counts": split.class_counts == tuple(counts.tolist()),
        }
        wrong += [f"the {what} of {name}" for what, right in claims.items() if not right]
    return wrong


def _wrong_keys(shards: ShardSet) -> list[str]:
    """What is wrong with the keys: within a group each comes once, and those of val after those of train."""
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
