"""One process holds a run folder at a time; a dead owner's lock is taken over."""

import os
import subprocess
import sys
import time

import pytest
from run_folders import is_locked

from mnistm_dist.errors import UserError
from mnistm_dist.training import run_lock
from mnistm_dist.training.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from mnistm_dist.training import run_lock
run_lock.LEASE_SECONDS, run_lock.HEARTBEAT_SECONDS = 1.5, 0.2
lock = run_lock.RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def short_lease(monkeypatch):
    """An owner on another host counts as dead after 1.5 seconds."""
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def move_to_another_host(folder) -> None:
    """Make the lock look as if it were another host's; its owner does not touch it any more."""
    path = folder / ".lock"
    content = path.read_text().splitlines()
    path.write_text("\n".join("host=elsewhere" if line.startswith("host=") else line for line in content) + "\n")


def test_a_folder_is_held_by_one_process_and_free_afterwards(tmp_path):
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="held by a live run"):
            RunLock(tmp_path)
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_live_owner_of_this_host_is_named_at_once(tmp_path, owner, short_lease):
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"held by a live run \(pid {owner.pid} on "):
        RunLock(tmp_path)
    assert time.monotonic() - started < 10


def test_a_dead_owner_of_this_host_is_replaced_at_once(tmp_path, owner, short_lease):
    owner.kill()
    owner.wait()
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started < 1


def test_a_killed_owner_that_is_not_reaped_is_replaced(tmp_path, owner, short_lease):
    """As in a container whose first process reaps late or never."""
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    RunLock(tmp_path).release()


def test_an_owner_on_another_host_counts_as_dead_when_its_lock_is_no_longer_touched(tmp_path, owner, short_lease):
    owner.kill()
    owner.wait()
    move_to_another_host(tmp_path)
    started = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started > 1.4


def test_an_owner_on_another_host_lives_while_its_lock_is_touched(tmp_path, owner, short_lease):
    move_to_another_host(tmp_path)
    with pytest.raises(UserError, match="elsewhere"):
        RunLock(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunLock(tmp_path / "file")
