"""Other jobs and services: two jobs in one folder or one cache, shards that are modified, a server that hangs."""

import os
import shutil
import signal
import time

import pytest
from conftest import error_of, output_of
from uninterrupted import FLAGS, STREAMING, assert_ended_alike, error_lines
from wandb_files import server

from mnistm_dist.training.run_dir import read_state

pytest_plugins = ["uninterrupted"]


def wait_for(path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come in a minute"
        time.sleep(0.02)


def test_of_two_jobs_that_start_in_one_folder_one_trains(start, small_set, tmp_path, uninterrupted):
    flags = ("--shards", small_set, "--run-dir", "run", "--resume", "auto", *FLAGS)
    jobs = [start("train", *flags), start("train", *flags)]
    ended = sorted((job.wait(120) for job in jobs), key=lambda done: done.returncode)
    assert ended[0].returncode == 0, ended[0].stderr
    if ended[1].returncode == 0:
        # It started after the other had finished.
        assert "is finished" in ended[1].stderr
    else:
        line = error_of(ended[1])
        assert "held by a live run" in line or "another job has trained in it" in line
    assert_ended_alike(tmp_path / "run", uninterrupted())


def test_a_job_that_acquires_the_folder_late_keeps_the_training_of_the_other(
    start, run_command, small_set, tmp_path, uninterrupted
):
    """It read the folder before the other job began, and waited for its data while the other trained."""
    flags = ("--shards", small_set, "--run-dir", "run", "--resume", "auto", *FLAGS)
    late = start("train", *flags, before="injected:in_phase", FAULT="wait", FAULT_PHASE="opening")
    wait_for(tmp_path / "waits")
    output_of(run_command("train", *flags))
    (tmp_path / "go").touch()
    assert "another job has trained in it since this one started (step 0 then, 20 now)" in error_of(late.wait(60))
    assert_ended_alike(tmp_path / "run", uninterrupted())


@pytest.mark.slow
def test_a_job_that_waits_for_a_cache_takes_over_when_the_one_that_writes_it_is_killed(
    start, small_set, tmp_path, uninterrupted
):
    flags = ("--shards", small_set, "--cache-dir", "cache", *FLAGS)
    first = start(
        "train", *flags, "--run-dir", "first", before="injected:in_phase", FAULT="wait", FAULT_PHASE="decoding"
    )
    wait_for(tmp_path / "waits")
    second = start("train", *flags, "--run-dir", "run")
    time.sleep(3)
    assert second.poll() is None
    assert not (tmp_path / "run").exists()
    os.kill(first.pid, signal.SIGKILL)
    output_of(second.wait(100))
    assert_ended_alike(tmp_path / "run", uninterrupted())
    assert not list((tmp_path / "cache").rglob("*.partial"))


def altered_run(run_command, small_set, tmp_path, *extra: str):
    """Run a training whose shards are modified at its ninth step; return its flags and its end."""
    shutil.copytree(small_set, tmp_path / "altered")
    flags = ("--shards", "altered", "--run-dir", "run", "--cache-dir", "cache", "--resume", "auto", *FLAGS, *extra)
    fault = {"FAULT": "altered shards", "FAULT_PHASE": "training"}
    return flags, run_command("train", *flags, before="injected:in_phase", timeout=100, **fault)


def test_modified_shards_do_not_change_a_resident_run_and_the_next_launch_names_one(
    run_command, small_set, tmp_path, uninterrupted
):
    flags, done = altered_run(run_command, small_set, tmp_path)
    output_of(done)
    assert_ended_alike(tmp_path / "run", uninterrupted())
    assert "altered/train-" in error_of(run_command("train", *flags, "--run-dir", "another"))
    assert not (tmp_path / "another").exists()


def test_modified_shards_end_a_streaming_run_by_name_and_once_restored_it_ends_the_same(
    run_command, small_set, tmp_path, uninterrupted
):
    flags, done = altered_run(run_command, small_set, tmp_path, *STREAMING)
    line = error_of(done)
    assert "altered/train-" in line
    assert "copy the set again" in line
    state = read_state(tmp_path / "run")
    assert state["state"] == "failed"
    assert 8 <= state["step"] < 20
    assert "altered/train-" in error_of(run_command("train", *flags))
    shutil.rmtree(tmp_path / "altered")
    shutil.copytree(small_set, tmp_path / "altered")
    output_of(run_command("train", *flags))
    assert_ended_alike(tmp_path / "run", uninterrupted(1, *STREAMING))


@pytest.mark.slow
def test_a_run_whose_wandb_settings_are_refused_is_offline_and_ends_the_same(
    run_command, small_set, tmp_path, uninterrupted
):
    flags = ("--shards", small_set, "--run-dir", "run", *FLAGS, "--tracker", "wandb")
    done = run_command("train", *flags, WANDB_MODE="nonsense", WANDB_API_KEY="0123456789" * 4)
    assert "W&B is offline (1 validation error for Settings mode" in output_of(done)
    assert error_lines(done.stderr) == []
    shutil.rmtree(tmp_path / "run" / "wandb")
    assert_ended_alike(tmp_path / "run", uninterrupted())


@pytest.mark.slow
def test_a_run_whose_wandb_server_hangs_ends_the_same_half_a_minute_later_at_most(
    run_command, small_set, tmp_path, uninterrupted
):
    flags = [flag for flag in FLAGS if flag not in ("--tracker", "none")]
    with server("stalls") as address:
        keys = {
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_BASE_URL": address,
            "HOME": str(tmp_path),
        }
        done = run_command("train", "--shards", small_set, "--run-dir", "run", *flags, "--tracker", "wandb", **keys)
    message = output_of(done)
    assert "W&B is offline (" in message
    assert error_lines(done.stderr) == []
    shutil.rmtree(tmp_path / "run" / "wandb")
    assert_ended_alike(tmp_path / "run", uninterrupted())
