"""A packed set is complete or absent, after kills, full disks and concurrent packs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from packed_sets import names_in, tiny_source, write_official
from processes import server

from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.base import Sample
from mnistm_dist.errors import UserError
from mnistm_dist.files import staged_folder
from mnistm_dist.reporting.console import Console
from mnistm_dist.training import setup as launch

ROOT = Path(__file__).resolve().parents[2]


def make_folder(path: Path) -> None:
    path.mkdir()


def make_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("keep me")


def make_file(path: Path) -> None:
    path.write_text("keep me")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_folder, make_full_folder, make_file, make_dangling_link])
def test_an_existing_path_is_never_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    with pytest.raises(UserError, match="already exists"):
        pack(tiny_source(), tmp_path / "set")
    assert names_in(tmp_path) == ["set"]
    if make is make_full_folder:
        assert (tmp_path / "set" / "precious").read_text() == "keep me"


def test_a_folder_that_appears_during_packing_is_not_replaced(tmp_path: Path) -> None:
    def spoil(sample: Sample) -> Sample:
        if (sample.split, sample.index) == ("train", 0):
            make_full_folder(tmp_path / "set")
        return sample

    with pytest.raises(UserError, match="set: cannot be written"):
        pack(tiny_source(spoil=spoil), tmp_path / "set")
    assert (tmp_path / "set" / "precious").read_text() == "keep me"
    assert names_in(tmp_path) == ["set"]


def test_an_unwritable_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file" / "set", tmp_path / ("n" * 300), tmp_path / "none" / ".."):
        with pytest.raises(UserError):
            pack(tiny_source(), out)
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("kilobytes", [8, 64, 100])
def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(tmp_path: Path, kilobytes: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small disk can be mounted by root only")
    try:
        with pytest.raises(UserError, match=r"No space left on device.*free some space"):
            pack(tiny_source(), disk / "set")
        assert names_in(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def _try_to_pack(out: Path) -> str:
    try:
        pack(tiny_source(), out)
    except UserError as error:
        return str(error)
    return "packed"


def test_of_many_packs_at_once_one_wins_and_the_others_are_refused(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=server()) as pool:
        outcomes = list(pool.map(_try_to_pack, [tmp_path / "set"] * 8))
    assert outcomes.count("packed") == 1
    others = [outcome for outcome in outcomes if outcome != "packed"]
    assert all("already exists" in outcome or "is being written" in outcome for outcome in others)
    assert names_in(tmp_path) == ["set"]
    ShardSet.open(tmp_path / "set").check(["train", "val", "test"], record=None)


def test_a_second_pack_is_refused_with_the_process_that_writes(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "set") as folder:
        (folder / "something").write_text("of the first one")
        with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on"):
            pack(tiny_source(), tmp_path / "set")
    assert names_in(tmp_path / "set") == ["something"]


SLOW_PACK = """
import sys, time
from pathlib import Path
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.sources.catalog import open_source

def progress(done, total):
    if done > total * 2 // 3:  # while the shards are written
        print("here", flush=True)
        time.sleep(60)

pack(open_source(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


def test_a_killed_pack_leaves_nothing_that_looks_complete_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    official = write_official(tmp_path / "in", 400, 20)
    command = [sys.executable, "-c", SLOW_PACK, official, tmp_path / "out" / "set"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    assert names_in(tmp_path / "out") == [".set.lock", ".set.partial"]
    with pytest.raises(UserError):
        ShardSet.open(tmp_path / "out" / ".set.partial")
    pack(tiny_source(), tmp_path / "out" / "set")
    assert names_in(tmp_path / "out") == ["set"]


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tiny_source(), tmp_path / "new" / "set", progress=interrupt)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_launch_waits_while_another_process_packs_the_bundled_sample(tmp_path, monkeypatch, ends_well):
    """Two nodes of a run, or two runs, may begin at once in one folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "SAMPLE_POLL_SECONDS", 0.05)
    monkeypatch.setattr(launch, "open_source", lambda _: tiny_source())
    writes = threading.Event()

    def other() -> None:
        with contextlib.suppress(KeyError), staged_folder(launch.SAMPLE) as folder:
            writes.set()
            time.sleep(0.5)
            if not ends_well:
                raise KeyError("it fails")
            (folder / "manifest.json").write_text("the other's")

    thread = threading.Thread(target=other)
    thread.start()
    writes.wait()
    launch.pack_sample(Console(enabled=False))
    thread.join()
    assert ((launch.SAMPLE / "manifest.json").read_text() == "the other's") == ends_well
