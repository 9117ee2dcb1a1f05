"""Folders, tars and zips, seen alike: files under names, looked over before anything is read.

Nothing is ever unpacked to disk. An archive with a path that climbs out, a link, a name that comes twice or a member of
monstrous size is refused at the opening, by its name.
"""

from __future__ import annotations

import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mnistm_dist.data.damage import UNREADABLE
from mnistm_dist.data.layouts.decompression import check_expansion
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
