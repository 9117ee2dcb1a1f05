"""Packed sets on a server: fetched once per node into the cache, each file checked against the manifest.

1. The manifest is asked for at every launch; where the server cannot be reached, that of an earlier fetch serves.
2. Files that are there and whole stay; the others are fetched by several threads (transfer.py).
3. A file gets its name when its size and sha256 are the manifest's, and ``manifest.json`` comes last.
"""

from __future__ import annotations

import hashlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mnistm_dist.data.cache import cache_failures, entry_lock, make_entry, make_room, write_whole
from mnistm_dist.data.manifest import MANIFEST_NAME, Manifest, parse
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.telling import Progress
from mnistm_dist.data.transfer import SCHEMES, Cut, RemoteFile, Server, download, read_small, split_address
from mnistm_dist.data.wholeness import WHOLE, FileClaim, examine
from mnistm_dist.errors import UserError

_MANIFEST_LIMIT = 256 << 20
"""Bytes: no manifest is larger, and a server that sends for ever is stopped."""
_CONNECTIONS = 8


def is_address(shards: str) -> bool:
    """Whether ``shards`` is meant as an address, not as a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", shards) is not None and not Path(shards).exists()


def fetch(address: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Brings the packed set at ``address`` into the cache, once per node, and gives its folder there.

    ``progress(done, total)`` counts bytes. Raises `UserError` in one line that names the file: an address of
    another kind, no manifest there, a server that cannot be reached or sends something else than the manifest
    says, a full disk.
    """
    parts = split_address(address)
    if parts is None:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise UserError(f"{address}: shards are not read from there; accepted are a folder and addresses of {known}")
    if parts.query or parts.fragment or parts.password is not None:
        raise UserError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a plain address is needed, without password, ? and #"
        )
    base = address.rstrip("/")
    name = hashlib.sha256(base.encode()).hexdigest()[:16]
    with entry_lock(cache_dir, "fetched", name):
        folder = make_entry(cache_dir, "fetched", name, {"source": base})
        server = Server(parts.scheme)
        data, manifest = _fetch_manifest(server, base, folder)
        shards = ShardSet(root=folder, manifest=manifest)
        claims = shards.files(manifest.splits)
        try:
            shards.check(manifest.splits, record=folder / "checked.json")
        except UserError:
            # Not whole yet. What is there is hashed, and fetched again where it is damaged.
            missing = [claim for claim in claims if examine(claim).status != WHOLE]
            make_room(folder, sum(claim.size for claim in missing))
            _fetch_files(server, base, missing, sum(claim.size for claim in claims), progress)
        with cache_failures(folder):
            write_whole(folder / MANIFEST_NAME, data)
    return folder


def _fetch_manifest(server: Server, base: str, folder: Path) -> tuple[bytes, Manifest]:
    address = f"{base}/{MANIFEST_NAME}"
    earlier = folder / MANIFEST_NAME
    try:
        data = read_small(server, address, _MANIFEST_LIMIT)
    except Cut as cut:
        if not earlier.exists():
            raise UserError(f"{address}: the server cannot be reached ({cut})") from cut
        with cache_failures(earlier):
            data = earlier.read_bytes()
    return data, parse(data, address)


def _fetch_files(server: Server, base: str, missing: list[FileClaim], total: int, progress: Progress | None) -> None:
    done = total - sum(claim.size for claim in missing)
    lock, stop = threading.Lock(), threading.Event()

    def tell(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    tell(0)
    with ThreadPoolExecutor(max_workers=_CONNECTIONS, thread_name_prefix="fetch") as pool:
        tasks = []
        for claim in missing:
            address, checksum = f"{base}/{claim.path.name}", ("sha256", claim.sha256)
            file = RemoteFile(address=address, size=claim.size, checksum=checksum)
            tasks.append(pool.submit(download, server, file, claim.path, tell, stop))
        try:
            for task in as_completed(tasks):
                task.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
