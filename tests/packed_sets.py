"""Small sources of real PNGs, and functions that damage the sets packed of them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.data.image_io import encode_png
from mnistm_dist.data.sources.base import Sample, Source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ARCHIVE = SHARED / "mnist_m.tar.gz"


def pixels_of(split: str, index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """The image of a tiny source at one place: uint8 (H, W, 3)."""
    rng = np.random.default_rng([len(split), ord(split[1]), index])
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def label_of(split: str, index: int) -> int:
    """The label of that image."""
    return (7 * index + len(split)) % 10


def tiny_source(
    train: int = 23,
    test: int = 7,
    val: int = 0,
    *,
    arrays: bool = False,
    size: tuple[int, int] = (32, 32),
    spoil: Callable[[Sample], Sample] = lambda sample: sample,
) -> Source:
    """A source of noise; its samples come backwards, the splits one by one. ``spoil`` may change any of them."""
    counts = {split: count for split, count in (("train", train), ("val", val), ("test", test)) if count}

    def read() -> Iterator[Sample]:
        for split, count in reversed(counts.items()):
            for index in reversed(range(count)):
                pixels = pixels_of(split, index, size)
                yield spoil(
                    Sample(
                        split=split,
                        index=index,
                        label=label_of(split, index),
                        encoded=None if arrays else encode_png(pixels),
                        pixels=pixels if arrays else None,
                        origin=f"noise: {split}/{index}.png",
                    )
                )

    return Source(layout="official-folder", description="noise", counts=counts, read=read)


def write_official(folder: Path, train: int = 23, test: int = 7) -> Path:
    """The images of `tiny_source` in the official layout on disk; returns ``folder``."""
    for split, count in (("train", train), ("test", test)):
        place = folder / f"mnist_m_{split}"
        place.mkdir(parents=True)
        for index in range(count):
            (place / f"{index:08d}.png").write_bytes(encode_png(pixels_of(split, index)))
        lines = [f"{index:08d}.png {label_of(split, index)}\n" for index in range(count)]
        (folder / f"mnist_m_{split}_labels.txt").write_text("".join(lines))
    return folder


def png_with(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG of zeros with any header; the pixel data is right for small ones only."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + width * channels * depth // 8)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if colour == 3:
        chunks.append((b"PLTE", bytes(range(30))))
    chunks += [(b"IDAT", zlib.compress(row * min(height, 64))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def flip_byte(path: Path, offset: int) -> None:
    """Changes one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None], *, signed: bool = True) -> None:
    """Changes the JSON of a manifest; ``signed`` makes its identity fit the new content, as an attacker would."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    if signed:
        content = {key: item for key, item in value.items() if key not in ("layout", "description", "identity")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        value["identity"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(value))


def sign_files(folder: Path) -> None:
    """Makes the manifest vouch for the files as they now are, as an attacker would."""

    def vouch(value: dict[str, Any]) -> None:
        for split in value["splits"].values():
            for entry in (split["index"], *split["shards"]):
                data = (folder / entry["name"]).read_bytes()
                entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(folder, vouch)


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def damage_by_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_by_flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


def damage_by_flip_with_times_put_back(path: Path) -> None:
    state = path.stat()
    flip_byte(path, 500)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def damage_by_growth(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def damage_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "cut by a byte": (damage_by_cut, "truncated"),
    "one byte changed": (damage_by_flip, "changed"),
    "one byte changed, mtime put back": (damage_by_flip_with_times_put_back, "changed"),
    "grown": (damage_by_growth, "changed"),
    "missing": (Path.unlink, "missing"),
    "a folder": (damage_by_folder, "missing"),
    "a pipe": (damage_by_pipe, "missing"),
}

"""What can happen to a file, and the status it then has."""
