"""Verifying: every file checked, every image compared, damage named, nothing written."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_sets import edit_manifest, flip_byte, png_with, sign_files, tiny_source

from mnistm_dist.data.packing.verify import inspect
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError, run_cli
from mnistm_dist.verify import main


@pytest.fixture
def folder(tiny_copy: Path) -> Path:
    return tiny_copy


def statuses(folder: Path) -> dict[str, str]:
    """The status of each file."""
    return {finding.name: finding.status for finding in inspect(ShardSet.open(folder))}


def test_every_file_of_an_intact_set_is_ok(folder: Path) -> None:
    assert statuses(folder) == {path.name: "ok" for path in folder.iterdir()}


def cut_it(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_it(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["train-000001.tar", "val.index.npy"])
@pytest.mark.parametrize(
    ("damage", "status"),
    [(cut_it, "truncated"), (change_it, "changed"), (Path.unlink, "missing")],
    ids=["truncated", "changed", "missing"],
)
def test_exactly_the_damaged_file_is_named(
    folder: Path, name: str, damage: Callable[[Path], None], status: str
) -> None:
    damage(folder / name)
    assert {result: status for result, status in statuses(folder).items() if status != "ok"} == {name: status}


def test_all_damage_is_listed_at_once(folder: Path) -> None:
    cut_it(folder / "train-000000.tar")
    change_it(folder / "train-000001.tar")
    (folder / "train-000002.tar").rename(folder / "train-000003.tar")
    result = {name: status for name, status in statuses(folder).items() if status != "ok"}
    assert result == {
        "train-000000.tar": "truncated",
        "train-000001.tar": "changed",
        "train-000002.tar": "missing",
        "train-000003.tar": "extra",
    }


def test_a_text_file_beside_the_shards_is_harmless_but_another_tar_is_not(folder: Path) -> None:
    (folder / "README.txt").write_text("where I got it")
    assert set(statuses(folder).values()) == {"ok"}
    shutil.copy(folder / "train-000000.tar", folder / "train-000009.tar")
    assert statuses(folder)["train-000009.tar"] == "extra"


def swap_labels(folder: Path) -> None:
    index = np.load(folder / "train.index.npy", mmap_mode="r+")
    index["label"][0] = (index["label"][0] + 1) % 10
    index.flush()


def rename_member(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[7:8] = b"9"
    header = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)


def drop_last_sample(folder: Path) -> None:
    path = folder / "train-000000.tar"
    rows = np.load(folder / "train.index.npy")
    last = int(rows["offset"][: len(rows) // 3].max()) - 512
    path.write_bytes(path.read_bytes()[:last] + bytes(1024))


def append_a_member(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1024] + data[: int(512 + -(-rows_size(folder) // 512) * 512)] + bytes(1024))


def rows_size(folder: Path) -> int:
    return int(np.load(folder / "train.index.npy")["size"][0])


def hide_bytes_after_the_end(folder: Path) -> None:
    with (folder / "train-000000.tar").open("ab") as file:
        file.write(b"more" * 128)


def no_tar(folder: Path) -> None:
    (folder / "train-000000.tar").write_bytes(b"not a tar" * 1000)


def repeat_a_key(folder: Path) -> None:
    index = np.load(folder / "val.index.npy", mmap_mode="r+")
    index["key"][0] = index["key"][1]
    index.flush()


def edit_first_label(folder: Path, edit: Callable[[bytearray], None]) -> None:
    """Changes the header of the first ``.cls`` of a shard, and its checksum with it."""
    path = folder / "train-000000.tar"
    data, start = bytearray(path.read_bytes()), 512 + -(-rows_size(folder) // 512) * 512
    header = data[start : start + 512]
    edit(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header
    path.write_bytes(data)


def make_a_label_sparse(folder: Path) -> None:
    edit_first_label(folder, lambda header: header.__setitem__(156, ord("S")))


def make_a_label_a_gigabyte(folder: Path) -> None:
    edit_first_label(folder, lambda header: header.__setitem__(slice(124, 136), b"%011o\0" % (1 << 30)))


def write_a_senseless_extended_header(folder: Path) -> None:
    with tarfile.open(folder / "train-000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("00000000.png")
        member.pax_headers = {"GNU.sparse.map": "a,b"}
        tar.addfile(member)


FORGERIES = {
    "label": (swap_labels, "train-000000.tar"),
    "renamed member": (rename_member, "train-000000.tar"),
    "dropped sample": (drop_last_sample, "train-000000.tar"),
    "additional member": (append_a_member, "train-000000.tar"),
    "bytes after the end": (hide_bytes_after_the_end, "train-000000.tar"),
    "sparse label": (make_a_label_sparse, "train-000000.tar"),
    "label of a gigabyte": (make_a_label_a_gigabyte, "train-000000.tar"),
    "extended header": (write_a_senseless_extended_header, "train-000000.tar"),
    "not a tar": (no_tar, "train-000000.tar"),
    "repeated key": (repeat_a_key, "val-000000.tar"),
}


@pytest.mark.parametrize(("forge", "name"), FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_with_a_matching_manifest_is_found(folder: Path, forge: Callable[[Path], None], name: str) -> None:
    forge(folder)
    sign_files(folder)
    (result,) = (finding for finding in inspect(ShardSet.open(folder)) if finding.status != "ok")
    assert (result.name, result.status) == (name, "changed")
    assert re.search(r"\.(png|cls) is not as the index says|does not end after its last member", result.detail)


def swap_counts(value: dict[str, Any]) -> None:
    counts = value["splits"]["train"]["class_counts"]
    counts[0], counts[1] = counts[0] + 1, counts[1] - 1


LIES = {
    "pixels of the set": (lambda value: value["pixels_sha256"].update(test="0" * 64), "the pixels of test"),
    "pixels of a split": (lambda value: value["splits"]["val"].update(pixels_sha256="0" * 64), "the pixels of val"),
    "mean": (lambda value: value["splits"]["train"].update(mean=[0.5, 0.5, 0.5]), "the mean of train"),
    "std": (lambda value: value["splits"]["train"].update(std=[0.5, 0.5, 0.5]), "the std of train"),
    "class counts": (swap_counts, "the class counts of train"),
    "image size": (lambda value: value.update(image_size=[28, 28]), "32 x 32 pixels"),
}


@pytest.mark.parametrize(("lie", "named"), LIES.values(), ids=LIES)
def test_a_manifest_that_does_not_match_the_images_is_found(folder: Path, lie: Any, named: str) -> None:
    edit_manifest(folder, lie)
    result = [finding for finding in inspect(ShardSet.open(folder)) if finding.status != "ok"]
    assert [finding.name for finding in result] == ["manifest.json"]
    assert named in result[0].detail


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    pack(tiny_source(size=(4, 4)), tmp_path / "set", num_shards=1)
    path = tmp_path / "set" / "val-000000.tar"
    data, bad = bytearray(path.read_bytes()), png_with(4, 4, 8, 0)
    size = int(np.load(tmp_path / "set" / "val.index.npy")["size"][0])
    data[512 : 512 + size] = bad.ljust(size, b"\0")[:size]
    path.write_bytes(data)
    sign_files(tmp_path / "set")
    result = [finding for finding in inspect(ShardSet.open(tmp_path / "set")) if finding.status != "ok"]
    assert [finding.name for finding in result] == ["manifest.json"]
    assert ".png of val: a PNG of 8 bits, grey" in result[0].detail


def test_progress_counts_images_to_the_end(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    inspect(ShardSet.open(folder), lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (30, 30)


def test_the_command_prints_one_line_for_an_intact_set_and_the_damage_of_another(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert main([str(folder)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "images/s" not in line)
    assert "is intact: 21 train, 2 val, 7 test" in line
    change_it(folder / "test-000000.tar")
    with pytest.raises(UserError, match=r"1 of 8 files are damaged, the first is test-000000\.tar \(changed"):
        main([str(folder)])
    printed = capsys.readouterr().out
    assert "changed   test-000000.tar: its sha256" in printed
    assert "train-000000.tar" not in printed
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("spoil", [Path.unlink, cut_it, change_it], ids=["missing", "truncated", "changed"])
def test_a_damaged_manifest_is_an_error_of_one_line(
    folder: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder / "manifest.json")
    assert run_cli(main, [str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
