"""A process that is killed or stops responding, in any phase: the others report it and end in bounded time, and the
next launch ends like an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_folders import is_locked
from uninterrupted import FLAGS, STEPS, assert_ended_alike, error_lines

from mnistm_dist.data.parallel import available_cores
from mnistm_dist.training.run_dir import read_state

pytest_plugins = ["uninterrupted"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process to kill."""

    phase: str
    rank: int
    world_size: int
    step: int
    """The step in state.json, if another process is left to write it."""
    fast: bool = False
    """Whether it belongs to the fast tests."""

    def __str__(self) -> str:
        return f"{self.phase}, rank {self.rank} of {self.world_size}"


TABLE = (
    Row(phase="decoding", rank=0, world_size=1, step=0),
    Row(phase="training", rank=0, world_size=1, step=0),
    Row(phase="saving", rank=0, world_size=1, step=0),
    Row(phase="evaluating", rank=0, world_size=1, step=0),
    Row(phase="predicting", rank=0, world_size=1, step=0),
    Row(phase="drawing", rank=0, world_size=1, step=0),
    Row(phase="summing up", rank=0, world_size=1, step=0),
    Row(phase="reporting", rank=0, world_size=1, step=0),
    Row(phase="training", rank=0, world_size=2, step=8, fast=True),
    Row(phase="training", rank=1, world_size=2, step=8),
    Row(phase="saving", rank=0, world_size=2, step=6),
    Row(phase="evaluating", rank=0, world_size=2, step=10),
    Row(phase="evaluating", rank=1, world_size=2, step=10),
    Row(phase="predicting", rank=0, world_size=2, step=STEPS),
    Row(phase="predicting", rank=1, world_size=2, step=STEPS),
    Row(phase="drawing", rank=0, world_size=2, step=STEPS),
)
SILENT = (
    Row(phase="training", rank=0, world_size=2, step=8),
    Row(phase="training", rank=1, world_size=2, step=8),
    Row(phase="saving", rank=0, world_size=2, step=6),
    Row(phase="evaluating", rank=1, world_size=2, step=10),
)


def rows(table: tuple[Row, ...]) -> list:
    return [pytest.param(row, id=str(row), marks=() if row.fast else pytest.mark.slow) for row in table]


def launch(start, small_set, row: Row, fault: str, *extra: str):
    where = {"FAULT": fault, "FAULT_PHASE": row.phase, "FAULT_RANK": str(row.rank)}
    flags = ("--shards", small_set, "--run-dir", "run", "--cache-dir", "cache", "--resume", "auto", *FLAGS, *extra)
    return start("train", *flags, world_size=row.world_size, before="injected:in_phase", **where)


def goes_on(run_command, small_set, tmp_path, row: Row, uninterrupted) -> None:
    flags = ("--shards", small_set, "--run-dir", "run", "--cache-dir", "cache", "--resume", "auto", *FLAGS)
    done = run_command("train", *flags, world_size=row.world_size, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_ended_alike(tmp_path / "run", uninterrupted(row.world_size))


@pytest.mark.parametrize("row", rows(TABLE))
def test_the_remaining_processes_report_a_killed_one_and_the_resumed_run_ends_the_same(
    start, run_command, small_set, tmp_path, uninterrupted, row
):
    done = launch(start, small_set, row, "SIGKILL").wait(100)
    assert done.returncode == (137 if row.world_size > 1 else -signal.SIGKILL)
    state, message = read_state(tmp_path / "run"), error_lines(done.stderr)
    assert not is_locked(tmp_path / "run")
    if row.world_size == 1:
        assert message == []
        assert state.get("state", "running") == "running"
    else:
        (line,) = message
        assert f"rank {1 - row.rank} on" in line
        assert "another process of the run was killed" in line
        assert "--resume auto" in line
        assert (state["state"], state["step"]) == ("failed", row.step)
        assert "another process of the run was killed" in state["reason"]
    goes_on(run_command, small_set, tmp_path, row, uninterrupted)


@pytest.mark.parametrize("row", rows(SILENT))
def test_a_process_that_stops_responding_is_reported_after_the_collective_timeout(
    start, run_command, small_set, tmp_path, uninterrupted, row
):
    """No connection is closed, as when a node leaves the network."""
    process = launch(start, small_set, row, "SIGSTOP", "--collective-timeout", "15")
    stderr, deadline = process.command.stderr, time.monotonic() + 90
    while not (stderr.exists() and stderr.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (line,) = error_lines(stderr.read_text())
    assert f"rank {1 - row.rank} on" in line
    assert "silent for --collective-timeout 15 s" in line
    if row.rank == 1:
        assert (read_state(tmp_path / "run") or {})["state"] == "failed"
    process.kill()
    goes_on(run_command, small_set, tmp_path, row, uninterrupted)


@pytest.mark.slow
@pytest.mark.skipif(available_cores() == 1, reason="one core: pack works without workers")
def test_a_worker_of_pack_that_is_killed_ends_it_with_one_line_and_leaves_nothing(environment, tmp_path):
    command = [sys.executable, "-m", "mnistm_dist.pack", "sample", "--out", "set"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    victims: list[int] = []
    deadline = time.monotonic() + 60
    while not victims and time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victims = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert victims, "pack had no workers"
    os.kill(victims[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = error_lines(stderr)
    assert "a worker process of" in line
    assert not list(tmp_path.glob("*set*"))
