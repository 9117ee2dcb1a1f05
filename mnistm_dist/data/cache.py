"""The cache folder: decoded and fetched sets, once per node, and who may write there.

::

    CACHE/sets/<identity>/checked.json             which files were found intact: shards, and decoded splits
    CACHE/sets/<identity>/train.u8                 a decoded split
    CACHE/fetched/<address>/...                    a packed set from a server
    CACHE/downloads/<copy>/...                     a set to pack, or MNIST, from a public server
    CACHE/locks/...                                a lock file for each of them

Processes and jobs wait for one another at a lock file, never in a collective operation: no collective times out,
however long one of them decodes.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors, file_lock, local_path

CACHE_VARIABLE = "MNISTM_DIST_CACHE"  # the environment variable that names the cache folder
_ELSEWHERE = f"name another folder with --cache-dir or ${CACHE_VARIABLE}"


def choose_cache_dir(named: str | Path | None) -> Path:
    """Return the cache folder: ``named`` if given.

    Otherwise ``$MNISTM_DIST_CACHE``; in a Slurm job, or without a home, a node-local folder (below
    ``$SLURM_TMPDIR``, ``$TMPDIR`` or ``/tmp``); else ``$XDG_CACHE_HOME/mnistm_dist`` or ``~/.cache/mnistm_dist``.
    """
    if named := named or os.environ.get(CACHE_VARIABLE):
        return Path(local_path(str(named)))
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    if "SLURM_JOB_ID" in os.environ or user_cache.startswith("~"):
        local = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
        return Path(local) / f"mnistm_dist-{os.getuid()}"
    return Path(user_cache) / "mnistm_dist"


@contextmanager
def cache_entry(cache_dir: Path, kind: str, name: str) -> Iterator[Path]:
    """Hold the lock of an entry among all processes of the node, and yield its folder.

    Raises `UserError` if the cache folder cannot be written or a stranger could have planted files in it.
    """
    folder, locks = cache_dir / kind / name, cache_dir / "locks"
    with ExitStack() as stack:
        with cache_errors(folder):
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = cache_dir.stat()
            if state.st_uid != os.getuid() and state.st_mode & stat.S_IWOTH:
                raise UserError(f"{cache_dir}: belongs to another user and anyone may write there; {_ELSEWHERE}")
            locks.mkdir(exist_ok=True)
            stack.enter_context(file_lock(locks / f"{kind}-{name}"))
            folder.mkdir(parents=True, exist_ok=True)
        yield folder


@contextmanager
def cache_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError` that names ``path`` and the ``need``: bytes that it will write.

    Raises `UserError` at once if the disk has less free; then the folder of ``path`` must exist.
    """
    needed = f"{need / 1e6:,.0f} MB are needed: " if need else ""
    with explain_os_errors(path, advice=f"{needed}free some space or {_ELSEWHERE}"):
        if need and shutil.disk_usage(path.parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
