"""Packed shards, opened: random access to any sample of a set of WebDataset tars, and the check that they are whole.

A set is a folder with ``manifest.json``, per split its tars and its index (``train.index.npy``). A sample's id is its
place in storage order within its split: shards in the manifest's order, samples in their order within the shard.
Everything downstream uses that id. ``data/packing.py`` writes such a folder; ``shards/README.md`` documents it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnistm_dist.data.index import open_index
from mnistm_dist.data.integrity import FileClaim, check_files
from mnistm_dist.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, parse
from mnistm_dist.data.progress import AGAIN, Progress
from mnistm_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A packed set in a local folder, which may be read-only. Holds no open file, so it may be pickled and forked."""

    root: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> ShardSet:
        """Reads and validates the manifest of the set in the folder ``path``; touches no shard.

        Raises `UserError`: no such folder, no manifest in it, or not one that `parse` of data/manifest.py accepts.
        """
        root = Path(path)
        where = root / MANIFEST_NAME
        try:
            if where.is_file():
                return ShardSet(root=root, manifest=parse(where.read_bytes(), str(where)))
            found = "a file" if root.is_file() else f"no {MANIFEST_NAME} in it" if root.exists() else "no such folder"
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        raise UserError(
            f"{root}: {found}; a packed set is a folder that python -m mnistm_dist.pack SOURCE --out DIR makes"
        )

    def split(self, name: str) -> Split:
        """The split of that name. Raises `UserError` where the set has none."""
        if name not in self.manifest.splits:
            raise UserError(
                f"{self.root}: no {name} split; it has {', '.join(self.manifest.splits)}: choose one of these"
            )
        return self.manifest.splits[name]

    def index(self, split: str) -> np.ndarray:
        """The split's index in storage order, mapped read-only: one row of `index_dtype` per sample, shape (count,).

        Raises `UserError` if the file is missing, not of the manifest's size, or no such array. `check` verifies its
        hash.
        """
        entry = self.split(split)
        return open_index(self.root / entry.index_name, count=entry.count, size=entry.index_size)

    def keys(self, split: str, ids: Iterable[int] | np.ndarray) -> list[str]:
        """The keys of the samples ``ids``, in the given order.

        Raises `UserError` for a key that is no ASCII, `IndexError` for an id that is none.
        """
        keys = self.index(split)["key"][_as_ids(ids, self.split(split))].tolist()
        try:
            return [key.decode("ascii") for key in keys]
        except UnicodeDecodeError:
            where = self.root / self.split(split).index_name
            raise UserError(f"{where}: it holds keys that are no ASCII: {AGAIN}") from None

    def labels(self, split: str) -> np.ndarray:
        """The label of every sample in storage order: int64 (count,).

        Raises `UserError` for a label that is no class.
        """
        labels = self.index(split)["label"].astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(self.manifest.classes):
            raise UserError(f"{self.root / self.split(split).index_name}: it holds labels that are no class: {AGAIN}")
        return labels

    def shard_starts(self, split: str) -> np.ndarray:
        """The id of each shard's first sample, and at the end the split's count: int64 (shards + 1,)."""
        counts = [shard.count for shard in self.split(split).shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def read(self, split: str, ids: Iterable[int] | np.ndarray) -> list[bytes]:
        """The PNG bytes of the samples ``ids``, in the given order; each shard among them is opened once.

        Raises `UserError` naming the shard if it is missing or not of the manifest's size, `IndexError` for an id that
        is none.
        """
        entry = self.split(split)
        wanted = _as_ids(ids, entry)
        rows = self.index(split)[wanted]
        shard_of = np.searchsorted(self.shard_starts(split), wanted, side="right") - 1
        found: list[bytes] = [b""] * len(wanted)
        for number in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == number)
            spans = zip(rows["offset"][places].tolist(), rows["size"][places].tolist(), strict=True)
            for place, data in zip(places.tolist(), _read_spans(self.root, entry.shards[number], spans), strict=True):
                found[place] = data
        return found

    def files(self, splits: Iterable[str]) -> list[FileClaim]:
        """What the manifest claims of each file of the splits: the index first, then the shards in order."""
        claims = []
        for split in map(self.split, splits):
            claims.append(
                FileClaim(path=self.root / split.index_name, size=split.index_size, sha256=split.index_sha256)
            )
            claims += [FileClaim(path=self.root / s.name, size=s.size, sha256=s.sha256) for s in split.shards]
        return claims

    def check(self, splits: Iterable[str], *, record: Path | None, progress: Progress | None = None) -> None:
        """Makes sure that every file of the splits is what the manifest says: stats all, hashes again what needs it.

        ``record`` is a JSON file of what was verified earlier, made or brought up to date; a file that has not changed
        since is not hashed again. None hashes everything. ``progress(done, total)`` counts bytes. Raises `UserError`
        naming the first file that is missing, cut or changed.
        """
        check_files(self.files(splits), record=record, progress=progress)


def _as_ids(ids: Iterable[int] | np.ndarray, split: Split) -> np.ndarray:
    wanted = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= split.count):
        raise IndexError(f"ids of {split.name} are 0 to {split.count - 1}")
    return wanted


def _read_spans(root: Path, shard: Shard, spans: Iterable[tuple[int, int]]) -> list[bytes]:
    path, found = root / shard.name, []
    with opened_shard(path) as descriptor:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_size != shard.size:
            raise UserError(f"{path}: {state.st_size:,} bytes, the manifest says {shard.size:,}: {AGAIN}")
        for offset, size in spans:
            if not 0 <= offset <= offset + size <= shard.size:
                raise UserError(f"{path}: the index points outside of it: {AGAIN}")
            data = os.pread(descriptor, size, offset)
            if len(data) != size:
                raise UserError(f"{path}: cut short while it was read: {AGAIN}")
            found.append(data)
    return found


@contextmanager
def opened_shard(path: Path) -> Iterator[int]:
    """Gives the descriptor of a shard. What the system says against it, in the block too, is a `UserError` that names
    it."""
    try:
        # O_NONBLOCK: a pipe in a shard's place must not hang us; it changes nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing: {AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from error
