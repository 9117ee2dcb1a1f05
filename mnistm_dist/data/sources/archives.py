"""Files under names: those of a folder, a tar, a zip, and archives in a folder or archive, with one interface.

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
from bisect import bisect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from mnistm_dist.data.image_io import explain_decode_errors
from mnistm_dist.data.sources.base import split_of
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.files import GIT_LFS_START, explain_os_errors, refuse_pointer

# Size of the largest image or label file that is read.
MAX_FILE_BYTES = 64 << 20
_MAX_EXPANSION = 100  # largest accepted ratio of unpacked to packed bytes; image sets stay below 10
_FREE_BYTES = 64 << 20  # unpacked bytes that are accepted at any ratio
# Hidden files, and what operating systems and network disks leave among files.
_LITTER = re.compile(
    r"\..*|@eaDir|#recycle|__MACOSX|Thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information|lost\+found", re.I
)


# A member of an archive: name, whether it is a folder, bytes, place, and why it is refused.
_Member = tuple[str, bool, int, Any, str | None]


@dataclass(repr=False)
class Archive:
    """A tar, compressed or not, or a zip, with an index of its members that is made and checked when it is opened."""

    path: Path
    name: str
    """How messages name it."""
    files: dict[str, tuple[int, Any]] = field(default_factory=dict, init=False)
    """Size of each member and its place, in the order in which they are stored."""
    folders: list[str] = field(default_factory=list, init=False)
    """Folders that have an entry of their own, with a slash at the end."""
    _handle: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        with explain_decode_errors(self.name, "an archive"), self.path.open("rb") as file:
            self._is_zip = file.read(4) in ZIP_STARTS
        with explain_decode_errors(self.name, f"a complete {'zip' if self._is_zip else 'tar'}"):
            for member in self._list_zip() if self._is_zip else self._list_tar():
                self._add(*member)

    def _list_zip(self) -> Iterator[_Member]:
        with zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        check_expansion(self.name, self.path.stat().st_size, sum(info.file_size for info in members))
        for info in members:
            link = "a link" if stat.S_ISLNK(info.external_attr >> 16) else None
            problem = "encrypted" if info.flag_bits & 1 else link
            yield info.filename, info.is_dir(), info.file_size, info, problem

    def _list_tar(self) -> Iterator[_Member]:
        stream = Decompressed(self.path)
        with closing(stream), tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
                problem = "a link or device" if member.issparse() or not (member.isreg() or member.isdir()) else None
                yield member.name, member.isdir(), member.size, member.offset_data, problem
            # tarfile ends without an error at a damaged header and between two members: only zeros may follow.
            stream.seek(tar.offset)
            are_zero = [not block.strip(b"\0") for block in iter(lambda: stream.read(1 << 20), b"")]
        if not are_zero or not all(are_zero):
            problem = "damaged: data follow its" if are_zero else "truncated: it has no"
            raise UserError(f"{self.name}: {problem} end mark; download it again")

    def _add(self, name: str, is_folder: bool, size: int, place: object, problem: str | None) -> None:
        """Enter one file or folder. Raises `UserError` for a ``problem`` or its name."""
        origin = escape_control(f"{self.name}/{name}")
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            problem = "a path outside of the archive"
        if problem is not None:
            raise UserError(f"{origin}: {problem}; accepted are regular files below the archive's top")
        parts = [part for part in parts if part not in ("", ".")]
        if not parts or any(map(_LITTER.fullmatch, parts)):
            return
        name = "/".join(parts)
        if is_folder:
            self.folders.append(f"{name}/")
        elif name in self.files:
            raise UserError(f"{origin}: duplicate name in the archive; remove one of the two")
        else:
            self.files[name] = size, place

    def open(self, name: str) -> IO[bytes]:
        """Open one member for reading; the archive stays open until `close`."""
        size, place = self.files[name]
        if self._is_zip:
            self._handle = self._handle or zipfile.ZipFile(self.path)
            return cast(IO[bytes], self._handle.open(place))
        self._handle = self._handle or tarfile.TarFile(fileobj=cast(IO[bytes], Decompressed(self.path)))
        member = tarfile.TarInfo()
        member.size, member.offset_data = size, place
        return cast(IO[bytes], self._handle.extractfile(member))

    def close(self) -> None:
        """Close what `open` opens again."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None


class Tree:
    """Files under names with `/` between their parts: those of a folder, and of archives as if they were folders."""

    def __init__(self, path: Path, only: Collection[str] | None = None) -> None:
        """List a folder at any depth, or take ``only`` these files in it."""
        self.path = path
        self._folders: list[str] = []
        self._files: dict[str, tuple[Archive | None, str]] = {}
        """Archive of each file, and its name there; in the order that is cheapest to read."""
        with explain_decode_errors(path, "a folder"):
            for name in sorted(self._walk("", set())) if only is None else only:
                self._files[name] = None, name
        self._local: dict[str, Path] = {}
        self._last: Archive | None = None

    def _walk(self, top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        """Yield the files at any depth; links are followed, each folder once."""
        status = (self.path / top).stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(self.path / top) as entries:
            kept = [entry for entry in entries if not _LITTER.fullmatch(entry.name)]
        for entry in kept:
            if entry.is_dir():
                self._folders.append(f"{top}{entry.name}/")
                yield from self._walk(f"{top}{entry.name}/", seen)
            else:
                yield f"{top}{entry.name}"

    def mount(self, archives: Collection[str]) -> None:
        """Put the files of archives in their place, each under the name of its archive as of a folder."""
        for name in archives:
            archive = Archive(self.local(name), self.origin(name))
            del self._files[name]
            self._files |= {f"{name}/{inner}": (archive, inner) for inner in archive.files}
            self._folders += [f"{name}/{folder}" for folder in archive.folders]

    def files(self) -> list[str]:
        """Return the names of all files, sorted, without hidden ones and those of the operating system."""
        return sorted(self._files)

    def empty_folders(self) -> list[str]:
        """Return the folders without files, with a slash at the end."""
        names = [*self.files(), "\U0010ffff"]
        return sorted(name for name in self._folders if not names[bisect(names, name)].startswith(name))

    def in_order(self, names: Collection[str]) -> list[str]:
        """Return ``names`` in the order that is cheapest to read."""
        return [name for name in self._files if name in names]

    def folders(self, name: str) -> list[str]:
        """Return the folders around one file that may say its split or class, outermost first.

        The name of an archive and the folders around it are among them if they name a split.
        """
        inner = self._files[name][1]
        outer = [part.partition(".")[0] for part in name[: len(name) - len(inner)].split("/")[:-1]]
        return [*filter(split_of, outer), *inner.split("/")[:-1]]

    def context(self, name: str) -> str:
        """Return the name of one file and the folders around it that may say its split."""
        return "/".join([*self.folders(name), name.rpartition("/")[2]])

    def origin(self, name: str) -> str:
        """Return how messages name one file of the tree."""
        return escape_control(f"{self.path}/{name}".replace("//", "/"))

    def read(self, name: str) -> bytes:
        """Read one file. Raises `UserError` if it is damaged or larger than `MAX_FILE_BYTES`."""
        origin = self.origin(name)
        with explain_decode_errors(origin, "compressed as expected"), self._open(name, origin, check_size) as file:
            data = file.read()
        refuse_pointer(origin, data)
        return data

    def local(self, name: str) -> Path:
        """Return a file on disk with the bytes of one file; that of an archive lives as long as the tree."""
        if name in self._local:
            return self._local[name]
        origin, path = self.origin(name), self.path / name
        with explain_decode_errors(origin, "compressed as expected"), self._open(name, origin) as source:
            if self._files[name][0] is not None:
                with explain_os_errors(tempfile.gettempdir(), advice="set $TMPDIR to another folder"):
                    path = Path(tempfile.mkdtemp(prefix="mnistm_dist-"), path.name)
                weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
                with path.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        with path.open("rb") as file:
            refuse_pointer(origin, file.read(len(GIT_LFS_START)))
        self._local[name] = path
        return path

    def _open(self, name: str, origin: str, check: Callable[[str, int], None] = lambda *_: None) -> IO[bytes]:
        archive, inner = self._files[name]
        if self._last is not None and self._last is not archive:
            self._last.close()  # a set may have more archives than a process may have open files
        self._last = archive
        if archive is not None:
            check(origin, archive.files[inner][0])
            return archive.open(inner)
        file = self.path / name
        if not file.is_file():
            raise UserError(f"{file}: missing or not a regular file; put a copy of the file there")
        check(origin, file.stat().st_size)
        return file.open("rb")


ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # the first bytes of a zip, and of an empty one
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
