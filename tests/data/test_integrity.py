"""The check of files finds all damage and hashes nothing twice."""

from __future__ import annotations

import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from packed_sets import DAMAGES, flip_byte

from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError

OLD_ENOUGH = 0.12
"""Seconds: a file younger than a tenth of a second is not recorded."""


@pytest.fixture
def folder(tiny_copy: Path) -> Path:
    return tiny_copy


def test_an_intact_set_passes_the_check_with_and_without_a_record(folder: Path, tmp_path: Path) -> None:
    shards, seen = ShardSet.open(folder), []
    shards.check(["train", "val", "test"], record=None, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(claim.size for claim in shards.files(["train", "val", "test"]).values())
    for _ in range(2):
        shards.check(["train"], record=tmp_path / "cache" / "record.json")


@pytest.mark.parametrize(("name", "recorded"), [("train-000001.tar", True), ("train.index.npy", False)])
@pytest.mark.parametrize(("damage", "status"), DAMAGES.values(), ids=DAMAGES)
def test_the_check_names_the_damaged_file(
    folder: Path, tmp_path: Path, name: str, recorded: bool, damage: Any, status: str
) -> None:
    shards, record = ShardSet.open(folder), tmp_path / "record.json"
    if recorded:
        time.sleep(OLD_ENOUGH)
        shards.check(["train"], record=record)
        assert len(json.loads(record.read_text())) == 4
    damage(folder / name)
    with pytest.raises(UserError, match=rf"{name}: {status}"):
        shards.check(["train"], record=record if recorded else None)


def test_the_check_finds_a_cut_at_a_header_which_tar_readers_do_not(folder: Path) -> None:
    shards, path = ShardSet.open(folder), folder / "train-000000.tar"
    count = shards.split("train").shards[0].count
    os.truncate(path, int(shards.index("train")["offset"][count - 1]) - 512)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 2 * count - 2
    with pytest.raises(UserError, match=r"train-000000\.tar: truncated"):
        shards.check(["train"], record=None)


def test_the_check_counts_the_damaged_files(folder: Path) -> None:
    for path in folder.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar.*2 more files are damaged"):
        ShardSet.open(folder).check(["train", "val"], record=None)


def test_a_record_saves_hashing_what_has_not_changed(folder: Path, tmp_path: Path) -> None:
    shards, record = ShardSet.open(folder), tmp_path / "record.json"
    time.sleep(OLD_ENOUGH)
    shards.check(["val"], record=record)
    entries = json.loads(record.read_text())
    # A record with another hash is not trusted: the file is hashed, found intact, and the record corrected.
    path = next(path for path in entries if path.endswith(".tar"))
    entries[path][1] = "0" * 64
    record.write_text(json.dumps(entries))
    shards.check(["val"], record=record)
    assert json.loads(record.read_text())[path][1] != "0" * 64
    # A record whose stamp fits is trusted without reading the file, even if it is wrong.
    flip_byte(Path(path), 700)
    state = Path(path).stat()
    entries = json.loads(record.read_text())
    entries[path][0] = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    record.write_text(json.dumps(entries))
    shards.check(["val"], record=record)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}'])
def test_a_damaged_record_is_replaced(folder: Path, tmp_path: Path, content: bytes) -> None:
    record = tmp_path / "record.json"
    record.write_bytes(content)
    time.sleep(OLD_ENOUGH)
    ShardSet.open(folder).check(["val"], record=record)
    assert len([path for path in json.loads(record.read_text()) if "val" in path]) == 2


def test_a_record_that_cannot_be_written_is_ignored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    time.sleep(OLD_ENOUGH)
    ShardSet.open(folder).check(["val"], record=tmp_path / "file" / "record.json")
