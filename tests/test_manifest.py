"""The manifest: believed in nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_sets import edit_manifest, tiny_source

from mnistm_dist.data.manifest import parse, render
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pack(tiny_source(), tmp_path / "set", num_shards=3)
    return tmp_path / "set"


def test_the_manifest_survives_being_written_and_read(folder: Path) -> None:
    manifest = ShardSet.open(folder).manifest
    assert parse(render(manifest).encode(), "here") == manifest


def test_the_identity_is_that_of_the_content_wherever_it_came_from(folder: Path) -> None:
    before = ShardSet.open(folder).manifest.identity
    edit_manifest(folder, lambda value: value.update(description="elsewhere", layout="parquet"), signed=False)
    assert ShardSet.open(folder).manifest.identity == before


def test_a_manifest_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json in it"):
        ShardSet.open(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format_version": NaN}',
        b'{"a": ' + b"9" * 9000 + b"}",
    ],
    ids=["empty", "cut", "binary", "list", "null", "deep", "deep value", "nan", "huge"],
)
def test_a_manifest_that_is_not_json_is_refused_in_one_line(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        ShardSet.open(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def shard(value: dict[str, Any]) -> dict[str, Any]:
    return value["splits"]["train"]["shards"][0]


EDITS = {
    "other version": (lambda value: value.update(format_version=2), "format version 2"),
    "version as text": (lambda value: value.update(format_version="1"), "format_version"),
    "version as truth": (lambda value: value.update(format_version=True), "format_version"),
    "climbing name": (lambda value: shard(value).update(name="../x.tar"), "plain file name"),
    "absolute name": (lambda value: shard(value).update(name="/etc/passwd"), "plain file name"),
    "hidden name": (lambda value: shard(value).update(name=".x"), "plain file name"),
    "pipe": (lambda value: shard(value).update(name="pipe:touch x"), "plain file name"),
    "index climbs": (lambda value: value["splits"]["val"]["index"].update(name="a/b"), "plain file name"),
    "name twice": (lambda value: shard(value).update(name="val-000000.tar"), "twice"),
    "manifest as shard": (lambda value: shard(value).update(name="manifest.json"), "twice"),
    "sum of wrong letters": (lambda value: shard(value).update(sha256="z" * 64), "hexadecimal"),
    "sum too short": (lambda value: value["pixels_sha256"].update(test="0" * 63), "hexadecimal"),
    "no sum of test": (lambda value: value["pixels_sha256"].pop("test"), "hexadecimal|missing"),
    "count off": (lambda value: shard(value).update(count=shard(value)["count"] + 1), "do not add up"),
    "negative size": (lambda value: shard(value).update(size=-1), "whole number"),
    "size beyond 64 bits": (lambda value: shard(value).update(size=2**63), "whole number"),
    "float count": (lambda value: value["splits"]["val"].update(count=2.0), "whole number"),
    "shards as object": (lambda value: value["splits"]["val"].update(shards={}), "a list"),
    "shard as text": (lambda value: value["splits"]["val"].update(shards=["val-000000.tar"]), "object"),
    "split as list": (lambda value: value["splits"].update(val=[]), "object"),
    "unknown split": (lambda value: value["splits"].update(extra=value["splits"]["val"]), "unknown field"),
    "no splits": (lambda value: value.update(splits={}, pixels_sha256={}), "no split"),
    "empty split": (
        lambda value: value["splits"]["val"].update(count=0, shards=[], class_counts=[0] * 10),
        "do not add up",
    ),
    "nine class counts": (lambda value: value["splits"]["val"]["class_counts"].pop(), "10 whole numbers"),
    "mean beyond 1": (lambda value: value["splits"]["val"].update(mean=[0.5, 0.5, 1.5]), "0 to 1"),
    "std as truth": (lambda value: value["splits"]["val"].update(std=[True, 0.5, 0.5]), "0 to 1"),
    "unknown lineage": (lambda value: value.update(lineage="home-made"), "official, regenerated, unknown"),
    "classes twice": (lambda value: value.update(classes=["0"] * 10), "different names"),
    "image of no size": (lambda value: value.update(image_size=[0, 32]), "whole numbers"),
    "image too large": (lambda value: value.update(image_size=[32, 10**6]), "whole numbers"),
    "unknown field": (lambda value: value.update(extra=1), "unknown field"),
    "control codes": (lambda value: value.update(description="a\x1b[2Jb"), "one line of text"),
    "no identity": (lambda value: value.pop("seed"), "seed is missing"),
}


@pytest.mark.parametrize(("edit", "named"), EDITS.values(), ids=EDITS)
def test_a_hostile_manifest_is_refused_in_one_line(folder: Path, edit: Any, named: str) -> None:
    edit_manifest(folder, edit)
    with pytest.raises(UserError, match=named) as error:
        ShardSet.open(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_manifest_changed_by_hand_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda value: value.update(lineage="regenerated"), signed=False)
    with pytest.raises(UserError, match="identity"):
        ShardSet.open(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("valid") / "set"
    pack(tiny_source(), out, num_shards=2)
    return json.loads((out / "manifest.json").read_text())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_replaces_a_field_of_the_manifest_is_refused(valid: dict[str, Any], data: st.DataObject) -> None:
    value = copy.deepcopy(valid)
    place: Any = value
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    old, place[key] = place[key], data.draw(JSON)
    if place[key] == old or (place is value and key in ("layout", "description") and isinstance(place[key], str)):
        return
    with pytest.raises(UserError):
        parse(json.dumps(value).encode(), "manifest.json")
