"""Precision, threads and devices of a process."""

import os
import subprocess
import sys
import time

import pytest

from mnistm_dist.errors import UserError
from mnistm_dist.training import hardware
from mnistm_dist.training.hardware import CoreWatch, choose_precision

CPU, V100, A100 = ("fp32",), ("fp32", "fp16"), ("fp32", "fp16", "bf16")


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
    ],
)
def test_auto_is_bf16_where_native_whatever_starts_the_run(launcher, native, chosen):
    assert choose_precision("auto", launcher, native) == chosen


def test_a_precision_that_is_named_is_taken_or_refused_but_never_emulated():
    assert choose_precision("fp32", "bf16", A100) == "fp32"
    assert choose_precision("fp16", "no", V100) == "fp16"
    with pytest.raises(UserError, match="bf16 would be emulated"):
        choose_precision("bf16", "bf16", V100)


SPIN = "import sys, time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_busy_cores_are_noticed_once(monkeypatch):
    monkeypatch.setattr(hardware, "BUSY_SECONDS", 0.5)
    allowed, core = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    try:
        watch = CoreWatch()
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


def test_a_process_that_waits_for_something_else_does_not_blame_the_cores(monkeypatch):
    monkeypatch.setattr(hardware, "BUSY_SECONDS", 0.5)
    watch = CoreWatch()
    time.sleep(0.6)
    assert watch.warning() is None
