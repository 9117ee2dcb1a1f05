"""Whether files are what a manifest claims: their size, and their sha256 where it is not known yet.

A record of earlier checks spares the hashing of what has not changed. It trusts a file whose size, times of change
(mtime and ctime) and inode are the recorded ones; ctime also tells of a change by someone who put mtime back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mnistm_dist.data.cache import write_whole
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.data.progress import AGAIN, Progress
from mnistm_dist.errors import UserError

WHOLE, CUT, CHANGED, MISSING = "whole", "cut", "changed", "missing"
"""What can be said of a file: as claimed, shorter than claimed, other bytes than claimed, not there."""

_SETTLED_NS = 100_000_000
"""A file changed less than this before its check is not recorded: within one tick of the clock another change leaves
the same times behind."""


@dataclass(frozen=True, kw_only=True)
class FileClaim:
    """A file, and what is claimed of it."""

    path: Path
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FileFinding:
    """What a file was found to be."""

    status: str
    """`WHOLE`, `CUT`, `CHANGED` or `MISSING`."""
    detail: str
    """Why, in words; empty where it is whole."""
    stamp: list[int] | None = None
    """Size, mtime, ctime and inode, where the file is whole."""


def examine(claim: FileClaim, known: object = None) -> FileFinding:
    """Finds out whether a file is as claimed; hashes it unless ``known`` is the record of it and still true."""
    try:
        state = claim.path.stat()
        if not stat.S_ISREG(state.st_mode):
            return FileFinding(status=MISSING, detail="there is no regular file of that name")
        if state.st_size != claim.size:
            status = CUT if state.st_size < claim.size else CHANGED
            return FileFinding(status=status, detail=f"{state.st_size:,} bytes, the manifest says {claim.size:,}")
        stamp = stamp_of(state)
        if known == {"stamp": stamp, "sha256": claim.sha256}:
            return FileFinding(status=WHOLE, detail="", stamp=stamp)
        settled = time.time_ns() - state.st_ctime_ns > _SETTLED_NS
        with claim.path.open("rb", buffering=0) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != claim.sha256:
                return FileFinding(status=CHANGED, detail="its sha256 is not the manifest's")
            settled = settled and stamp_of(os.fstat(file.fileno())) == stamp
        return FileFinding(status=WHOLE, detail="", stamp=stamp if settled else None)
    except FileNotFoundError:
        return FileFinding(status=MISSING, detail="no such file")
    except OSError as error:
        return FileFinding(status=MISSING, detail=f"cannot be read ({error.strerror})")


def examine_all(claims: list[FileClaim], known: dict[str, object] | None = None) -> Iterator[FileFinding]:
    """`examine` in parallel threads, since hashing lets go of the interpreter's lock; findings in the claims' order."""
    known = known or {}
    with ThreadPoolExecutor(max_workers=min(16, available_cores())) as pool:
        yield from pool.map(lambda claim: examine(claim, known.get(str(claim.path.absolute()))), claims)


def check_files(claims: list[FileClaim], *, record: Path | None, progress: Progress | None = None) -> None:
    """Raises `UserError` naming the first file that is not as claimed, and how many more there are.

    ``record``: see `ShardSet.check` of data/shards.py; one that is missing or damaged is made anew, one that cannot be
    written is done without. ``progress(done, total)`` counts bytes.
    """
    known = _load_record(record) if record is not None else {}
    total, done = sum(claim.size for claim in claims), 0
    verified: dict[str, object] = {}
    damaged: list[tuple[FileClaim, FileFinding]] = []
    for claim, finding in zip(claims, examine_all(claims, known), strict=True):
        if finding.status != WHOLE:
            damaged.append((claim, finding))
        elif finding.stamp is not None:
            verified[str(claim.path.absolute())] = {"stamp": finding.stamp, "sha256": claim.sha256}
        done += claim.size
        if progress is not None:
            progress(done, total)
    if damaged:
        claim, finding = damaged[0]
        more = f" ({len(damaged) - 1} more files are damaged)" if len(damaged) > 1 else ""
        raise UserError(f"{claim.path}: {finding.status}: {finding.detail}{more}: {AGAIN}")
    if record is not None and any(known.get(path) != entry for path, entry in verified.items()):
        _save_record(record, {**known, **verified})


def stamp_of(state: os.stat_result) -> list[int]:
    """What tells that a file has not changed: size, mtime, ctime and inode; a list, as JSON gives it back."""
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _load_record(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _save_record(path: Path, entries: dict[str, object]) -> None:
    # The record only saves time: where it cannot stand, the next launch hashes again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(entries).encode())
