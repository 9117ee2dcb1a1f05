"""Files under names: a folder, a tar, a zip, and archives in a folder or archive, with one interface.

Images are read in place; a data file in an archive is unpacked to a temporary file when it is opened. An archive is
checked when it is opened: paths that leave it, links, devices, duplicate names, encrypted members, a truncated or
damaged tar, and archives that expand without bound are refused with the name of the member.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.base import split_of
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.files import explain_os_errors

# Size of the largest image or label file that is read.
MAX_FILE_BYTES = 64 << 20
_MAX_EXPANSION = 100  # largest accepted ratio of unpacked to packed bytes; image sets stay below 10
_FREE_BYTES = 64 << 20  # unpacked bytes that are accepted at any ratio
# Hidden files, and what operating systems and network disks leave among files.
_LITTER = re.compile(
    r"\..*|@eaDir|#recycle|__MACOSX|Thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information|lost\+found", re.I
)


@dataclass(repr=False)
class Tree(ABC):
    """Files under names with `/` between their parts."""

    path: Path
    name: str = ""
    """How messages name the tree; by default its path."""
    empty: list[str] = field(default_factory=list, init=False)
    """Folders without files, with a slash at the end."""

    @abstractmethod
    def files(self) -> list[str]:
        """Return the names of all files, sorted, without hidden ones and those of the operating system."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read one file. Raises `UserError` if it is damaged or larger than `MAX_FILE_BYTES`."""

    @abstractmethod
    def local(self, name: str) -> Path:
        """Return a file on disk with the bytes of one file; that of an archive lives as long as the tree."""

    def in_order(self, names: Collection[str]) -> Collection[str]:
        """Return ``names`` in the order that is cheapest to read."""
        return names

    def folders(self, name: str) -> list[str]:
        """Return the folders around one file that may say its split or class, outermost first."""
        return name.split("/")[:-1]

    def context(self, name: str) -> str:
        """Return the name of one file and the folders around it that may say its split."""
        return "/".join([*self.folders(name), name.rpartition("/")[2]])

    def origin(self, name: str) -> str:
        """Return how messages name one file of the tree."""
        return escape_control(f"{self.name or self.path}/{name}".replace("//", "/"))

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Close what can be opened again."""


@dataclass(repr=False)
class Folder(Tree):
    """A folder on disk; links in it are followed, each folder once."""

    def files(self) -> list[str]:
        with explain_decode_errors(self.path, "a folder"):
            return sorted(self._walk("", set()))

    def _walk(self, top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        status = (self.path / top).stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(self.path / top) as entries:
            kept = [entry for entry in entries if not _LITTER.fullmatch(entry.name)]
        if not kept:
            self.empty.append(top)
        for entry in kept:
            if entry.is_dir():
                yield from self._walk(f"{top}{entry.name}/", seen)
            else:
                yield f"{top}{entry.name}"

    def read(self, name: str) -> bytes:
        file = self.local(name)
        with explain_decode_errors(file, "a file"):
            check_size(str(file), file.stat().st_size)
            return file.read_bytes()

    def local(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise UserError(f"{file}: missing or not a regular file; put a copy of the file there")
        return file


@dataclass(repr=False)
class Archive(Tree):
    """A tar or zip, with an index of its members that is made and checked when it is opened."""

    _members: dict[str, tuple[int, Any]] = field(default_factory=dict, init=False)

    def files(self) -> list[str]:
        return sorted(self._members)

    def in_order(self, names: Collection[str]) -> Collection[str]:
        return [name for name in self._members if name in names]

    def read(self, name: str) -> bytes:
        check_size(self.origin(name), self._members[name][0])
        with explain_decode_errors(self.origin(name), "compressed as expected"), self._open(name) as file:
            return file.read()

    def local(self, name: str) -> Path:
        with explain_os_errors(tempfile.gettempdir(), advice="set $TMPDIR to another folder"):
            folder = tempfile.mkdtemp(prefix="mnistm_dist-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        file = Path(folder, name.rpartition("/")[2])
        advice = explain_decode_errors(self.origin(name), "compressed as expected")
        with advice, self._open(name) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return file

    @abstractmethod
    def _open(self, name: str) -> IO[bytes]:
        """Open one file for reading."""

    def _add(self, name: str, size: int, member: object, problem: str | None) -> None:
        """Enter one file into the index. Raises `UserError` for a ``problem`` or its name."""
        origin = self.origin(name)
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            problem = "a path outside of the archive"
        if problem is not None:
            raise UserError(f"{origin}: {problem}; accepted are regular files below the archive's top")
        parts = [part for part in parts if part not in ("", ".")]
        if not parts or any(map(_LITTER.fullmatch, parts)):
            return
        name = "/".join(parts)
        if name in self._members:
            raise UserError(f"{origin}: duplicate name in the archive; remove one of the two")
        self._members[name] = size, member


@dataclass(repr=False)
class Zip(Archive):
    def __post_init__(self) -> None:
        with explain_decode_errors(self.path, "a complete zip"):
            self._zip = zipfile.ZipFile(self.path)
            members = self._zip.infolist()
            unpacked = sum(info.file_size for info in members)
            check_expansion(self.name or str(self.path), self.path.stat().st_size, unpacked)
            for info in members:
                link = "a link" if stat.S_ISLNK(info.external_attr >> 16) else None
                if not info.is_dir():
                    self._add(info.filename, info.file_size, info, "encrypted" if info.flag_bits & 1 else link)

    def _open(self, name: str) -> IO[bytes]:
        return self._zip.open(self._members[name][1])


@dataclass(repr=False)
class Tar(Archive):
    """A tar, compressed or not, whose members are read by their offsets."""

    def __post_init__(self) -> None:
        where = self.name or self.path
        with explain_decode_errors(where, "a complete tar"):
            self._stream = Decompressed(self.path)
            with tarfile.open(fileobj=cast(IO[bytes], self._stream), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
                    problem = None if member.isreg() and not member.issparse() else "a link or device"
                    if not member.isdir():
                        self._add(member.name, member.size, member.offset_data, problem)
            # tarfile ends without an error at a damaged header and between two members: only zeros may follow.
            self._stream.seek(tar.offset)
            are_zero = [not block.strip(b"\0") for block in iter(lambda: self._stream.read(1 << 20), b"")]
            if not are_zero or not all(are_zero):
                problem = "damaged: data follow its" if are_zero else "truncated: it has no"
                raise UserError(f"{where}: {problem} end mark; download it again")
            self._is_open = True

    def _open(self, name: str) -> IO[bytes]:
        size, offset = self._members[name]
        if not self._is_open:
            self._stream, self._is_open = Decompressed(self.path), True
        self._stream.seek(offset)
        return cast(IO[bytes], _Member(self._stream, size))

    def close(self) -> None:
        self._stream.close()
        self._is_open = False


@dataclass
class _Member:
    """The next ``left`` bytes of a stream, as a file."""

    stream: "Decompressed"
    left: int

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data

    def __enter__(self) -> "_Member":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Mounted(Tree):
    """The files of archives of a tree, each under the name of its archive as of a folder."""

    def __init__(self, tree: Tree, archives: Collection[str]) -> None:
        super().__init__(tree.path, tree.name)
        self._archives = {name: open_archive(tree.local(name), tree.origin(name)) for name in archives}
        self._base, self._last = tree, tree

    def files(self) -> list[str]:
        return [f"{archive}/{name}" for archive, tree in self._archives.items() for name in tree.files()]

    def read(self, name: str) -> bytes:
        tree, name = self._find(name)
        return tree.read(name)

    def local(self, name: str) -> Path:
        tree, name = self._find(name)
        return tree.local(name)

    def in_order(self, names: Collection[str]) -> Collection[str]:
        inner: dict[str, set[str]] = {archive: set() for archive in self._archives}
        for archive, name in map(self._split, names):
            inner[archive].add(name)
        return [
            f"{archive}/{name}" for archive, tree in self._archives.items() for name in tree.in_order(inner[archive])
        ]

    def folders(self, name: str) -> list[str]:
        """As in every tree; the name of an archive counts if it names a split."""
        archive, inner = self._split(name)
        stem = archive.rpartition("/")[2].partition(".")[0]
        return [stem] * (split_of(stem) is not None) + inner.split("/")[:-1]

    def _split(self, name: str) -> tuple[str, str]:
        at = next(place for place, letter in enumerate(name) if letter == "/" and name[:place] in self._archives)
        return name[:at], name[at + 1 :]

    def _find(self, name: str) -> tuple[Tree, str]:
        archive, inner = self._split(name)
        if self._last is not self._archives[archive]:
            self._last.close()  # a set may have more archives than a process may have open files
            self._last = self._archives[archive]
        return self._last, inner


def open_archive(path: Path, name: str = "") -> Archive:
    """Open a tar or zip, whatever its name. Raises `UserError` if it is neither."""
    with explain_decode_errors(name or path, "an archive"), path.open("rb") as file:
        is_zip = file.read(4) in _ZIP
    return Zip(path, name) if is_zip else Tar(path, name)


_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the first bytes of a zip, and of an empty one
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
        self.seek, self.tell, self.close = self._file.seek, self._file.tell, self._file.close

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
