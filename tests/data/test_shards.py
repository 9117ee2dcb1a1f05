"""Reading a packed set: any sample, in any order."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import DAMAGES, damage_by_flip, damage_by_flip_with_times_put_back, label_of, pixels_of, tiny_source

from mnistm_dist.data.image_io import decode_png
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


@pytest.fixture
def folder(tiny_copy: Path) -> Path:
    return tiny_copy


def place_of(key: str) -> tuple[str, int]:
    """The split of the tiny source, and the place in it, of a key."""
    return ("test", int(key[1:])) if key[0] == "t" else ("train", int(key))


def test_every_sample_is_read_by_its_id_in_any_order(folder: Path) -> None:
    shards = ShardSet.open(folder)
    for split in ("train", "val", "test"):
        ids = np.random.default_rng(0).permutation(shards.split(split).count)
        for key, png, label in zip(
            shards.keys(split, ids), shards.read(split, ids), shards.labels(split)[ids], strict=True
        ):
            source_split, index = place_of(key)
            assert np.array_equal(decode_png(png, key, (32, 32)), pixels_of(source_split, index))
            assert label == label_of(source_split, index)


def test_ids_may_repeat_or_be_empty_but_must_exist(folder: Path) -> None:
    shards = ShardSet.open(folder)
    first, second = shards.read("val", [1, 1])
    assert first == second
    assert shards.read("val", []) == [] == shards.keys("val", [])
    with pytest.raises(IndexError):
        shards.read("val", [shards.split("val").count])


def test_an_open_set_can_be_pickled(folder: Path) -> None:
    shards = ShardSet.open(folder)
    assert pickle.loads(pickle.dumps(shards)).read("train", [3]) == shards.read("train", [3])


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    pack(tiny_source(test=0), tmp_path / "set")
    with pytest.raises(UserError, match="no test split; choose one of train, val"):
        ShardSet.open(tmp_path / "set").labels("test")


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("none", "no such folder"),
        ("empty", "no manifest.json in it"),
        ("file", "a file"),
        ("file/x", "no such folder"),
        ("a" * 300, "too long"),
    ],
)
def test_a_path_without_a_packed_set_is_refused(tmp_path: Path, name: str, result: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match=result):
        ShardSet.open(tmp_path / name)


@pytest.mark.parametrize(("damage", "status"), DAMAGES.values(), ids=DAMAGES)
def test_reading_finds_a_shard_that_is_missing_or_of_another_size(folder: Path, damage: Any, status: str) -> None:
    shards = ShardSet.open(folder)
    everything = range(shards.split("train").count)
    damage(folder / "train-000001.tar")
    if damage in (damage_by_flip, damage_by_flip_with_times_put_back):
        shards.read("train", everything)  # only `check` finds a changed byte
    else:
        with pytest.raises(UserError, match=r"train-000001\.tar"):
            shards.read("train", everything)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", -5), ("offset", 2**62), ("size", -1), ("size", 2**31 - 1), ("label", 10), ("label", -1)],
)
def test_an_index_that_points_outside_is_refused(folder: Path, field: str, value: int) -> None:
    path = folder / "train.index.npy"
    index = np.load(path, mmap_mode="r+")
    index[field][0] = value
    index.flush()
    shards = ShardSet.open(folder)
    with pytest.raises(UserError, match=r"train.*copy the set again"):
        shards.labels("train") if field == "label" else shards.read("train", [0])


def test_an_index_whose_rows_overlap_is_refused(folder: Path) -> None:
    index = np.load(folder / "train.index.npy", mmap_mode="r+")
    index["offset"][1] = index["offset"][0] + 1
    index.flush()
    shards = ShardSet.open(folder)
    with pytest.raises(UserError, match="does not fit its shards"):
        shards.read("train", [0, 1])


def test_numpy_reads_an_index(folder: Path) -> None:
    for split, entry in ShardSet.open(folder).manifest.splits.items():
        assert np.array_equal(np.load(folder / entry.index.name), ShardSet.open(folder).index(split))


def test_a_read_only_set_is_read_and_checked(folder: Path, tmp_path: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    shards = ShardSet.open(folder)
    shards.check(["train", "val", "test"], record=tmp_path / "record.json")
    assert len(shards.read("train", range(5))) == 5
    folder.chmod(0o755)
