"""Faults that a test injects into a process of a run: `processes.py` calls one of these before the command."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mnistm_dist import results as scoring
from mnistm_dist.data import resident
from mnistm_dist.data.loader import Batch, Reader
from mnistm_dist.errors import UserError
from mnistm_dist.reporting import figures, html
from mnistm_dist.training import checkpoint, distributed, evaluation, preemption, setup
from mnistm_dist.training import step as training_step
from mnistm_dist.training import trainer as loop

CLONE_NEWNS, MS_RDONLY, MS_REC, MS_PRIVATE = 0x20000, 1, 0x4000, 0x40000


# Disks


def read_only_disk() -> None:
    """Make the folder ``disk`` a read-only file system."""
    _mount("disk", "size=64m", MS_RDONLY)


def full_disk() -> None:
    """Make the folder ``disk`` a full file system."""
    _mount("disk", "size=4k")
    Path("disk/filling").write_bytes(bytes(4096))


def small_disk() -> None:
    """Make the folder ``disk`` a file system with room for small files but for no checkpoint."""
    _mount("disk", "size=1m")


def _mount(folder: str, options: str, flags: int = 0) -> None:
    """Mount a tmpfs in a mount namespace of this process; it ends with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options.encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def a_folder_for_each_rank() -> None:
    """Give each rank its own working folder, as on nodes without a shared file system."""
    own = Path(f"rank{os.environ['RANK']}")
    own.mkdir(exist_ok=True)
    os.chdir(own)


# Time


def a_second_a_look() -> None:
    """Let the clock of the training loop advance by a second at each reading, and not otherwise."""
    seconds = itertools.count()
    preemption.time = SimpleNamespace(monotonic=lambda: float(next(seconds)))  # type: ignore[attr-defined]


# Joining


def die_before_the_control_group() -> None:
    """Kill rank 1 between joining and the creation of the control group."""
    original = distributed._control_group

    def create(timeout: timedelta) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(timeout)

    distributed._control_group = create


# Hardware


def native_bf16() -> None:
    """Claim that the CPU has bf16, with AVX-512 alone."""
    torch.cpu._is_avx512_bf16_supported = lambda: True


def gpus_that_do_not_work() -> None:
    """Claim two GPUs on a machine without a driver."""
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)


def fail_the_first_collective() -> None:
    """Let NCCL refuse the GPU of rank 1, in the words of torch 2.14, when the ranks first communicate."""
    original = distributed.dist.all_reduce

    def all_reduce(*arguments: Any, **extra: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise distributed.dist.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version "
                "2.28.9\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
                "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 65000\nException raised from create"
            )
        return original(*arguments, **extra)

    distributed.dist.all_reduce = all_reduce  # type: ignore[assignment]


# User errors


def mistake_on_one_rank() -> None:
    """Raise a user error on rank FAULT_RANK only, during the training."""
    original = loop.Trainer.log_training

    def log_training(self: loop.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        if self.world.rank == int(os.environ["FAULT_RANK"]):
            raise UserError(f"a mistake that only rank {self.world.rank} finds")

    loop.Trainer.log_training = log_training  # type: ignore[method-assign]


# Faults of one rank in one phase

FAULT, RANK, PHASE = "FAULT", "FAULT_RANK", "FAULT_PHASE"
"""Environment variables: the fault (a name in `FAULTS` or of a signal), the rank, and the phase (in `PHASES`)."""

PHASES: dict[str, tuple[Any, str, int]] = {
    "opening": (resident, "set_entry", 1),
    "decoding": (resident, "_save_stamp", 1),
    "training": (training_step, "train_step", 9),
    "saving": (checkpoint, "_write_tensors", 4),
    "evaluating": (evaluation, "_predict", 1),
    "predicting": (scoring, "write_split", 1),
    "drawing": (figures, "mistakes", 1),
    "summing up": (scoring, "write_summary", 1),
    "reporting": (html, "write_report", 1),
}
"""For each phase a function of it, and at which of its calls the fault occurs: the 9th step, the second file of the
second checkpoint, ..."""


def fill_disk() -> None:
    """Fill the disk ``disk``."""
    with Path("disk/filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def alter_shards() -> None:
    """Change a byte in the middle of every train shard in ``altered``."""
    for path in Path("altered").glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def wait_for_go() -> None:
    """Create the file ``waits``, then wait for a file ``go``, at most a minute."""
    Path("waits").touch()
    deadline = time.monotonic() + 60
    while not Path("go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


FAULTS: dict[str, Callable[[], None]] = {"full disk": fill_disk, "altered shards": alter_shards, "wait": wait_for_go}


def in_phase() -> None:
    """Inject the fault into this process when it reaches the phase, if its rank is FAULT_RANK."""
    if os.environ.get("RANK", "0") != os.environ.get(RANK, "0"):
        return
    owner, name, at = PHASES[os.environ[PHASE]]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def hit(*arguments: Any, **extra: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            fault = os.environ[FAULT]
            if fault in FAULTS:
                FAULTS[fault]()
            else:
                os.kill(os.getpid(), getattr(signal, fault))
        return original(*arguments, **extra)

    setattr(owner, name, hit)


# Records


def record_batches() -> None:
    """Append ``[step, [id, ...]]`` to ``consumed-RANK.jsonl`` before each training step."""
    original = setup.train_batches
    path = Path(f"consumed-{os.environ.get('RANK', '0')}.jsonl")

    def recorded(reader: Reader, *args: Any, start_step: int = 0, **kwargs: Any) -> Iterator[list[Batch]]:
        batches = original(reader, *args, start_step=start_step, **kwargs)
        for step, micro_batches in enumerate(batches, start=start_step):
            ids = [int(sample) for batch in micro_batches for sample in batch.ids]
            with path.open("a") as file:
                file.write(json.dumps([step, ids]) + "\n")
            yield micro_batches

    setup.train_batches = recorded
