"""Packed shards: random access to the samples of a set of WebDataset tars, and the check that its files are intact.

A set is a folder with ``manifest.json`` and, per split, its tars and its index (``train.index.npy``). A sample's id is
its place in storage order within its split: shards in the manifest's order, samples in their order within the shard.
Everything downstream uses that id. ``data/packing`` writes such a folder; ``shards/README.md`` documents it.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from mnistm_dist.data.integrity import FileClaim, find_damaged
from mnistm_dist.data.manifest import MANIFEST_NAME, REPAIR, Manifest, SetFile, Split, open_index, parse
from mnistm_dist.data.progress import Progress
from mnistm_dist.errors import UserError, os_error_reason


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
    """Whether each has the header of an 8-bit RGB PNG of the set's image size, not interlaced, bool (n,)."""

    def png(self, place: int) -> bytes:
        """Return the PNG of the sample ``ids[place]``."""
        start = int(self.offsets[place])
        return self.data[start : start + int(self.sizes[place])].tobytes()


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A packed set in a local folder, which may be read-only. Holds no open file, so it can be pickled and forked."""

    root: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> "ShardSet":
        """Read and validate the manifest of the set in the folder ``path``; no shard is opened. Raises `UserError`."""
        root = Path(path)
        where = root / MANIFEST_NAME
        try:
            if where.is_file():
                return ShardSet(root=root, manifest=parse(where.read_bytes(), str(where)))
            found = "a file" if root.is_file() else f"no {MANIFEST_NAME} in it" if root.exists() else "no such folder"
        except OSError as error:
            found = f"cannot be read ({os_error_reason(error)})"
        raise UserError(f"{root}: {found}; python -m mnistm_dist.pack SOURCE --out DIR makes a packed set")

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
        return [key.decode("ascii", "backslashreplace") for key in self.index(split)["key"][_as_ids(ids)].tolist()]

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
        unique, places = np.unique(_as_ids(ids), return_inverse=True)
        block = self.read_block(split, unique, self.index(split))
        return list(map(block.png, places.tolist()))

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
            with self._opened(entry.shards[shard]) as descriptor:
                if verify is not None:
                    verify(shard, descriptor)
                for _, offset, start, length in shard_spans:
                    _read_into(descriptor, data[start : start + length].data, offset)
        in_data = offsets + np.repeat(starts - offsets[firsts], np.diff(edges))
        plain = _has_header(data, in_data, self.manifest.image_size)
        return Block(ids=ids, data=data, offsets=in_data, sizes=sizes, plain=plain)

    @contextmanager
    def _opened(self, shard: SetFile) -> Iterator[int]:
        """Yield the descriptor of a shard. An `OSError` of the block becomes a `UserError` that names the shard."""
        path = self.root / shard.name
        try:
            # O_NONBLOCK: do not hang at a pipe. It has no effect on a regular file.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                size = os.fstat(descriptor).st_size
                if size != shard.size:
                    raise UserError(f"{path}: {size:,} bytes instead of {shard.size:,}; {REPAIR}")
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({os_error_reason(error)}); {REPAIR}") from error

    def files(self, splits: Iterable[str]) -> list[FileClaim]:
        """Return what the manifest claims of each file of the splits: per split the index, then the shards in order."""
        listed = [file for split in map(self.split, splits) for file in (split.index, *split.shards)]
        return [FileClaim(path=self.root / file.name, size=file.size, sha256=file.sha256) for file in listed]

    def check(self, splits: Iterable[str], *, record: Path | None, progress: Progress | None = None) -> None:
        """Check that every file of the splits is what the manifest says: see `find_damaged`.

        ``record`` is a JSON file of earlier checks; None hashes everything. ``progress(done, total)`` counts bytes.
        Raises `UserError` naming the first file that is missing, truncated or changed.
        """
        damaged = list(find_damaged(self.files(splits), record=record, progress=progress))
        if damaged:
            claim, finding = damaged[0]
            others = f" ({len(damaged) - 1} more files are damaged)" if len(damaged) > 1 else ""
            raise UserError(f"{claim.path}: {finding.status}: {finding.detail}{others}; {REPAIR}")

    def bad_index(self, split: str, what: str) -> UserError:
        """Return the error that the split's index is damaged."""
        return UserError(f"{self.root / self.split(split).index.name}: {what}; {REPAIR}")


def _as_ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def _has_header(data: np.ndarray, offsets: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return whether a PNG of 8-bit RGB, not interlaced, of that (height, width) starts at each offset."""
    height, width = image_size
    # Signature and IHDR, PNG specification (third edition), 5.2 and 11.2.1.
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    # The last PNGs of a damaged set may end before their header does.
    places = np.minimum(offsets[:, None] + np.arange(len(header)), len(data) - 1)
    return (data[places] == np.frombuffer(header, dtype=np.uint8)).all(axis=1)


def _read_into(descriptor: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise OSError("truncated while it was read")
        done += count
