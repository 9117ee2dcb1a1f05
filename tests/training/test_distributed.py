"""Failures of a launch: each time one line, in bounded time, and no run folder."""

import contextlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, error_of, launcher, output_of
from torch.distributed.run import get_args_parser

from mnistm_dist.errors import UserError
from mnistm_dist.training.hardware import check_launcher, check_world_size, default_threads
from mnistm_dist.training.run_dir import read_state, write_state

QUICK = (
    *("--recipe", "fast", "--batch-size", 32, "--image-size", 28, "--epochs", 2, "--max-steps", 4),
    *("--threads", 1, "--precision", "fp32", "--no-report"),
)
needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="only root may mount a file system of its own",
)


@pytest.fixture
def launched(environment, tmp_path):
    """Run a command line in an empty folder."""

    def run(*command: object, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of the trainers, among the launcher's own lines."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def rank(number: int, *, head: str, port: int) -> dict[str, str]:
    """The variables of one of two processes on two nodes."""
    return {
        **{"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": head, "MASTER_PORT": str(port)},
    }


# World size


def test_a_world_of_another_size_than_expected_is_refused():
    check_world_size(2, 2, {})
    check_world_size(2, None, {})
    with pytest.raises(UserError, match="found 2, --expect-world-size is 3"):
        check_world_size(2, 3, {})


def test_a_world_smaller_than_the_slurm_step_is_refused_and_a_larger_one_is_accepted():
    check_world_size(2, None, {"SLURM_STEP_NUM_TASKS": "2"})
    check_world_size(8, None, {"SLURM_STEP_NUM_TASKS": "2"})
    check_world_size(1, None, {"SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_MAX_RESTARTS": "3"})
    with pytest.raises(UserError, match="Slurm's step has 2 tasks"):
        check_world_size(1, None, {"SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "found RANK=1; LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_PORT, MASTER_ADDR must be set"),
        ({"LOCAL_RANK": "0"}, "found LOCAL_RANK=0; RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "found WORLD_SIZE=; RANK, LOCAL_RANK, WORLD_SIZE"),
        ({**rank(0, head="h", port=1), "MASTER_ADDR": ""}, "MASTER_ADDR=; MASTER_ADDR must be set"),
        ({**rank(2, head="h", port=1)}, "RANK, which counts from 0, must be set"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, accepted is DDP"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused_by_name(variables, named):
    check_launcher({})
    check_launcher({"RANK": "0", "WORLD_SIZE": "1"})
    check_launcher(rank(1, head="h", port=1))
    with pytest.raises(UserError, match=re.escape(named)):
        check_launcher(variables)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_processes_of_open_mpi_without_an_address_are_refused(run_command, small_set, trained_run, command):
    """They have ranks, and nothing to find one another by."""
    variables = {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    arguments = ("--shards", small_set) if command == "train" else (trained_run,)
    done = run_command(command, *arguments, **{f"OMPI_COMM_WORLD_{name}": value for name, value in variables.items()})
    assert "MASTER_PORT, MASTER_ADDR must be set" in error_of(done)


@pytest.mark.slow
def test_two_processes_find_one_another_by_an_ipv6_address(start, small_set, tmp_path, free_port):
    flags = ("--shards", small_set, "--run-dir", "run", *QUICK, "--max-steps", 1)
    for process in [start("train", *flags, **rank(n, head="::1", port=free_port)) for n in (0, 1)]:
        output_of(process.wait(100))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_two_processes_of_open_mpi_train(start, small_set, tmp_path, free_port):
    flags = ("--shards", small_set, "--run-dir", "run", *QUICK, "--max-steps", 1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    size = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    ranks = ({"OMPI_COMM_WORLD_RANK": n, "OMPI_COMM_WORLD_LOCAL_RANK": n} for n in "01")
    for process in [start("train", *flags, **address, **size, **own) for own in ranks]:
        output_of(process.wait(100))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    "launch", ["debug_launcher(main, (flags,), 2)", "notebook_launcher(main, (flags,), 2, 'no', PORT)"]
)
def test_accelerates_launchers_for_notebooks_train(launched, small_set, tmp_path, free_port, launch):
    flags = ["--shards", str(small_set), "--run-dir", "run", *map(str, QUICK), "--collective-timeout", "20"]
    script = f"""
from accelerate import debug_launcher, notebook_launcher
from mnistm_dist.train import main
PORT, flags = "{free_port}", {flags}
{launch}
"""
    done = launched(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def test_settings_of_accelerate_that_are_the_trainers_own_change_nothing(run_command, small_set, tmp_path):
    flags = ("--shards", small_set, *QUICK, "--max-steps", 1)
    settings = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    for name, extra in (("plain", {}), ("set", settings)):
        output_of(run_command("train", *flags, "--run-dir", name, **extra))
    plain, with_settings = sorted(tmp_path.glob("*/checkpoints/step-00000001/model.safetensors"))
    assert plain.read_bytes() == with_settings.read_bytes()


def test_threads_are_slurms_cpus_per_task_or_a_share_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert default_threads(1, {}) == cores
    assert default_threads(2 * cores, {}) == 1
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "7"}
    assert default_threads(1, {**step, "WORLD_SIZE": "2"}) == 7
    # A launcher on each node, with two processes of its own.
    assert default_threads(2, {**step, "WORLD_SIZE": "4"}) == 3


# Launchers


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["one", "two, whose port is in use"]
)
def test_the_projects_accelerate_config_starts_the_number_of_processes_asked_for(
    launched, small_set, tmp_path, taken_port, world_size
):
    """Accelerate warns and chooses another port if all processes are on one machine."""
    asked = ("--num_processes", 2, "--main_process_port", taken_port) if world_size == 2 else ()
    configured = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_config.yaml", *asked)
    trainer = ("-m", "mnistm_dist.train", "--shards", small_set, "--run-dir", "run", *QUICK)
    done = launched(sys.executable, *configured, *trainer)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == world_size


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--expect-world-size", 3], "world size: found 2"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_of_two_processes_one_prints_a_user_error(run_command, small_set, tmp_path, flags, named):
    assert named in error_of(run_command("train", "--shards", small_set, "--run-dir", "run", *flags, world_size=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [("--resume", "nowhere"), ("--recipe", "nowhere.yaml")])
def test_before_the_process_group_exists_a_user_error_is_printed_once_per_node(run_command, flags):
    second_node = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert flags[1] in error_of(run_command("train", *flags, **second_node))


@pytest.mark.slow
def test_under_the_launcher_a_user_error_is_printed_once(launched, small_set, tmp_path):
    flags = ("--shards", small_set, "--run-dir", "run", "--expect-world-size", 3)
    done = launched(sys.executable, *launcher(2), "-m", "mnistm_dist.train", *flags)
    assert "world size: found 2, --expect-world-size is 3" in the_error(done)
    assert not (tmp_path / "run").exists()


# Rendezvous


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_a_port_in_use_is_reported_at_once_by_the_head(run_command, small_set, taken_port):
    error = error_of(
        run_command("train", "--shards", small_set, timeout=60, **rank(0, head="127.0.0.1", port=taken_port))
    )
    assert f"rendezvous at 127.0.0.1:{taken_port}" in error
    assert "address already in use" in error


@pytest.mark.parametrize("head", ["192.0.2.1", "no-such-host.invalid"], ids=["silent", "unknown"])
def test_a_node_that_cannot_reach_the_head_reports_it(run_command, small_set, free_port, head):
    began = time.monotonic()
    flags = ("--shards", small_set, "--collective-timeout", 3)
    error = error_of(run_command("train", *flags, timeout=60, **rank(1, head=head, port=free_port)))
    assert f"head node {head}:{free_port}: rank 1 on {socket.gethostname()} cannot reach it" in error
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_a_head_that_cannot_resolve_its_own_name_reports_it(run_command, small_set, free_port):
    flags = ("--shards", small_set, "--collective-timeout", 3)
    error = error_of(run_command("train", *flags, timeout=60, **rank(0, head="no-such-host.invalid", port=free_port)))
    assert f"head node no-such-host.invalid:{free_port}: rank 0 on {socket.gethostname()} cannot reach it" in error


def test_a_head_that_no_process_joins_reports_it(run_command, small_set, free_port):
    flags = ("--shards", small_set, "--collective-timeout", 3)
    error = error_of(run_command("train", *flags, timeout=60, **rank(0, head="127.0.0.1", port=free_port)))
    assert "all 2 processes started" in error


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_a_process_that_waits_for_the_others_at_once(start, small_set, free_port, number):
    process = start("train", "--shards", small_set, **rank(0, head="127.0.0.1", port=free_port))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", free_port)):
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20).returncode == -number


def test_a_rank_that_dies_while_joining_ends_the_others_after_the_collective_timeout(run_command, small_set):
    flags = ("--shards", small_set, "--collective-timeout", 3)
    done = run_command("train", *flags, world_size=2, timeout=60, before="injected:die_before_the_control_group")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "all 2 processes started and live" in line


def test_an_error_of_nccl_is_reported_by_its_rank_before_decoding(run_command, small_set, cache_dir):
    shutil.rmtree(cache_dir, ignore_errors=True)
    flags = ("--shards", small_set, "--collective-timeout", 20)
    done = run_command("train", *flags, world_size=2, timeout=60, before="injected:fail_the_first_collective")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (nccl,) = (line for line in lines if "rank 1" in line)
    assert "(Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000); check" in nccl
    assert "NCCL error in: NCCLUtils.cpp:77, invalid usage" in nccl
    assert len(lines) == 2, done.stderr
    assert not list(cache_dir.glob("**/*.u8"))


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_no_flag_is_taken_by_a_launcher(command, run_main):
    """Their parsers look for their own options, and torchrun's for abbreviations of them, behind the script's name."""
    main = importlib.import_module(f"mnistm_dist.{command}").main
    flags = set(re.findall(r"--[a-z][a-z0-9-]+(?![\w-])", run_main(main, "--help").stdout)) - {"--help"}
    assert flags
    script = ["-m", f"mnistm_dist.{command}"]
    for parser in (get_args_parser(), launch_command_parser()):
        for flag in sorted(flags):
            arguments = [flag, "1"]
            assert parser.parse_args([*script, *arguments]).training_script_args == arguments


# The run folder


@needs_mounts
@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        pytest.param("read_only_disk", "Read-only file system", marks=pytest.mark.slow),
        pytest.param("full_disk", "No space left on device", marks=pytest.mark.slow),
        ("small_disk", "No space left on device"),
    ],
)
def test_a_run_folder_that_cannot_be_written_is_an_error_of_one_line(run_command, small_set, tmp_path, disk, reason):
    (tmp_path / "disk").mkdir()
    flags = ("--shards", small_set, "--run-dir", "disk/run", *QUICK)
    error = error_of(run_command("train", *flags, world_size=2, before=f"injected:{disk}", timeout=120))
    assert "disk/run" in error
    assert reason in error


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_checkpoint_minutes_saves_once_per_interval(run_command, small_set, tmp_path, world_size):
    clock = ("--checkpoint-every", 0, "--checkpoint-minutes", 0.1, "--keep-checkpoints", 100, "--max-steps", 20)
    flags = ("--shards", small_set, "--run-dir", "run", *QUICK, *clock)
    output_of(run_command("train", *flags, world_size=world_size, before="injected:a_second_a_look"))
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    # The tenth and the twentieth step end an epoch.
    assert steps[0] in (7, 8)
    assert not any(after - before == 1 for before, after in itertools.pairwise(steps)), steps


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_user_error_on_one_rank_is_reported_and_ends_all_ranks_in_bounded_time(
    run_command, small_set, tmp_path, rank
):
    flags = ("--shards", small_set, "--run-dir", "run", *QUICK)
    injected = {"before": "injected:mistake_on_one_rank", "FAULT_RANK": str(rank)}
    done = run_command("train", *flags, world_size=2, timeout=100, **injected)
    assert f"error: a mistake that only rank {rank} finds" in done.stderr.splitlines()
    assert read_state(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow
def test_nodes_without_a_shared_run_folder_finish_and_are_refused_at_a_resume(run_command, small_set, tmp_path):
    flags = ("--shards", small_set, "--run-dir", "run", "--resume", "auto", *QUICK)
    apart = {"world_size": 2, "before": "injected:a_folder_for_each_rank", "timeout": 120}
    output_of(run_command("train", *flags, **apart))
    run = tmp_path / "rank0" / "run"
    assert read_state(run)["state"] == "finished"
    assert (run / "predictions_val.csv").stat().st_size > 0
    assert not (tmp_path / "rank1" / "run").exists()
    write_state(run, "preempted", 4)
    error = error_of(run_command("train", *flags, **apart))
    assert "of rank 1 on " in error
    assert error.endswith("on nodes of one kind, with the run folder on a file system that all nodes see")
    (tmp_path / "rank1" / "run").mkdir()
    (tmp_path / "rank1" / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    result = run / "checkpoints" / "step-00000004"
    (tmp_path / "rank1" / "run" / "checkpoints").mkdir()
    shutil.copytree(result, tmp_path / "rank1" / "run" / "checkpoints" / "step-00000002")
    error = error_of(run_command("train", *flags, **apart))
    assert error.startswith("error: checkpoint run/checkpoints/step-00000004: rank 0 on ")
