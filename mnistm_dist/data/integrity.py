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
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mnistm_dist.data.manifest import SetFile, Sha256
from mnistm_dist.data.parallel import Progress, available_cores, thread_pool
from mnistm_dist.errors import os_error_reason
from mnistm_dist.files import write_atomic

# Status of a file: as claimed, shorter than claimed, other bytes than claimed, not there.
OK, TRUNCATED, CHANGED, MISSING = "ok", "truncated", "changed", "missing"
# Status of a tar or index that the manifest does not list: a reader that takes all tars would take it too.
EXTRA = "extra"

# Absolute path -> stamp and sha256 of the file when it was last found to be as claimed.
Record = dict[str, tuple[list[int], Sha256]]
# A file changed less than this before its check is not recorded: another change within the same tick of the clock
# would leave the same times.
_MIN_AGE_NS = 100_000_000


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
    with thread_pool(min(16, available_cores()), "hash") as pool:
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
