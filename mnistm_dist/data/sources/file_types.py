"""The type of a file by its first bytes, and a description of a path for messages."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mnistm_dist.data.image_io import UNREADABLE, explain_decode_errors
from mnistm_dist.data.sources.archives import Decompressed
from mnistm_dist.data.sources.base import split_of

_PICKLE_SUFFIXES = (".pkl", ".pkl.gz", ".pickle", ".pickle.gz")
_DATA_SUFFIXES = (".h5", ".hdf5", ".mat", ".npz", ".parquet", ".pt", ".pth", *_PICKLE_SUFFIXES)
_HEAD_BYTES = 512
_SIGNATURES: Mapping[bytes, str] = {
    b"PAR1": "parquet",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"MATLAB 5.0 MAT-file": "mat",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "pt",  # before PyTorch 1.6
    b"\x80": "pickle",
}
_MNIST = "MNIST itself; blend it over photos: pack mnist+photos --mnist DIR --photos DIR"
# Files that users take for a set of images, by their first bytes.
_FOREIGN: Mapping[bytes, str] = {
    b"\0\0\x08": _MNIST,
    b"MATLAB 7.3": "a MATLAB 7.3 file; save it with -v7, which writes MATLAB 5",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch it with git lfs pull",
    b"<": "a web page",
}


def is_data_file(path: Path) -> bool:
    """Return whether a file may hold images other than as an image file, by its name."""
    return path.name.lower().endswith(_DATA_SUFFIXES)


def file_type(path: Path) -> str | None:
    """Return `tar`, `zip` or the layout of a file (`parquet`, `pt`, `npz`, `hdf5`, `mat`, `pickle`), else None.

    Raises `UserError` if the file cannot be read.
    """
    head = _head(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_type(path)
    if head[257:262] == b"ustar":
        return "tar"
    known = next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)
    # The oldest pickles have no first bytes of their own.
    return "pickle" if known is None and path.name.lower().endswith(_PICKLE_SUFFIXES) else known


def describe(path: Path) -> str:
    """Describe a path that holds no known layout, with the next step if there is one."""
    if path.is_dir():
        names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        if "manifest.json" in names:
            return "a packed set; train on it with --shards"
        if any(name.startswith(("train-images", "t10k-images")) for name in names):
            return _MNIST
        return ", ".join(names[:6]) + ", ..." * (len(names) > 6) or "an empty folder"
    head = _head(path)
    if not head:
        return "an empty file" if path.is_file() else "neither a file nor a folder"
    for signature, description in _FOREIGN.items():
        if head.lstrip().startswith(signature):
            return description
    kind = file_type(path)
    no_split = "" if split_of(path.name) else " without train, val or test in its name"
    return f"a {kind} file{no_split}" if kind else f"a file that starts with {head[:16]!r}"


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with explain_decode_errors(path, "compressed as expected"):
        return Decompressed(path).read(_HEAD_BYTES)


def _zip_type(path: Path) -> str:
    names: list[str] = []
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "pt" if any(name.rpartition("/")[2] == "data.pkl" for name in names) else "zip"
