"""The cache of decoded sets: filled once, never incomplete, and rebuilt if it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TRAIN
from packed_sets import flip_byte, tiny_source
from processes import server

from mnistm_dist.data import cache as cache_module
from mnistm_dist.data import resident as resident_module
from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.resident import Resident, open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError


def decode(folder: Path, cache_dir: Path, seen: list[tuple[int, int]] | None = None) -> Resident:
    progress = None if seen is None else lambda *now: seen.append(now)
    return open_resident(
        ShardSet.open(folder), "train", cache_dir=cache_dir, device="cpu", workers=1, progress=progress
    )


def decoded_file(cache_dir: Path) -> Path:
    (path,) = cache_dir.glob("sets/*/train.u8")
    return path


def test_a_second_launch_decodes_nothing(small_set, tmp_path):
    first = decode(small_set, tmp_path)
    before = decoded_file(tmp_path).stat()
    seen: list[tuple[int, int]] = []
    second = decode(small_set, tmp_path, seen)
    after = decoded_file(tmp_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert seen[-1] == (TRAIN, TRAIN)
    assert np.array_equal(first.images.numpy(), second.images.numpy())


def test_progress_goes_up_to_all_images(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(resident_module, "_CHUNK_BYTES", 20 * 28 * 28 * 3)
    seen: list[tuple[int, int]] = []
    decode(small_set, tmp_path, seen)
    assert seen == sorted(seen)
    assert len(seen) > TRAIN / 20
    assert seen[-1] == (TRAIN, TRAIN)


def test_the_file_is_not_sparse(small_set, tmp_path):
    decode(small_set, tmp_path)
    state = decoded_file(tmp_path).stat()
    assert state.st_blocks * 512 >= state.st_size


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: flip_byte(path, 5_000),
        lambda path: path.unlink(),
        lambda path: path.with_name("checked.json").unlink(),
        lambda path: path.with_name("checked.json").write_text("{"),
        lambda path: path.with_name("checked.json").write_text(json.dumps({str(path): {"sha256": 1}})),
    ],
    ids=["truncated", "one byte", "missing", "without its record", "broken record", "wrong record"],
)
def test_a_damaged_cache_is_rebuilt(damage, small_set, tmp_path):
    images = decode(small_set, tmp_path).images.numpy().copy()
    damage(decoded_file(tmp_path))
    assert np.array_equal(decode(small_set, tmp_path).images.numpy(), images)


def test_a_decoded_file_that_was_copied_is_hashed_and_kept(small_set, tmp_path):
    images = decode(small_set, tmp_path).images.numpy().copy()
    path = decoded_file(tmp_path)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    inode = path.stat().st_ino
    assert np.array_equal(decode(small_set, tmp_path).images.numpy(), images)
    assert path.stat().st_ino == inode


def test_another_set_has_another_entry(small_set, tmp_path):
    pack(tiny_source(), tmp_path / "set")
    decode(small_set, tmp_path / "cache")
    decode(tmp_path / "set", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("sets/*/train.u8"))) == 2


def killed_while_decoding(folder: Path, cache_dir: Path) -> None:
    resident_module._CHUNK_BYTES = 20 * 28 * 28 * 3

    def kill(done: int, total: int) -> None:
        if done > 0.7 * total:
            os.kill(os.getpid(), signal.SIGKILL)

    open_resident(ShardSet.open(folder), "train", cache_dir=cache_dir, device="cpu", workers=2, progress=kill)


def test_a_killed_decode_leaves_nothing_that_looks_complete_and_the_next_one_succeeds(small_set, tmp_path):
    process = server().Process(target=killed_while_decoding, args=(small_set, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "sets").iterdir()
    assert list(folder.glob(".train.*.u8"))
    assert not (folder / "train.u8").exists()
    decode(small_set, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["checked.json", "train.u8"]


def count_decoded(folder: Path, cache_dir: Path, ready, answers) -> None:
    """Open the set when all are ready; answer how often this process decoded, and the sum of the images."""
    resident_module._CHUNK_BYTES = 20 * 28 * 28 * 3
    decoded = []
    decode_to = resident_module._decode_to

    def counted(*arguments):
        decoded.append(1)
        return decode_to(*arguments)

    resident_module._decode_to = counted
    ready.wait()
    images = decode(folder, cache_dir).images
    answers.put((len(decoded), int(images.long().sum())))


def test_processes_that_come_together_decode_once(small_set, tmp_path):
    ready, answers = server().Barrier(2), server().Queue()
    processes = [server().Process(target=count_decoded, args=(small_set, tmp_path, ready, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    result = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum(count for count, _ in result) == 1
    assert len({total for _, total in result}) == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "while writing"])
def test_a_full_disk_is_named_with_what_is_needed(foreseen, small_set, small_disk, monkeypatch):
    if not foreseen:
        # As if another program had filled the disk after its free space was checked.
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    with pytest.raises(UserError) as caught:
        decode(small_set, small_disk / "cache")
    message = str(caught.value)
    assert str(small_disk) in message
    assert "1 MB are needed" in message
    assert "--cache-dir" in message
    assert not list(small_disk.rglob("train.u8*"))


def test_a_cache_folder_that_cannot_be_made_is_named(small_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir") as caught:
        decode(small_set, tmp_path / "file" / "cache")
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_world_writable_folder_of_another_user_is_refused(small_set, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        decode(small_set, tmp_path / "cache")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"MNISTM_DIST_CACHE": "/a/b", "SLURM_JOB_ID": "1"}, "/a/b"),
        ({"SLURM_JOB_ID": "1", "SLURM_TMPDIR": "/local/1", "TMPDIR": "/t"}, f"/local/1/mnistm_dist-{os.getuid()}"),
        ({"SLURM_JOB_ID": "1", "TMPDIR": "/t", "XDG_CACHE_HOME": "/x"}, f"/t/mnistm_dist-{os.getuid()}"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/mnistm_dist"),
        ({"HOME": "/h"}, "/h/.cache/mnistm_dist"),
    ],
)
def test_the_cache_folder_is_chosen_from_the_environment(variables, place, monkeypatch):
    for name in ("MNISTM_DIST_CACHE", "SLURM_JOB_ID", "SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_cache_dir(None) == Path(place)


def test_a_mapped_split_survives_the_removal_of_the_cache(small_set, tmp_path):
    resident = decode(small_set, tmp_path / "cache")
    before = int(resident.images.long().sum())
    shutil.rmtree(tmp_path / "cache")
    assert int(resident.images.long().sum()) == before
    decode(small_set, tmp_path / "cache")
