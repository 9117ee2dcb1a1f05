"""Precision, threads and devices of a process."""

import os
import socket
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import error_of

from mnistm_dist.errors import NodeError, UserError
from mnistm_dist.training import hardware
from mnistm_dist.training.hardware import CoreWatch, choose_precision, find_device, native_precisions

CPU, BF16_CPU = ("fp32",), ("bf16", "fp32")
V100, A100 = ("fp32", "fp16"), ("bf16", "fp32", "fp16")


@pytest.mark.parametrize(
    ("launcher", "native", "chosen"),
    [
        # The same without a launcher, with a launcher without a precision, and by slurm/train.sh.
        (None, A100, "bf16"),
        ("no", A100, "bf16"),
        ("bf16", A100, "bf16"),
        ("fp16", A100, "fp16"),
        ("fp8", A100, "bf16"),
        (None, V100, "fp32"),
        ("bf16", V100, "fp32"),
        ("fp16", V100, "fp16"),
        ("bf16", CPU, "fp32"),
        ("fp16", CPU, "fp32"),
        ("no", BF16_CPU, "bf16"),
        (None, BF16_CPU, "bf16"),
        ("fp16", BF16_CPU, "bf16"),
    ],
)
def test_auto_is_bf16_where_native_whatever_starts_the_run_unless_a_launcher_asks_for_fp16(launcher, native, chosen):
    assert choose_precision("auto", launcher, native) == chosen


def test_a_precision_that_is_named_is_taken_or_refused_but_never_emulated():
    assert choose_precision("fp32", "bf16", A100) == "fp32"
    assert choose_precision("fp16", "no", V100) == "fp16"
    with pytest.raises(UserError, match="bf16 would be emulated"):
        choose_precision("bf16", "bf16", V100)


@pytest.mark.parametrize(
    ("amx", "avx512", "precisions"), [(1, 1, ("bf16", "fp32")), (0, 1, ("bf16", "fp32")), (0, 0, ("fp32",))]
)
def test_a_cpu_has_bf16_if_torch_finds_its_instructions(monkeypatch, amx, avx512, precisions):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    assert native_precisions("cpu") == precisions


# GPUs


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine with an NVIDIA driver and a GPU that torch cannot use."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 2021")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)

    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old (found version 11040)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    return tmp_path


def test_a_gpu_that_torch_cannot_use_is_an_error_that_names_driver_and_reason(driver):
    with pytest.raises(NodeError, match=r"NVIDIA driver is 470\.57\.02 \(The NVIDIA driver on your system is too old"):
        find_device({})


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_not_missed(driver, hidden):
    assert find_device({"CUDA_VISIBLE_DEVICES": hidden}) == "cpu"


def test_a_job_without_gpus_on_a_node_with_a_driver_trains_on_the_cpu(driver):
    (driver / "nvidia0").unlink()
    assert find_device({}) == "cpu"


def test_the_cpu_that_the_launcher_asks_for_is_used_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device({"ACCELERATE_USE_CPU": "True"}) == "cpu"


def test_more_processes_than_gpus_are_refused_by_the_node_that_has_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = rf"2 on {socket.gethostname()}, torch finds 1 GPUs \(CUDA_VISIBLE_DEVICES: 3\).* all GPUs of its node"
    with pytest.raises(NodeError, match=message):
        find_device({"CUDA_VISIBLE_DEVICES": "3", "LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_gpus_of_which_none_works_are_one_line(run_command, small_set, trained_run, command):
    of_run = {"evaluate": (trained_run,), "predict": (trained_run, trained_run / "mistakes_val.png")}
    arguments = of_run.get(command, ("--shards", small_set, "--run-dir", "run"))
    error = error_of(run_command(command, *arguments, before="injected:gpus_that_do_not_work"))
    assert f"cuda:0 on {socket.gethostname()} cannot be used: Found no NVIDIA driver" in error


def test_tests_do_not_see_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


# Cores

SPIN = "import sys, time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_busy_cores_are_noticed_once():
    allowed, core = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    try:
        watch = CoreWatch(seconds=0.5)
        with subprocess.Popen([sys.executable, "-c", SPIN]) as other:
            time.sleep(0.3)
            assert watch.warning() is None
            spin(1.0)
            assert "the CPU cores are busy" in watch.warning()
            spin(1.0)
            assert watch.warning() is None
            other.kill()
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_process_that_waits_for_something_else_does_not_blame_the_cores():
    watch = CoreWatch(seconds=0.5)
    time.sleep(0.6)
    assert watch.warning() is None
