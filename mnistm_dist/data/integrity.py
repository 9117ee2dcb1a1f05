"""Check that files are what a manifest claims: their size, and their sha256 unless it is already known.

A record of earlier checks saves hashing what has not changed. It trusts a file whose size, mtime, ctime and inode are
as recorded; ctime also reveals a change by someone who restored mtime.
"""

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mnistm_dist.data.parallel import available_cores, thread_pool
from mnistm_dist.data.progress import Progress
from mnistm_dist.errors import os_error_reason
from mnistm_dist.files import write_atomic

# Status of a file: as claimed, shorter than claimed, other bytes than claimed, not there.
OK, TRUNCATED, CHANGED, MISSING = "ok", "truncated", "changed", "missing"
# Status of a tar or index that the manifest does not list: a reader that takes all tars would take it too.
EXTRA = "extra"

# Absolute path -> stamp and sha256 of the file when it was last found to be as claimed.
Record = dict[str, tuple[list[int], str]]
# A file changed less than this before its check is not recorded: another change within the same tick of the clock
# would leave the same times.
_MIN_AGE_NS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class FileClaim:
    """A file, with the size and hash that a manifest claims."""

    path: Path
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of checking a file."""

    name: str
    """File name."""
    status: str = OK
    """`OK`, `TRUNCATED`, `CHANGED`, `MISSING` or `EXTRA`."""
    detail: str = ""
    """The reason, unless it is ok."""
    stamp: list[int] | None = None
    """`stamp_of` the file if it is ok and old enough to be recorded."""


def examine(claim: FileClaim, known: tuple[list[int], str] | None = None) -> Finding:
    """Check one file. It is hashed unless ``known``, its entry of a record, still applies."""
    finding = partial(Finding, name=claim.path.name)
    try:
        state = claim.path.stat()
        if not stat.S_ISREG(state.st_mode):
            return finding(status=MISSING, detail="not a regular file")
        if state.st_size != claim.size:
            status = TRUNCATED if state.st_size < claim.size else CHANGED
            return finding(status=status, detail=f"{state.st_size:,} bytes instead of {claim.size:,}")
        stamp = stamp_of(state)
        if known == (stamp, claim.sha256):
            return finding(stamp=stamp)
        old_enough = time.time_ns() - state.st_ctime_ns > _MIN_AGE_NS
        with claim.path.open("rb", buffering=0) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != claim.sha256:
                return finding(status=CHANGED, detail="its sha256 is not that of the manifest")
            unchanged = stamp_of(os.fstat(file.fileno())) == stamp
        return finding(stamp=stamp if old_enough and unchanged else None)
    except OSError as error:
        return finding(status=MISSING, detail=os_error_reason(error))


def find_damaged(
    claims: list[FileClaim], *, record: Path | None = None, progress: Progress | None = None
) -> Iterator[tuple[FileClaim, Finding]]:
    """Check files in parallel threads and yield those that are not as claimed, in the order of the claims.

    ``record`` is a JSON file of earlier checks, updated when all files have been checked; a missing or damaged one is
    replaced, and one that cannot be written is ignored. ``progress(done, total)`` counts bytes.
    """
    known = load_record(record) if record is not None else {}
    verified: Record = {}
    total, done = sum(claim.size for claim in claims), 0
    with thread_pool(min(16, available_cores()), "hash") as pool:
        findings = pool.map(lambda claim: examine(claim, known.get(str(claim.path.absolute()))), claims)
        for claim, finding in zip(claims, findings, strict=True):
            if finding.status != OK:
                yield claim, finding
            elif finding.stamp is not None:
                verified[str(claim.path.absolute())] = (finding.stamp, claim.sha256)
            done += claim.size
            if progress is not None:
                progress(done, total)
    if record is not None and not verified.items() <= known.items():
        save_record(record, {**known, **verified})


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
