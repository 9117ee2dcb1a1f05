"""Who holds a run folder, its state, its log."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from mnistm_dist.errors import UserError
from mnistm_dist.training import run_dir as run_folder
from mnistm_dist.training.run_dir import RunDir, is_locked, process_start, read_log, read_state


@pytest.fixture
def impatient(monkeypatch):
    """Another host's holder counts as dead after a second."""
    monkeypatch.setattr(run_folder, "FOREIGN_PATIENCE_SECONDS", 1.0)


def lock_of(folder, **holder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(holder))


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path):
    with RunDir(tmp_path / "run", active=True) as folder:
        assert is_locked(folder.path)
        with pytest.raises(UserError, match="held by a live run"):
            RunDir(folder.path, active=True)
    assert not is_locked(tmp_path / "run")
    with RunDir(tmp_path / "run", active=True):
        pass


def test_a_dead_holder_of_this_host_is_replaced_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock_of(tmp_path, host=socket.gethostname(), pid=child.pid, started=process_start(child.pid))
    assert is_locked(tmp_path)
    child.kill()
    child.wait()
    with RunDir(tmp_path, active=True):
        pass


def test_of_two_that_see_a_dead_holder_one_takes_its_place(tmp_path, monkeypatch):
    """The other one is as slow as can be: it looks at the dead holder's lock and comes back when that is replaced."""
    lock_of(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    looked, first = run_folder.holder_lives, []

    def overtaken(content, path):
        monkeypatch.setattr(run_folder, "holder_lives", looked)
        first.append(RunDir(tmp_path, active=True))
        return False

    monkeypatch.setattr(run_folder, "holder_lives", overtaken)
    with pytest.raises(UserError, match="held by a live run"):
        RunDir(tmp_path, active=True)
    assert is_locked(tmp_path)
    first[0].release()
    assert not list(tmp_path.glob(".lock*"))


def test_a_holder_that_lost_its_folder_leaves_the_next_ones_lock_alone(tmp_path):
    suspended = RunDir(tmp_path, active=True)
    lock_of(tmp_path, host="elsewhere", pid=1, started="1")
    suspended.release()
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "elsewhere"


def test_a_new_process_with_a_dead_holders_number_does_not_hold_its_folder(tmp_path):
    lock_of(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    assert not is_locked(tmp_path)


def test_a_holder_of_another_host_lives_while_its_lock_is_touched(tmp_path, impatient):
    lock_of(tmp_path, host="elsewhere", pid=1, started="1")
    touching = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.2)",
            tmp_path / ".lock",
        ]
    )
    time.sleep(0.5)
    try:
        with pytest.raises(UserError, match="elsewhere"):
            RunDir(tmp_path, active=True)
    finally:
        touching.kill()
        touching.wait()
    with RunDir(tmp_path, active=True):
        pass


def test_a_lock_that_was_cut_while_it_was_written_does_not_last(tmp_path, impatient):
    (tmp_path / ".lock").write_text('{"host": "el')
    with RunDir(tmp_path, active=True):
        pass


def test_the_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.05)
    with RunDir(tmp_path, active=True):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / ".lock").stat().st_mtime_ns > before


def test_an_error_is_told_as_failed(tmp_path):
    def fail() -> None:
        with RunDir(tmp_path, active=True) as folder:
            folder.steps_done = 7
            raise RuntimeError("the\nreason")

    with pytest.raises(RuntimeError):
        fail()
    assert read_state(tmp_path) == {"state": "failed", "step": 7, "reason": "RuntimeError: the reason"}


def test_the_log_is_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path):
    with RunDir(tmp_path, active=True) as folder:
        folder.cut_log(0)
        for step in (10, 20, 30):
            folder.log({"kind": "train", "step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [10, 20, 30]
    with RunDir(tmp_path, active=True) as folder:
        folder.cut_log(20)
        folder.log({"kind": "train", "step": 21})
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [10, 20, 21]


def test_a_row_that_cannot_be_written_is_written_with_the_next(tmp_path):
    with RunDir(tmp_path / "run", active=True) as folder:
        folder.log({"step": 1})
        (tmp_path / "run" / "log.jsonl").rename(tmp_path / "run" / "aside")
        (tmp_path / "run" / "log.jsonl").mkdir()
        folder.log({"step": 2})
        (tmp_path / "run" / "log.jsonl").rmdir()
        folder.log({"step": 3})
        folder.log({"step": 4})
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]


def test_a_rank_that_is_not_the_first_writes_nothing(tmp_path):
    with RunDir(tmp_path / "run", active=False) as folder:
        folder.cut_log(0)
        folder.log({"step": 1})
        folder.tell("running")
        folder.write("config.yaml", "")
    assert not (tmp_path / "run").exists()
