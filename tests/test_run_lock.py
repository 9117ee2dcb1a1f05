"""One process holds a run folder at a time; a dead owner's lock is taken over."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from run_folders import is_locked

from mnistm_dist import run_lock
from mnistm_dist.errors import UserError
from mnistm_dist.run_lock import RunLock
from mnistm_dist.training.run_dir import read_state, write_state, write_state_for_dead_owner

HOLD = """
import sys, time
from pathlib import Path
from mnistm_dist import run_lock
run_lock.LEASE_SECONDS, run_lock.HEARTBEAT_SECONDS = 1.5, 0.2
lock = run_lock.RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""

needs_pid_namespaces = pytest.mark.skipif(
    subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode != 0,
    reason="this user may not create PID namespaces",
)


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


def test_a_copy_of_a_live_run_is_not_held_and_the_run_is(tmp_path, owner, short_lease):
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    RunLock(copy).release()
    with pytest.raises(UserError, match="held by a live run"):
        RunLock(tmp_path)


@needs_pid_namespaces
@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_in_another_pid_namespace_lives_while_its_lock_is_touched(tmp_path, alive):
    """Two containers with one host name: the pid of the owner is this process's, or nobody's."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c"]
    owner = subprocess.Popen([*container, HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"held\n"
    if not alive:
        owner.kill()
        owner.wait()
    other = subprocess.run([*container, HOLD.replace("60", "0"), str(tmp_path)], capture_output=True, text=True)
    owner.kill()
    assert ("held by a live run" in other.stderr) == alive
    assert ("held" in other.stdout) == (not alive)


def test_the_state_of_a_killed_owner_is_written_when_it_is_reaped(tmp_path, owner, short_lease):
    owner.kill()
    reap = threading.Timer(0.8, owner.wait)
    reap.start()
    write_state_for_dead_owner(tmp_path, 3, "killed")
    reap.join()
    assert (read_state(tmp_path) or {})["state"] == "failed"


def test_the_state_that_an_owner_writes_at_its_end_is_kept(tmp_path):
    lock = RunLock(tmp_path)
    write_state(tmp_path, "failed", 3, "UserError: the disk is full")
    release = threading.Timer(0.5, lock.release)
    release.start()
    write_state_for_dead_owner(tmp_path, 3, "killed")
    release.join()
    assert (read_state(tmp_path) or {})["reason"] == "UserError: the disk is full"
