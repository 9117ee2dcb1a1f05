"""Packed shards: random access to the samples of a set of WebDataset tars, and the check that its files are intact.

A set is a folder with ``manifest.json`` and, per split, its tars and its index (``train.index.npy``). A sample's id is
its place in storage order within its split: shards in the manifest's order, samples in their order within the shard.
Everything downstream uses that id. ``data/packing`` writes such a folder; ``shards/README.md`` documents it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.integrity import OK, examine_all
from mnistm_dist.data.manifest import MANIFEST_NAME, REPAIR, Manifest, SetFile, Split, open_index, parse
from mnistm_dist.data.parallel import Progress
from mnistm_dist.errors import UserError
from mnistm_dist.files import explain_os_errors


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


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A packed set in a local folder, which may be read-only. Holds no open file, so it can be pickled and forked."""

    root: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> "ShardSet":
        """Read and validate the manifest of the set in the folder ``path``; no shard is opened. Raises `UserError`."""
        root = Path(path)
        where, advice = root / MANIFEST_NAME, "python -m mnistm_dist.pack SOURCE --out DIR makes a packed set"
        with explain_os_errors(root, verb="read", advice=advice):
            if where.is_file():
                return ShardSet(root=root, manifest=parse(where.read_bytes(), str(where)))
            found = "a file" if root.is_file() else f"no {MANIFEST_NAME} in it" if root.exists() else "no such folder"
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
        return Block(ids=ids, data=data, offsets=in_data, sizes=sizes)

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


def _as_ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)
