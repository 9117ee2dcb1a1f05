"""What a file is, by its first bytes, whatever its name says; and what a path holds, in words for a message."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mnistm_dist.data.decode_errors import UNREADABLE
from mnistm_dist.data.sources.archives import unpack
from mnistm_dist.errors import UserError

_HEAD = 512
_NAMED = 6
_MAGIC: Mapping[bytes, str] = {b"PAR1": "parquet", b"\x89HDF\r\n\x1a\n": "hdf5", b"MATLAB 5.0 MAT-file": "mat"}
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_IDX = (b"\0\0\x08\x03", b"\0\0\x08\x01")
PICKLE_SUFFIXES = (".pkl", ".pkl.gz", ".pickle", ".pickle.gz")
"""File names that are taken for pickles: the oldest protocol has no first bytes of its own."""


def kind_of(path: Path) -> str | None:
    """`tar`, `zip`, or the layout of a file: `parquet`, `pt`, `npz`, `hdf5`, `mat`, `pickle`; None if unknown.

    Raises UserError for what cannot be read, and for what is known but not accepted.
    """
    head = _head(path)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"MATLAB 7.3"):
        raise UserError(f"{path}: a MATLAB 7.3 file; accepted is MATLAB 5: save it with -v7")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(path)
    if head.startswith(_OLD_TORCH):
        return "pt"
    if _is_tar(head):
        return "tar"
    if head.startswith(b"\x80") or path.name.lower().endswith(PICKLE_SUFFIXES):
        return "pickle"
    return None


def contents(path: Path) -> str:
    """What a path that holds no known layout is, in a few words, with a hint where one can be given."""
    if path.is_dir():
        names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
        if "manifest.json" in names:
            return "a packed set already: train on it with --shards"
        if any("-idx" in name or ".idx" in name for name in names):
            return "MNIST itself: blend it over photos by pack mnist+photos --mnist DIR --photos DIR"
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"a folder of {', '.join(names[:_NAMED])}{more}" if names else "an empty folder"
    if not path.is_file():
        return "neither a file nor a folder"
    head = _head(path)
    if not head:
        return "an empty file"
    if head.startswith(_IDX):
        return "a file of MNIST itself: blend it over photos by pack mnist+photos --mnist DIR --photos DIR"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the set that it may speak of"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    kind = kind_of(path)
    if kind in ("tar", "zip"):
        return f"a {kind} of other things"
    if kind is not None:
        return f"a file of the layout {kind}"
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "a text file" if text else f"a file that begins with the bytes {head[:8].hex(' ')}"


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with unpack(path) as stream:
        return stream.read(_HEAD)


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except UNREADABLE as error:
        raise UserError(f"{path}: cut short or damaged, no whole zip ({error}); fetch it again") from error
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "pt" if any(name.rpartition("/")[2] == "data.pkl" for name in names) else "zip"


def _is_tar(head: bytes) -> bool:
    if len(head) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
