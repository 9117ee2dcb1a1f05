"""Packed shards: random access to the samples of a set of WebDataset tars, and the check that its files are intact.

A set is a folder with ``manifest.json`` and, per split, its tars and its index (``train.index.npy``). A sample's id is
its place in storage order within its split: shards in the manifest's order, samples in their order within the shard.
Everything downstream uses that id. ``data/packing`` writes such a folder; ``shards/README.md`` documents it.

A record of earlier checks saves hashing what has not changed. It trusts a file whose size, mtime, ctime and inode are
as recorded; ctime also reveals a change by someone who restored mtime.
"""

import contextlib
import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.manifest import MANIFEST_NAME, REPAIR, Manifest, SetFile, Sha256, Split, open_index, parse
from mnistm_dist.data.parallel import Progress, available_cores
from mnistm_dist.errors import UserError, near_path, os_error_reason
from mnistm_dist.files import GIT_LFS_ADVICE, GIT_LFS_START, explain_os_errors, write_atomic

# Status of a file: as claimed, shorter than claimed, other bytes than claimed, not there, or extra: a tar or index that
# the manifest does not list, but a reader that takes all tars would take.
OK, TRUNCATED, CHANGED, MISSING, EXTRA = "ok", "truncated", "changed", "missing", "extra"

# Absolute path -> stamp and sha256 of the file when it was last found to be as claimed.
Record = dict[str, tuple[list[int], Sha256]]
# A file changed less than this before its check is not recorded: another change within the same tick of the clock
# would leave the same times.
_MIN_AGE_NS = 100_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """The encoded images of some samples, with the bytes between neighbours in their shards."""

    ids: np.ndarray
    """The samples, int64 (n,)."""
    data: np.ndarray
    """uint8 (bytes,)."""
    offsets: np.ndarray
    """Where each PNG starts in ``data``, int64 (n,)."""
    sizes: np.ndarray
    """Bytes of each PNG, int64 (n,)."""
    plain: np.ndarray
    """Whether each has the header of an 8-bit RGB PNG of the set's image size, not interlaced: bool (n,)."""


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A packed set in a local folder, which may be read-only. Holds no open file, so it can be pickled and forked."""

    root: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> "ShardSet":
        """Read and validate the manifest of the set in the folder ``path``; no shard is opened. Raises `UserError`."""
        root = Path(path)
        where, advice = root / MANIFEST_NAME, "name a packed set with --shards; python -m mnistm_dist.pack makes one"
        with explain_os_errors(root, verb="read", advice=advice):
            if where.is_file():
                return ShardSet(root=root, manifest=parse(where.read_bytes(), str(where)))
            if any(root.glob("*.tar")):
                raise UserError(
                    f"{root}: shards without a {MANIFEST_NAME}; python -m mnistm_dist.pack {root} --out DIR packs them"
                )
            found = (
                "a file"
                if root.is_file()
                else f"no {MANIFEST_NAME} in it"
                if root.exists()
                else f"no such folder{near_path(root)}"
            )
        raise UserError(f"{root}: {found}; {advice}")

    def split(self, name: str) -> Split:
        """Return the split of that name. Raises `UserError` if the set has none."""
        if name not in self.manifest.splits:
            raise UserError(f"{self.root}: no {name} split; choose one of {', '.join(self.manifest.splits)}")
        return self.manifest.splits[name]

    def index(self, split: str) -> np.ndarray:
        """Map the split's index read-only: a row of `index_dtype` per sample in storage order, shape (count,).

        Raises `UserError` if the file is not such an array. `check` verifies its hash.
        """
        entry = self.split(split)
        return open_index(self.root / entry.index.name, entry.count)

    def keys(self, split: str, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the keys of the samples ``ids``, in their order."""
        keys = self.index(split)["key"][np.asarray(ids, dtype=np.int64)]
        return [key.decode("ascii", "backslashreplace") for key in keys.tolist()]

    def labels(self, split: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the labels of the rows of the index (all by default), int64 (n,). Raises `UserError` for one that is
        not a class."""
        labels = (self.index(split) if rows is None else rows)["label"].astype(np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.manifest.classes):
            raise self.bad_index(split, "has labels that are not classes")
        return labels

    def read(self, split: str, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return the PNGs of the samples ``ids``, in their order; each of their shards is opened once.

        Raises `UserError` naming a shard that is missing or not of the manifest's size.
        """
        unique, places = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        block = self.read_block(split, unique, self.index(split))
        spans = zip(block.offsets[places].tolist(), block.sizes[places].tolist(), strict=True)
        return [block.data[offset : offset + size].tobytes() for offset, size in spans]

    def images(self, split: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the decoded samples ``ids``, in their order, uint8 (n, H, W, 3). Raises `UserError` as `read`, and for
        a broken PNG."""
        pngs = zip(self.keys(split, ids), self.read(split, ids), strict=True)
        size = self.manifest.image_size
        return np.stack([decode_png(png, f"{self.root}: {key}.png of {split}", size) for key, png in pngs])

    def read_block(
        self, split: str, ids: np.ndarray, index: np.ndarray, verify: Callable[[int, int], None] | None = None
    ) -> Block:
        """Read the PNGs of the samples ``ids``, int64 (n,): neighbours in a shard by one sequential read.

        ``index`` is the mapped index of the split. ``verify(shard, descriptor)`` is called when a shard, given by its
        number, has been opened. Raises `UserError` as `read`, and if the index does not fit the shards.
        """
        entry = self.split(split)
        shard_of = np.searchsorted(entry.shard_starts, ids, side="right") - 1
        numbers, inverse = np.unique(shard_of, return_inverse=True)
        limits = np.array([entry.shards[number].size for number in numbers], dtype=np.int64)[inverse]
        rows = index[ids]
        offsets, sizes = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        neighbours = (np.diff(ids) == 1) & (np.diff(shard_of) == 0)
        # A sum that exceeds an int64 becomes negative.
        ends = offsets + sizes
        apart = ~neighbours | (offsets[1:] >= ends[:-1])
        if not (apart.all() and ((offsets >= 0) & (sizes > 0) & (ends > 0) & (ends <= limits)).all()):
            raise self.bad_index(split, "does not fit its shards")
        # Where a run of neighbours starts, and at the end the number of ids; without ids there is no run.
        edges = np.flatnonzero(np.concatenate([[True], ~neighbours, [True]])[: len(ids) + 1])
        firsts, lasts = edges[:-1], edges[1:] - 1
        lengths = ends[lasts] - offsets[firsts]
        starts = np.cumsum(lengths) - lengths
        data = np.empty(lengths.sum(), dtype=np.uint8)
        spans = zip(shard_of[firsts].tolist(), offsets[firsts].tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for shard, shard_spans in groupby(spans, key=lambda span: span[0]):
            path, claimed = self.root / entry.shards[shard].name, entry.shards[shard].size
            with explain_os_errors(path, verb="read", advice=REPAIR):
                if (size := path.stat().st_size) != claimed:  # also of what must not be opened, such as a pipe
                    raise UserError(f"{path}: {size:,} bytes instead of {claimed:,}; {REPAIR}")
                with path.open("rb") as file:
                    if verify is not None:
                        verify(shard, file.fileno())
                    for _, offset, start, length in shard_spans:
                        file.seek(offset)
                        if file.readinto(data[start : start + length].data) != length:
                            raise OSError("truncated while it was read")
        in_data = offsets + np.repeat(starts - offsets[firsts], np.diff(edges))
        plain = _has_header(data, in_data, self.manifest.image_size)
        return Block(ids=ids, data=data, offsets=in_data, sizes=sizes, plain=plain)

    def files(self, splits: Iterable[str]) -> dict[Path, SetFile]:
        """Return the files of the splits by their paths: per split the index, then the shards in order."""
        listed = [file for split in map(self.split, splits) for file in (split.index, *split.shards)]
        return {self.root / file.name: file for file in listed}

    def check(self, splits: Iterable[str], *, record: Path | None, progress: Progress | None = None) -> None:
        """Check that every file of the splits is what the manifest says: see `examine_all`.

        ``record`` is a JSON file of earlier checks; None hashes everything. ``progress(done, total)`` counts bytes.
        Raises `UserError` naming the first file that is missing, truncated or changed.
        """
        findings = examine_all(self.files(splits), record=record, progress=progress)
        damaged = [finding for finding in findings if finding.status != OK]
        if damaged:
            first = damaged[0]
            others = f" ({len(damaged) - 1} more files are damaged)" if len(damaged) > 1 else ""
            raise UserError(f"{self.root / first.name}: {first.status}: {first.detail}{others}; {REPAIR}")

    def bad_index(self, split: str, what: str) -> UserError:
        """Return the error that the split's index is damaged."""
        return UserError(f"{self.root / self.split(split).index.name}: {what}; {REPAIR}")


def _has_header(data: np.ndarray, offsets: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return whether a PNG of 8-bit RGB, not interlaced, of that (height, width) starts at each offset."""
    height, width = image_size
    # Signature and IHDR, PNG specification (third edition), 5.2 and 11.2.1.
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    # The last PNGs of a damaged set may end before their header does.
    places = np.minimum(offsets[:, None] + np.arange(len(header)), len(data) - 1)
    return (data[places] == np.frombuffer(header, dtype=np.uint8)).all(axis=1)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of checking a file."""

    name: str
    """File name."""
    status: str = OK
    """`OK`, `TRUNCATED`, `CHANGED`, `MISSING` or `EXTRA`."""
    detail: str = ""
    """The reason, unless it is ok."""


def examine(path: Path, claim: SetFile, record: Record) -> Finding:
    """Check that a file is as claimed. It is hashed unless it is as recorded, and recorded if it is old enough."""
    status, detail = OK, ""
    try:
        state, key = path.stat(), str(path.absolute())
        stamp = stamp_of(state)
        if not stat.S_ISREG(state.st_mode):
            status, detail = MISSING, "not a regular file"
        elif state.st_size != claim.size:
            status = TRUNCATED if state.st_size < claim.size else CHANGED
            detail = f"{state.st_size:,} bytes instead of {claim.size:,}"
            with path.open("rb") as file:
                if file.read(len(GIT_LFS_START)) == GIT_LFS_START:
                    detail = GIT_LFS_ADVICE
        elif record.get(key) != (stamp, claim.sha256):
            old_enough = time.time_ns() - state.st_ctime_ns > _MIN_AGE_NS
            with path.open("rb", buffering=0) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != claim.sha256:
                    status, detail = CHANGED, "its sha256 is not that of the manifest"
                elif old_enough and stamp_of(os.fstat(file.fileno())) == stamp:
                    record[key] = (stamp, claim.sha256)
    except OSError as error:
        status, detail = MISSING, os_error_reason(error)
    return Finding(name=path.name, status=status, detail=detail)


def examine_all(
    claims: dict[Path, SetFile], *, record: Path | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Check files in parallel threads, in the order of the claims.

    ``record`` is a JSON file of earlier checks, updated at the end; a missing or damaged one is created anew, and one
    that cannot be written is ignored. ``progress(done, total)`` counts bytes.
    """
    known = {} if record is None else load_record(record)
    before, findings = dict(known), []
    total, done = sum(claim.size for claim in claims.values()), 0
    with ThreadPoolExecutor(min(16, available_cores()), "hash") as pool:
        results = pool.map(lambda path: examine(path, claims[path], known), claims)
        for claim, finding in zip(claims.values(), results, strict=True):
            findings.append(finding)
            done += claim.size
            if progress is not None:
                progress(done, total)
    if record is not None and known != before:
        save_record(record, known)
    return findings


def stamp_of(state: os.stat_result) -> list[int]:
    """Return what shows that a file has not changed: size, mtime, ctime and inode; a list, as JSON gives it back."""
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def load_record(path: Path) -> Record:
    """Read a record; an unreadable one is empty."""
    try:
        return TypeAdapter(Record).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def save_record(path: Path, record: Record) -> None:
    """Write a record. It only saves time: if it cannot be written, the next launch hashes again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record))
