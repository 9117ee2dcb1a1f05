"""Sources from anywhere, in every layout: archives, arrays and pickles."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from inputs import WORDS, damaged
from layouts import WRITERS, Files, noise, official_files, write_mnist, write_python2_pickle
from search import CANARY, Fuzz

from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.data.sources.idx import read_digits

pytest_plugins = ["counting"]
PARTS = noise({"train": 6, "test": 3}, side=8)


def take(source: Path, layout: str | None = None, mnist: str | None = None) -> None:
    """Opens and packs a source, as the door does."""
    opened = open_source(str(source), layout=layout, mnist=mnist)
    try:
        pack(opened, Path("packed"), num_shards=1)
    finally:
        shutil.rmtree("packed", ignore_errors=True)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_damaged_source_is_packed_or_refused_in_a_line(fuzz: Fuzz, layout: str) -> None:
    source = WRITERS[layout](Path("source/set"), PARTS) if Path("source").mkdir() is None else Path()
    mnist = str(write_mnist(Path("mnist"), PARTS)) if layout == "pickle" else None
    files = sorted(file for file in Path("source").rglob("*") if file.is_file())
    whole = {file: file.read_bytes() for file in files}

    def attempt(drawn: tuple[int, bool, bytes]) -> None:
        number, named, data = drawn
        file = files[number % len(files)]
        file.write_bytes(data)
        try:
            take(source, layout if named else None, mnist)
        finally:
            file.write_bytes(whole[file])

    inputs = st.integers(0, len(files) - 1).flatmap(
        lambda number: st.tuples(st.just(number), st.booleans(), damaged(whole[files[number]], *whole.values()))
    )
    fuzz.search(f"source, {layout}", 0.0132, inputs, attempt)


def test_damaged_files_of_mnist_give_digits_or_a_line(fuzz: Fuzz) -> None:
    write_mnist(Path("packed-mnist"), PARTS)
    folder = write_mnist(Path("mnist"), PARTS, suffix="")
    files = [file.read_bytes() for place in ("mnist", "packed-mnist") for file in sorted(Path(place).iterdir())]
    names = sorted(file.name for file in folder.iterdir())

    def attempt(drawn: tuple[int, bytes]) -> None:
        file = folder / names[drawn[0]]
        before = file.read_bytes()
        file.write_bytes(drawn[1])
        try:
            for split in ("train", "test"):
                read_digits(folder, split)
        finally:
            file.write_bytes(before)

    fuzz.search("source, idx", 0.0198, st.tuples(st.integers(0, 3), damaged(*files)), attempt)


class Evil:
    """Leaves a canary when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


HOSTILE = (
    pickle.dumps({"train": Evil()}),
    pickle.dumps({"train": Evil()}, protocol=0),
    b"\x80\x02cbuiltins\nexec\n(X" + struct.pack("<I", 20) + b"open('canary', 'w')  tR.",
    b"cposix\nsystem\n(S'touch canary'\ntR.",
    b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".",
    b"\x80\x02cnumpy\nndarray\nJ" + struct.pack("<i", 1 << 30) + b"\x85R.",
)
"""Programs that would do harm."""


def test_a_pickle_gives_arrays_or_a_line_and_runs_nothing(fuzz: Fuzz) -> None:
    mnist = str(write_mnist(Path("mnist"), PARTS))
    good = [pickle.dumps({split: part.images for split, part in PARTS.items()}, protocol) for protocol in range(6)]
    good.append(gzip.decompress(write_python2_pickle(Path("old"), PARTS).read_bytes()))

    def attempt(drawn: tuple[bool, bytes]) -> None:
        packed, data = drawn
        Path("set.pkl").write_bytes(gzip.compress(data, 1) if packed else data)
        take(Path("set.pkl"), "pickle", mnist)

    fuzz.search("pickle, programs", 0.0396, st.tuples(st.booleans(), damaged(*HOSTILE, *good)), attempt)


def test_a_torch_file_gives_tensors_or_a_line_and_runs_nothing(fuzz: Fuzz) -> None:
    import torch

    files = []
    for content in ((torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.tensor([1, 2])), (torch.zeros(1), Evil())):
        for modern in (True, False):
            target = io.BytesIO()
            torch.save(content, target, _use_new_zipfile_serialization=modern)
            files.append(target.getvalue())

    def attempt(data: bytes) -> None:
        Path("set_train.pt").write_bytes(data)
        take(Path("set_train.pt"), "pt")

    fuzz.search("torch files, programs", 0.0198, damaged(*files), attempt)


NAMES = st.sampled_from(
    [
        *WORDS,
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


def test_hostile_members_of_a_tar_are_refused_in_a_line(fuzz: Fuzz) -> None:
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

    fuzz.search("tar members", 0.0264, st.lists(MEMBER, min_size=1, max_size=3), attempt)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_members_of_a_zip_are_refused_in_a_line(fuzz: Fuzz) -> None:
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

    fuzz.search("zip members", 0.0198, st.lists(MEMBER, min_size=1, max_size=3), attempt)


@pytest.mark.parametrize("name", ["labels", "csv"])
def test_damaged_texts_of_labels_are_read_or_refused_in_a_line(fuzz: Fuzz, name: str) -> None:
    layout = {"labels": "official-folder", "csv": "course"}[name]
    folder = WRITERS[layout](Path("set"), PARTS)
    file = next(file for file in sorted(folder.rglob("*.txt" if name == "labels" else "*.csv")) if "train" in file.name)

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        take(folder)

    fuzz.search(f"texts of labels, {name}", 0.0132, damaged(file.read_bytes()), attempt)


def test_an_npz_of_any_array_is_packed_or_refused_in_a_line(fuzz: Fuzz) -> None:
    arrays = st.sampled_from(
        [
            *(np.zeros((6, 8, 8, 3), np.uint8), np.zeros((6, 0, 8, 3), np.uint8), np.zeros((6, 8, 8, 1), np.uint8)),
            *(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((), np.uint8), np.zeros((6, 2000, 1, 3), np.uint8)),
            *(np.arange(6), np.zeros(6), np.zeros((6, 10)), np.eye(10)[:6], np.array(["a"] * 6), np.array(3)),
            *(np.full(6, 2**63, np.uint64), np.full(6, np.nan), np.zeros((6, 1), "M8[s]"), np.arange(6) > 3),
            *(np.zeros((1, 6), np.int8), np.zeros(6, [("a", "i4")]), np.array([1, 2, 3, 4, 5, 2**40])),
        ]
    )

    def attempt(drawn: dict[str, np.ndarray]) -> None:
        np.savez("train.npz", **drawn)
        take(Path("train.npz"))

    fuzz.search("npz arrays", 0.0132, st.fixed_dictionaries({"images": arrays, "labels": arrays}), attempt)
