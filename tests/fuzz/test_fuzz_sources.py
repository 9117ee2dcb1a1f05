"""Foreign sources are packed or refused in one line: parquet, HDF5, MATLAB, pickles, tars and zips."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import pickletools
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from fuzzing import CANARY, TEXTS, Fuzz, damaged
from hypothesis import strategies as st
from layouts import WRITERS, Files, noise, official_files, write_mnist, write_python2_pickle

from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError

pytest_plugins = ["fuzzing"]
PARTS = noise({"train": 6, "test": 3}, side=8)


def take(source: Path, layout: str | None = None, mnist: str | None = None) -> None:
    """Open and pack a source, as the command does."""
    opened = open_source(str(source), layout=layout, mnist=mnist)
    try:
        pack(opened, Path("packed"), num_shards=1)
    finally:
        shutil.rmtree("packed", ignore_errors=True)


@pytest.mark.parametrize("layout", ["parquet", "hdf5", "mat"])
def test_a_damaged_file_is_packed_or_refused_in_a_line(fuzz: Fuzz, layout: str) -> None:
    source = WRITERS[layout](Path("source"), PARTS)
    originals = {str(file): file.read_bytes() for file in Path("source").rglob("*") if file.is_file()}

    def attempt(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        Path(name).write_bytes(data)
        try:
            take(source, layout)
        finally:
            Path(name).write_bytes(originals[name])

    fuzz(st.tuples(st.sampled_from(sorted(originals)), damaged(*originals.values())), attempt)


class Evil:
    """Creates the canary when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


HOSTILE_PICKLES = (
    pickle.dumps({"train": Evil()}),
    pickle.dumps({"train": Evil()}, protocol=0),
    b"\x80\x02cbuiltins\nexec\n(X" + struct.pack("<I", 20) + b"open('canary', 'w')  tR.",
    b"cposix\nsystem\n(S'touch canary'\ntR.",
    b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
)
"""Programs that would run a command."""


def has_large_memo(data: bytes) -> bool:
    """Whether Python's unpickler would allocate gigabytes for its memo (gh-115952)."""
    with contextlib.suppress(ValueError, struct.error):
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "LONG_BINPUT" and argument > 1 << 20:
                return True
    return False


def test_a_damaged_pickle_is_packed_or_refused_in_a_line_and_runs_nothing(fuzz: Fuzz) -> None:
    mnist = str(write_mnist(Path("mnist"), PARTS))
    good = [pickle.dumps({split: part.images for split, part in PARTS.items()}, protocol) for protocol in range(6)]
    good.append(gzip.decompress(write_python2_pickle(Path("old"), PARTS).read_bytes()))

    def attempt(drawn: tuple[bool, bytes]) -> None:
        packed, data = drawn
        if has_large_memo(data):
            return
        Path("set.pkl").write_bytes(gzip.compress(data, 1) if packed else data)
        try:
            take(Path("set.pkl"), "pickle", mnist)
        except UserError as error:
            message = str(error)
        else:
            return
        # Without its cause, which may be a MemoryError: the unpickler allocates what a size says.
        raise UserError(message)

    fuzz(st.tuples(st.booleans(), damaged(*HOSTILE_PICKLES, *good)), attempt)


NAMES = st.sampled_from(
    [
        *TEXTS,
        *("/etc/evil.png", "mnist_m/../../evil.png", f"../{CANARY}", f"mnist_m/mnist_m_train/../../../{CANARY}", "a:b"),
        *("mnist_m/mnist_m_train/00000001.png", "./mnist_m/mnist_m_train/00000001.png", "__MACOSX/x", ".DS_Store"),
        *("mnist_m/mnist_m_train/00000001.png/x.png", "mnist_m/mnist_m_train", "mnist_m_train/1.png"),
    ]
) | st.text(max_size=12)
MEMBER = st.fixed_dictionaries(
    {
        "name": NAMES,
        "data": st.binary(max_size=20),
        "type": st.sampled_from(
            [
                tarfile.REGTYPE,
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.DIRTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
                tarfile.GNUTYPE_SPARSE,
                tarfile.CONTTYPE,
                tarfile.XHDTYPE,
                b"Z",
            ]
        ),
        "link": NAMES,
        "size": st.none() | st.sampled_from([-1, 0, 1, 2**20, 2**33, 2**62]),
    }
)
PNGS: Files = official_files(PARTS)


def test_a_tar_with_hostile_members_is_packed_or_refused_in_a_line(fuzz: Fuzz) -> None:
    def attempt(members: list[dict]) -> None:
        with tarfile.open("set.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in PNGS.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for member in members:
                info = tarfile.TarInfo(member["name"])
                info.type, info.linkname = member["type"], member["link"]
                info.size = len(member["data"]) if member["size"] is None else max(0, member["size"])
                try:
                    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
                except (ValueError, UnicodeError):
                    continue
                assert tar.fileobj is not None
                tar.fileobj.write(header + member["data"].ljust(512, b"\0"))
                tar.offset += len(header) + 512
        take(Path("set.tar"))

    fuzz(st.lists(MEMBER, min_size=1, max_size=3), attempt)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_hostile_members_is_packed_or_refused_in_a_line(fuzz: Fuzz) -> None:
    def attempt(members: list[dict]) -> None:
        with zipfile.ZipFile("set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in PNGS.items():
                archive.writestr(name, data)
            for number, member in enumerate(members):
                info = zipfile.ZipInfo("x")
                info.filename = member["name"]
                info.external_attr = (0o120777 if number % 2 else 0o100644) << 16
                try:
                    archive.writestr(info, member["data"])
                except (ValueError, UnicodeError):
                    return
        take(Path("set.zip"))

    fuzz(st.lists(MEMBER, min_size=1, max_size=3), attempt)
