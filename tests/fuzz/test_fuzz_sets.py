"""Packed sets from elsewhere: a forged manifest, index, shard or image gives images or a line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import Fuzz, changed, damaged
from hypothesis import strategies as st
from packed_sets import edit_manifest, pixels_of, png_with, tiny_source

from mnistm_dist.data.image_io import check_png, decode_png, encode_png, png_size
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet

pytest_plugins = ["fuzzing"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete set of 7 + 2 + 3 images of 8 x 8 pixels."""
    out = tmp_path_factory.mktemp("valid") / "set"
    pack(tiny_source(9, 3, size=(8, 8)), out, num_shards=2, val_size=2)
    return out


def read_all(folder: Path) -> None:
    """Read everything that a training reads."""
    shards = ShardSet.open(folder)
    for name, split in shards.manifest.splits.items():
        count = min(split.count, 50)
        shards.labels(name)
        shards.keys(name, range(count))
        shards.read(name, range(count))
    shards.check(shards.manifest.splits, record=None)


def test_a_forged_manifest_is_read_or_refused_in_a_line(fuzz: Fuzz, valid: Path) -> None:
    shutil.copytree(valid, "set")

    def attempt(document: Any) -> None:
        if isinstance(document, dict):
            # Signed again, as a forger would.
            content = {key: item for key, item in document.items() if key not in ("layout", "description", "identity")}
            canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
            document["identity"] = hashlib.sha256(canonical.encode()).hexdigest()
        Path("set/manifest.json").write_text(json.dumps(document))
        read_all(Path("set"))

    fuzz(changed(json.loads((valid / "manifest.json").read_text())), attempt)


def replace_file(name: str, data: bytes) -> None:
    """Write other bytes to a file of the set, and their checksum to the manifest."""
    (Path("set") / name).write_bytes(data)
    claim = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def edit(manifest: dict[str, Any]) -> None:
        for split in manifest["splits"].values():
            for entry in (split["index"], *split["shards"]):
                if entry["name"] == name:
                    entry.update(claim)

    edit_manifest(Path("set"), edit)


@pytest.mark.parametrize("kind", ["index.npy", "tar"])
def test_a_forged_index_or_shard_is_read_or_refused_in_a_line(fuzz: Fuzz, valid: Path, kind: str) -> None:
    contents = {path.name: path.read_bytes() for path in valid.glob(f"*{kind}")}
    shutil.copytree(valid, "set")

    def attempt(drawn: tuple[str, bytes]) -> None:
        replace_file(*drawn)
        try:
            read_all(Path("set"))
        finally:
            replace_file(drawn[0], contents[drawn[0]])

    fuzz(st.tuples(st.sampled_from(sorted(contents)), damaged(*contents.values())), attempt)


def test_a_damaged_png_is_decoded_or_refused_in_a_line(fuzz: Fuzz) -> None:
    def attempt(data: bytes) -> None:
        check_png(data, "image.png")
        pixels = decode_png(data, "image.png")
        assert (pixels.shape, pixels.dtype) == ((*png_size(data, "image.png"), 3), np.uint8)

    fuzz(damaged(encode_png(pixels_of("train", 1, (8, 8))), png_with(28, 28, 8, 2), png_with(32, 32, 16, 2)), attempt)
