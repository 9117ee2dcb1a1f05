"""Tars, compressed or not, read as a stream: once to look them over, once more for the images.

Two passes, because labels may stand after the images that they belong to, and test before train. So what is wrong with
an archive is known before anything of it is used, and memory does not grow with its images.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from mnistm_dist.data.damage import UNREADABLE
from mnistm_dist.data.layouts.decompression import unpack
from mnistm_dist.data.layouts.trees import LINK, Archive, is_text
from mnistm_dist.errors import UserError

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
