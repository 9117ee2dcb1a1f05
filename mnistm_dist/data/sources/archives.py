"""Folders, tars and zips, seen alike: files under names, looked over before anything is read.

Nothing is ever unpacked to disk. An archive with a path that climbs out, a link, a name that comes twice or a member of
monstrous size is refused at the opening, by its name.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.errors import UserError

MAX_IMAGE_BYTES = 16 << 20
"""Bytes of the largest image file that is read."""
MAX_TEXT_BYTES = 1 << 30
"""Bytes of the largest file of labels that is read."""
LINK = "a link; give a copy that holds the file itself"
"""What is said of a link in an archive."""
_TEXT_SUFFIXES = (".csv", ".txt")
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies directly in one folder of a tree."""

    folders: list[str] = field(default_factory=list)
    """Their names, sorted."""
    files: list[str] = field(default_factory=list)
    """Their names, sorted."""


class Tree(ABC):
    """Files under names with `/` between their parts; the folder at the top has the empty name."""

    kind: str
    """`folder`, `tar` or `zip`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def listing(self, folder: str) -> Listing:
        """What lies directly in `folder`, without operating systems' litter; nothing where there is no such folder."""

    @abstractmethod
    def text(self, name: str) -> str:
        """One file of labels, whole. Raises UserError where it is broken, too large or not in UTF-8."""

    @abstractmethod
    def read_each(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yields name and bytes of every image among `names`, one at a time, in the order that is cheapest.

        Raises UserError at a broken or too large one.
        """

    def origin(self, name: str) -> str:
        """How a message calls one file of this tree; a name that would break a line or hide something is escaped."""
        return f"{self.path}: {name if name.isprintable() else ascii(name)}"

    def decode(self, name: str, data: bytes) -> str:
        """Text of a file of labels."""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.origin(name)}: not text in UTF-8, so no labels; save it as UTF-8") from error


class Folder(Tree):
    """A folder on disk, listed as it is asked for; links in it are followed."""

    kind = "folder"

    def listing(self, folder: str) -> Listing:
        place = self.path / folder
        if not place.is_dir():
            return Listing()
        found = Listing()
        try:
            for entry in sorted(place.iterdir()):
                if not _is_litter(entry.name):
                    (found.folders if entry.is_dir() else found.files).append(entry.name)
        except OSError as error:
            raise UserError(f"{place}: cannot be listed ({error.strerror})") from error
        return found

    def text(self, name: str) -> str:
        return self.decode(name, self._read(name, MAX_TEXT_BYTES))

    def read_each(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, self._read(name, MAX_IMAGE_BYTES)

    def origin(self, name: str) -> str:
        return str(self.path / name)

    def _read(self, name: str, limit: int) -> bytes:
        file = self.path / name
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{file}: no regular file; put a copy of the image there")
            check_size(str(file), found.st_size, limit)
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error


class Archive(Tree):
    """A tar or zip: an index of its members, made and checked at the opening."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folders: dict[str, Listing] = {"": Listing()}
        self._members: set[str] = set()

    def listing(self, folder: str) -> Listing:
        return self._folders.get(folder, Listing())

    def admit(self, member: str, size: int, *, problem: str | None = None) -> str | None:
        """Enters one member into the index; returns its clean name, or None for litter.

        Raises UserError for what an archive of images has no business to hold.
        """
        origin = self.origin(member)
        parts = member.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or ":" in parts[0]:
            raise UserError(f"{origin}: a path that climbs out of the archive; make the archive anew with plain names")
        if problem is not None:
            raise UserError(f"{origin}: {problem}")
        parts = [part for part in parts if part not in ("", ".")]
        if not parts or _is_litter(parts[-1]) or parts[0] == "__MACOSX":
            return None
        name = "/".join(parts)
        if name in self._members:
            raise UserError(f"{origin}: comes twice in the archive; leave one of them")
        check_size(origin, size, MAX_TEXT_BYTES if is_text(name) else MAX_IMAGE_BYTES)
        self._members.add(name)
        self._enter(parts)
        return name

    def sort(self) -> None:
        """Brings the index into its final form, once every member is in it."""
        for found in self._folders.values():
            found.folders.sort()
            found.files.sort()

    def _enter(self, parts: list[str]) -> None:
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in self._folders:
                self._folders[folder] = Listing()
                self._folders["/".join(parts[: depth - 1])].folders.append(parts[depth - 1])
        self._folders["/".join(parts[:-1])].files.append(parts[-1])


class Zip(Archive):
    """A zip, its members read as they are asked for."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._infos: dict[str, zipfile.ZipInfo] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except UNREADABLE as error:
            raise UserError(f"{path}: not a whole zip ({error}); fetch it again") from error
        check_expansion(str(path), path.stat().st_size, sum(info.file_size for info in self._zip.infolist()))
        for info in self._zip.infolist():
            if info.filename.endswith("/"):
                continue
            problem = None
            if stat.S_ISLNK(info.external_attr >> 16):
                problem = LINK
            elif info.flag_bits & 1:
                problem = "encrypted; give a zip without a password"
            name = self.admit(info.filename, info.file_size, problem=problem)
            if name is not None:
                self._infos[name] = info
        self.sort()

    def text(self, name: str) -> str:
        return self.decode(name, self._read(name))

    def read_each(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, self._read(name)

    def _read(self, name: str) -> bytes:
        info = self._infos[name]
        try:
            data = self._zip.read(info)
        except UNREADABLE as error:
            raise UserError(
                f"{self.origin(name)}: damaged, or packed in an unknown way ({error}); fetch the archive again"
            ) from error
        if len(data) != info.file_size:
            raise UserError(
                f"{self.origin(name)}: {len(data)} bytes where {info.file_size} are promised; damaged: "
                "fetch the archive again"
            )
        return data


def is_text(name: str) -> bool:
    """Whether a file's name says that it holds labels."""
    return name.lower().endswith(_TEXT_SUFFIXES)


def check_size(origin: str, size: int, limit: int) -> None:
    """Raises UserError where `size` bytes are more than `limit`."""
    if size > limit:
        raise UserError(f"{origin}: {size} bytes, where at most {limit >> 20} MiB are accepted")


def _is_litter(name: str) -> bool:
    return name.startswith("._") or name in _LITTER


_CHUNK = 1 << 20


class Tar(Archive):
    """A tar, looked over at the opening; files of labels are kept from there, images are read in a second pass."""

    kind = "tar"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._texts: dict[str, bytes] = {}
        self._names: dict[str, str] = {}
        for tar, member in _members(path):
            if member.isdir():
                continue
            problem = None
            if member.issym() or member.islnk():
                problem = LINK
            elif not member.isreg() or member.issparse():
                problem = "neither a file nor a folder; refused"
            name = self.admit(member.name, member.size, problem=problem)
            if name is None:
                continue
            self._names[member.name] = name
            if is_text(name):
                self._texts[name] = _data(path, tar, member)
        self.sort()

    def text(self, name: str) -> str:
        return self.decode(name, self._texts[name])

    def read_each(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for tar, member in _members(self.path):
            name = self._names.get(member.name)
            # A folder may have the name of a file.
            if name is not None and name in names and member.isreg():
                yield name, _data(self.path, tar, member)


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with _whole(path), unpack(path) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
        while (member := tar.next()) is not None:
            yield tar, member
            # It would keep every member that it has seen; its parameter against that came with Python 3.13.
            tar.members = []  # type: ignore[attr-defined]
        # tarfile takes a damaged header for the end. The checksum of a compressed file stands at its end, too.
        rest = cast(IO[bytes], tar.fileobj)
        while data := rest.read(_CHUNK):
            if data.strip(b"\0"):
                raise UserError(f"{path}: damaged: more follows after its end; fetch it again")
        # A tar cut between two members is read without an error.
        if stream.count <= tar.offset:
            raise UserError(f"{path}: cut short: the mark at the end of a tar is not there; fetch it again")


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cut short, damaged, or no tar ({error}); fetch it again") from error


def _data(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _whole(path):
        stream = tar.extractfile(member)
        assert stream is not None, "only regular files are read"
        data = stream.read()
    if len(data) != member.size:
        raise UserError(f"{path}: {member.name}: cut short; fetch the archive again")
    return data


MAX_EXPANSION = 100
"""How many times its own size a compressed file may unpack to; a set of images unpacks to less than 10 times."""
_SPARE_BYTES = 64 << 20


class Unpacked:
    """The decompressed bytes of a file, counted, and refused where they grow beyond every set of images."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.count = 0
        self._path = path
        self._stream = stream
        self._limit = path.stat().st_size * MAX_EXPANSION + _SPARE_BYTES

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all that are left if negative. Raises UserError past the bound."""
        return self._counted(self._stream.read(self._allowed(size)))

    def readline(self, size: int = -1) -> bytes:
        """At most `size` bytes, up to the end of a line. Raises UserError past the bound."""
        return self._counted(self._stream.readline(self._allowed(size)))

    def _allowed(self, size: int) -> int:
        left = self._limit - self.count + 1
        return left if size < 0 else min(size, left)

    def _counted(self, data: bytes) -> bytes:
        self.count += len(data)
        if self.count > self._limit:
            raise UserError(f"{self._path}: unpacks to more than {MAX_EXPANSION} times its size; refused")
        return data


@contextmanager
def unpack(path: Path) -> Iterator[Unpacked]:
    """Opens a file for reading its bytes, decompressed if it is gzip, bzip2 or xz (told by its first bytes).

    What is cut short, damaged or cannot be read raises UserError, within the block too.
    """
    try:
        with _open(path) as stream:
            yield Unpacked(path, stream)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); fetch it again") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if magic.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path, "rb")
    return path.open("rb")


def check_expansion(origin: str, packed: int, unpacked: int) -> None:
    """Raises UserError where `packed` bytes promise to unpack to more than any set of images does."""
    if unpacked > packed * MAX_EXPANSION + _SPARE_BYTES:
        raise UserError(f"{origin}: unpacks to more than {MAX_EXPANSION} times its size; refused")
