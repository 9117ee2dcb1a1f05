"""Files under names: a folder, a tar and a zip with one interface.

Nothing is unpacked to disk. An archive is checked when it is opened: paths that leave it, links, devices, duplicate
names, oversized members, encrypted members, a truncated or damaged tar, and archives that expand without bound are
refused with the name of the member.
"""

import bz2
import gzip
import lzma
import re
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, cast

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.errors import UserError, escape_control

# Size of the largest image or label file that is read.
MAX_FILE_BYTES = 64 << 20
_MAX_EXPANSION = 100  # largest accepted ratio of unpacked to packed bytes; image sets stay below 10
_FREE_BYTES = 64 << 20  # unpacked bytes that are accepted at any ratio
_LITTER = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini")


@dataclass(repr=False)
class Tree(ABC):
    """Files under names with `/` between their parts; the top folder has the empty name."""

    path: Path
    kind: ClassVar[str]
    """`folder`, `tar` or `zip`."""

    @abstractmethod
    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files directly in one folder, sorted.

        ``folder`` may end in a slash. Files of the operating system are left out. A folder that is missing is empty.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read one file. Raises `UserError` if it is damaged or larger than `MAX_FILE_BYTES`."""

    def in_order(self, names: Collection[str]) -> Collection[str]:
        """Return ``names`` in the order that is cheapest to read."""
        return names

    def origin(self, name: str) -> str:
        """Return how messages name one file of the tree."""
        return escape_control(f"{self.path}/{name}".replace("//", "/"))


@dataclass(repr=False)
class Folder(Tree):
    """A folder on disk, listed on demand; links in it are followed."""

    kind = "folder"

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        place = self.path / folder
        with explain_decode_errors(place, "a folder"):
            entries = sorted(place.iterdir()) if place.is_dir() else []
            folders = [entry.name for entry in entries if entry.is_dir()]
        return folders, [
            entry.name for entry in entries if not (entry.name in folders or _LITTER.fullmatch(entry.name))
        ]

    def read(self, name: str) -> bytes:
        file = self.path / name
        with explain_decode_errors(file, "a file"):
            if not file.is_file():
                raise UserError(f"{file}: missing or not a regular file; put a copy of the file there")
            check_size(str(file), file.stat().st_size)
            return file.read_bytes()


@dataclass(repr=False)
class Archive(Tree):
    """A tar or zip, with an index of its members that is made and checked when it is opened."""

    _members: dict[str, Any] = field(default_factory=dict, init=False)
    _folders: dict[str, tuple[set[str], list[str]]] = field(default_factory=dict, init=False)

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        folders, files = self._folders.get(folder.rstrip("/"), ((), ()))
        return sorted(folders), sorted(files)

    def in_order(self, names: Collection[str]) -> Collection[str]:
        return [name for name in self._members if name in names]

    def _add(self, name: str, size: int, member: object, problem: str | None) -> None:
        """Enter one file into the index. Raises `UserError` for a ``problem``, its name or its size."""
        origin = self.origin(name)
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            problem = "a path outside of the archive"
        if problem is not None:
            raise UserError(f"{origin}: {problem}; accepted are regular files below the archive's top")
        parts = [part for part in parts if part not in ("", ".")]
        if not parts or _LITTER.fullmatch(parts[-1]) or parts[0] == "__MACOSX":
            return
        check_size(origin, size)
        name = "/".join(parts)
        if name in self._members:
            raise UserError(f"{origin}: duplicate name in the archive; remove one of the two")
        self._members[name] = member
        self._folders.setdefault("/".join(parts[:-1]), (set(), []))[1].append(parts[-1])
        for depth, part in enumerate(parts[:-1]):
            self._folders.setdefault("/".join(parts[:depth]), (set(), []))[0].add(part)


@dataclass(repr=False)
class Zip(Archive):
    kind = "zip"

    def __post_init__(self) -> None:
        with explain_decode_errors(self.path, "a complete zip"):
            self._zip = zipfile.ZipFile(self.path)
            members = self._zip.infolist()
            check_expansion(str(self.path), self.path.stat().st_size, sum(info.file_size for info in members))
            for info in members:
                link = "a link" if stat.S_ISLNK(info.external_attr >> 16) else None
                if not info.is_dir():
                    self._add(info.filename, info.file_size, info, "encrypted" if info.flag_bits & 1 else link)

    def read(self, name: str) -> bytes:
        with explain_decode_errors(self.origin(name), "compressed as expected"):
            return self._zip.read(self._members[name])


@dataclass(repr=False)
class Tar(Archive):
    """A tar, compressed or not, whose members are read by their offsets."""

    kind = "tar"

    def __post_init__(self) -> None:
        with explain_decode_errors(self.path, "a complete tar"):
            self._stream = Decompressed(self.path)
            with tarfile.open(fileobj=cast(IO[bytes], self._stream), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
                    problem = None if member.isreg() and not member.issparse() else "a link or device"
                    if not member.isdir():
                        self._add(member.name, member.size, (member.offset_data, member.size), problem)
            # tarfile ends without an error at a damaged header and between two members: only zeros may follow.
            self._stream.seek(tar.offset)
            are_zero = [not block.strip(b"\0") for block in iter(lambda: self._stream.read(1 << 20), b"")]
            if not are_zero or not all(are_zero):
                problem = "damaged: data follow its" if are_zero else "truncated: it has no"
                raise UserError(f"{self.path}: {problem} end mark; download it again")

    def read(self, name: str) -> bytes:
        offset, size = self._members[name]
        with explain_decode_errors(self.origin(name), "compressed as expected"):
            self._stream.seek(offset)
            return self._stream.read(size)


# By the first bytes of a compressed file.
_OPENERS: Mapping[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": cast(Callable[[Path], IO[bytes]], gzip.open),
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


class Decompressed:
    """A file for reading, decompressed if it is gzip, bzip2 or xz by its first bytes; bounded by `max_unpacked`."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(6)
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
        self._file = path.open("rb") if opener is None else opener(path)
        self._path, self._packed = path, path.stat().st_size
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes, or all. Raises `UserError` beyond the bound."""
        rest = max(0, max_unpacked(self._packed) + 1 - self.tell())
        data = self._file.read(rest if size < 0 else min(size, rest))
        check_expansion(str(self._path), self._packed, self.tell())
        return data


def check_size(origin: str, size: int) -> None:
    """Raise `UserError` if a file is too large to be read."""
    if size > MAX_FILE_BYTES:
        raise UserError(f"{origin}: {size:,} bytes; accepted are at most {MAX_FILE_BYTES >> 20} MiB")


def max_unpacked(packed: int) -> int:
    """Return how many bytes ``packed`` bytes may unpack to; more is a decompression bomb."""
    return packed * _MAX_EXPANSION + _FREE_BYTES


def check_expansion(origin: str, packed: int, unpacked: int) -> None:
    """Raise `UserError` for a decompression bomb."""
    if unpacked > max_unpacked(packed):
        raise UserError(f"{origin}: unpacks to more than {_MAX_EXPANSION} times its size; refused")
