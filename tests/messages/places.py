"""A folder in which a person makes mistakes: a packed set, a trained run, sources, MNIST, photos; and ways to spoil it.

Paths are relative to it, so that the messages are the same on every machine.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from layouts import Files, noise, official_files, write_folder, write_mnist, write_npz, write_tar, write_zip
from packed_sets import edit_manifest, pixels_of, png_with, tiny_source
from PIL import Image

from mnistm_dist import train
from mnistm_dist.data.image_io import encode_png
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.errors import run_cli
from mnistm_dist.training.run_dir import process_start

Preparation = Callable[[], object]
PARTS = noise({"train": 6, "test": 3}, side=8)
TRAIN = [
    "--batch-size",
    "4",
    "--image-size",
    "16",
    "--epochs",
    "1",
    "--threads",
    "1",
    "--tracker",
    "none",
    "--no-report",
]


def make(folder: Path) -> None:
    """Fills the working folder, which is ``folder``."""
    pack(tiny_source(9, 3, size=(8, 8)), Path("set"), num_shards=2, val_size=2)
    assert run_cli(train.main, [*TRAIN, "--shards", "set", "--run-dir", "run", "--cache-dir", "cache"]) == 0
    write_folder(Path("source"), official_files(PARTS))
    write_mnist(Path("mnist"), PARTS, suffix="")
    Path("photos").mkdir()
    Image.fromarray(pixels_of("train", 1, (64, 64))).save("photos/a.png")
    Path("digit.png").write_bytes(encode_png(pixels_of("train", 0, (8, 8))))
    Path("notes.txt").write_text("no picture\n")
    Path("empty").mkdir()


def write(name: str, data: str | bytes) -> Preparation:
    """A file with this in it, in the place of what is there."""

    def prepare() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return prepare


def add(name: str, data: str) -> Preparation:
    """A file with this at its end."""
    return lambda: Path(name).write_text(Path(name).read_text() + data)


def remove(name: str) -> Preparation:
    """A file or folder that is gone."""
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def cut(name: str) -> Preparation:
    """A file without its last byte."""
    return lambda: os.truncate(name, Path(name).stat().st_size - 1)


def flip(name: str) -> Preparation:
    """A file with one byte changed in its middle."""

    def prepare() -> None:
        data = bytearray(Path(name).read_bytes())
        data[len(data) // 2] ^= 0xFF
        Path(name).write_bytes(data)

    return prepare


def folder(name: str) -> Preparation:
    """An empty folder, in the place of what is there."""

    def prepare() -> None:
        if Path(name).is_file():
            Path(name).unlink()
        Path(name).mkdir(parents=True)

    return prepare


def manifest(edit: Callable[[dict], object], *, signed: bool = True) -> Preparation:
    """A manifest with other values, signed as a forger would."""
    return lambda: edit_manifest(Path("set"), lambda value: edit(value) and None, signed=signed)


def document(name: str, edit: Callable[[dict], object]) -> Preparation:
    """A JSON file with other values."""

    def prepare() -> None:
        value = json.loads(Path(name).read_text())
        edit(value)
        Path(name).write_text(json.dumps(value))

    return prepare


def both(*preparations: Preparation) -> Preparation:
    """One after the other."""
    return lambda: [prepare() for prepare in preparations]


def archive(name: str, *more: tuple[str, bytes]) -> Preparation:
    """An archive of the official layout, tar or zip by its name, with more members."""
    files: Files = {**official_files(PARTS), **dict(more)}
    return lambda: (write_zip if name.endswith("zip") else write_tar)(Path(name), files)


def tar_with_link() -> None:
    """A tar with a symbolic link in it."""
    write_tar(Path("set.tar"), official_files(PARTS), "w")
    with tarfile.open("set.tar", "a") as tar:
        member = tarfile.TarInfo("mnist_m/mnist_m_train/link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def twice_in_a_tar() -> None:
    """A tar with a member that comes twice."""
    write_tar(Path("set.tar"), [*official_files(PARTS).items(), ("mnist_m/mnist_m_train/00000000.png", b"")])


def zip_with_password() -> None:
    """A zip whose members say that they are encrypted."""
    path = write_zip(Path("set.zip"), official_files(PARTS))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def bomb() -> None:
    """A zip whose image unpacks to 20 MiB."""
    with zipfile.ZipFile("set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mnist_m/mnist_m_train/00000000.png", bytes(20 << 20))


def npz(**arrays: object) -> Preparation:
    """A file of arrays; by default the right ones."""
    part = PARTS["train"]
    found = {"images": part.images, "labels": part.labels, **arrays}
    return lambda: np.savez("train.npz", **{name: value for name, value in found.items() if value is not None})


def npz_set() -> None:
    """Two files of arrays that are whole."""
    write_npz(Path("npz"), PARTS)


def pickled(value: object) -> Preparation:
    """A pickle."""
    return write("set.pkl", pickle.dumps(value))


class Evil:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def held() -> None:
    """The run's folder is held by a process that lives: this one."""
    pid = os.getpid()
    lock = {"host": socket.gethostname(), "pid": pid, "started": process_start(pid)}
    Path("run/.lock").write_text(json.dumps(lock))


IMAGE = "source/mnist_m/mnist_m_train/00000000.png"
LABELS = "source/mnist_m/mnist_m_train_labels.txt"


def image(data: bytes) -> Preparation:
    """Another first image of the official layout."""
    return write(IMAGE, data)


GREY, LARGE, ALPHA = png_with(8, 8, 8, 0), png_with(5_000, 5_000, 8, 2), png_with(8, 8, 8, 6)
OTHER_SIZE = encode_png(pixels_of("train", 0, (9, 9)))
BROKEN = encode_png(pixels_of("train", 0, (8, 8)))[:-20]
CHECKPOINT = "run/checkpoints/step-00000002"
