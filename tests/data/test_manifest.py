"""The manifest: written and read without loss, and refused if anything in it does not fit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_sets import edit_manifest

from mnistm_dist.data.manifest import index_dtype, open_index, parse, render
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


def test_a_manifest_is_read_as_it_was_written(tiny_set: Path) -> None:
    data = (tiny_set / "manifest.json").read_bytes()
    manifest = parse(data, "here")
    assert render(manifest).encode() == data
    assert list(manifest.splits) == ["train", "val", "test"]
    assert manifest.splits["train"].shard_starts.tolist() == [0, 7, 14, 21]


def test_the_identity_does_not_depend_on_where_the_images_came_from(tiny_copy: Path) -> None:
    before = ShardSet.open(tiny_copy).manifest.identity
    edit_manifest(tiny_copy, lambda value: value.update(description="elsewhere", layout="parquet"), signed=False)
    assert ShardSet.open(tiny_copy).manifest.identity == before


def test_the_identity_of_version_1_is_golden() -> None:
    """A golden value: the cache, runs and reports name sets by it."""
    file = {"name": "a.tar", "size": 1, "sha256": "0" * 64}
    split = {
        "count": 1,
        "class_counts": [1, 0],
        "mean": [0.1, 0.25, 1],
        "std": [0, 0.5, 1.0],
        "pixels_sha256": "1" * 64,
        "index": {**file, "name": "a.npy"},
        "shards": [{**file, "count": 1}],
    }
    identity = "9e83f897de5a65b9d38ba5dec5078c3e072edc87f708efef17df5afb377d4a89"
    content = {
        "format_version": 1,
        "lineage": "unknown",
        "layout": "x",
        "description": "y",
        "classes": ["a", "b"],
        "image_size": [28, 30],
        "seed": 7,
        "pixels_sha256": {"train+val": "2" * 64},
        "splits": {"train": split},
        "identity": identity,
    }
    assert parse(json.dumps(content).encode(), "here").identity == identity


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"format_version": NaN}'],
    ids=["empty", "truncated", "binary", "list", "null", "deep", "nan"],
)
def test_a_manifest_that_is_not_a_json_object_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^here: ") as error:
        parse(data, "here")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def shard(value: dict[str, Any]) -> dict[str, Any]:
    return value["splits"]["train"]["shards"][0]


def val(value: dict[str, Any]) -> dict[str, Any]:
    return value["splits"]["val"]


EDITS = {
    "another version": (lambda value: value.update(format_version=2), "format_version: .*found 2"),
    "version true": (lambda value: value.update(format_version=True), "format_version"),
    "name of another folder": (lambda value: shard(value).update(name="../x.tar"), r"train: shards: 0: name: .*\.\./x"),
    "absolute name": (lambda value: shard(value).update(name="/etc/passwd"), "name"),
    "hidden name": (lambda value: shard(value).update(name=".x"), "name"),
    "pipe": (lambda value: shard(value).update(name="pipe:touch x"), "name"),
    "index in another folder": (lambda value: val(value)["index"].update(name="a/b"), "index: name"),
    "two files of one name": (lambda value: shard(value).update(name="val-000000.tar"), "same name"),
    "manifest as shard": (lambda value: shard(value).update(name="manifest.json"), "same name"),
    "hash not hexadecimal": (lambda value: shard(value).update(sha256="z" * 64), "sha256"),
    "hash too short": (lambda value: value["pixels_sha256"].update(test="0" * 63), "pixels_sha256: test"),
    "no pixel hash of test": (lambda value: value["pixels_sha256"].pop("test"), r"keys train\+val, test"),
    "count of a shard": (lambda value: shard(value).update(count=shard(value)["count"] + 1), "do not add up"),
    "negative size": (lambda value: shard(value).update(size=-1), "greater than or equal to 1"),
    "size beyond 64 bits": (lambda value: shard(value).update(size=2**63), "less than"),
    "float count": (lambda value: val(value).update(count=2.0), "integer"),
    "shards as object": (lambda value: val(value).update(shards={}), "valid tuple"),
    "unknown split": (lambda value: value["splits"].update(extra=val(value)), "unknown split 'extra'"),
    "no splits": (lambda value: value.update(splits={}, pixels_sha256={}), "splits"),
    "empty split": (lambda value: val(value).update(count=0, shards=[], class_counts=[0] * 10), "do not add up"),
    "nine class counts": (lambda value: val(value)["class_counts"].pop(), "do not add up|10 numbers"),
    "mean beyond 1": (lambda value: val(value).update(mean=[0.5, 0.5, 1.5]), "mean: 2: .*1.5"),
    "std true": (lambda value: val(value).update(std=[True, 0.5, 0.5]), "std: 0"),
    "unknown lineage": (lambda value: value.update(lineage="home-made"), r"official\|regenerated\|unknown"),
    "two classes of one name": (lambda value: value.update(classes=["0"] * 10), "same name"),
    "image without size": (lambda value: value.update(image_size=[0, 32]), "image_size: 0"),
    "image too large": (lambda value: value.update(image_size=[32, 10**6]), "image_size: 1: .*1024"),
    "unknown field": (lambda value: value.update(extra=1), "extra: Extra inputs"),
    "control characters": (lambda value: value.update(description="a\x1b[2Jb"), "description: String should match"),
    "missing field": (lambda value: value.pop("seed"), "seed: Field required"),
}


@pytest.mark.parametrize(("edit", "named"), EDITS.values(), ids=EDITS)
def test_a_manifest_that_does_not_fit_is_refused_in_one_line(tiny_copy: Path, edit: Any, named: str) -> None:
    edit_manifest(tiny_copy, edit)
    with pytest.raises(UserError, match=named) as error:
        ShardSet.open(tiny_copy)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_manifest_that_was_changed_by_hand_is_refused(tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda value: value.update(lineage="regenerated"), signed=False)
    with pytest.raises(UserError, match="identity does not match"):
        ShardSet.open(tiny_copy)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 191), byte=st.binary(min_size=1, max_size=3))
def test_an_index_with_a_damaged_header_is_refused_or_the_same(
    place: int, byte: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(path, np.zeros(5, dtype=index_dtype(8)))
    good = path.read_bytes()
    path.write_bytes(good[:place] + byte + good[place + len(byte) :])
    result = ""
    with contextlib.suppress(UserError):
        result = str(open_index(path, 5).shape)
    assert result in ("", "(5,)")


@pytest.mark.parametrize("array", [np.zeros(5), np.zeros(4, index_dtype(8)), np.array([{}] * 5)])
def test_an_array_that_is_not_the_index_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"x\.npy: "):
        open_index(tmp_path / "x.npy", 5)
