"""Packed sets from anywhere: damaged and forged manifests, index files and shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bounds import at_door
from hypothesis import strategies as st
from inputs import changed, damaged
from packed_sets import edit_manifest, tiny_source
from search import Fuzz

from mnistm_dist import plan, verify
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet

pytest_plugins = ["counting"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set of 7 + 2 + 3 images of 8 x 8 pixels."""
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


def signed(document: Any) -> bytes:
    """A manifest as JSON whose identity fits its content, as a forger would make it."""
    if isinstance(document, dict):
        content = {key: item for key, item in document.items() if key not in ("layout", "description", "identity")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        document["identity"] = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps(document).encode()


def test_a_forged_manifest_gives_a_set_or_a_user_error(fuzz: Fuzz, valid: Path) -> None:
    shutil.copytree(valid, "set")
    document = json.loads((valid / "manifest.json").read_text())

    def attempt(document: Any) -> None:
        Path("set/manifest.json").write_bytes(signed(document))
        read_all(Path("set"))

    fuzz.search("manifest", 0.0924, changed(document), attempt)


def replace_file(name: str, data: bytes) -> None:
    """Puts other bytes in a file's place, with a manifest that claims them."""
    (Path("set") / name).write_bytes(data)
    claim = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def edit(value: dict[str, Any]) -> None:
        for split in value["splits"].values():
            for entry in (split["index"], *split["shards"]):
                if entry["name"] == name:
                    entry.update(claim)

    edit_manifest(Path("set"), edit)


@pytest.mark.parametrize(("kind", "share"), [("index.npy", 0.0396), ("tar", 0.0396)])
def test_forged_files_of_a_set_give_images_or_a_user_error(fuzz: Fuzz, valid: Path, kind: str, share: float) -> None:
    names = sorted(path.name for path in valid.iterdir() if path.name.endswith(kind))
    files = [(valid / name).read_bytes() for name in names]
    shutil.copytree(valid, "set")

    def attempt(drawn: tuple[int, bytes]) -> None:
        name = names[drawn[0] // 3 % len(names)]
        replace_file(name, drawn[1])
        try:
            match drawn[0] % 3:
                case 0:
                    at_door(verify.main, "set")
                case 1:
                    read_all(Path("set"))
                case 2:
                    at_door(plan.main, "--shards", "set", "--step", "0", "--batch-size", "4", "--json")
        finally:
            replace_file(name, (valid / name).read_bytes())

    fuzz.search(f"shards, {kind}", share, st.tuples(st.integers(0, 17), damaged(*files)), attempt)
