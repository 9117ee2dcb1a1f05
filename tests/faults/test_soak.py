"""A long run of tiny steps with saves, evaluations, signals, kills and resumes: memory, handles and disk stay flat.

    pytest -m soak tests/faults/test_soak.py                                  five minutes
    MNISTM_DIST_SOAK_SECONDS=3600 pytest -m soak tests/faults/test_soak.py    an hour

The curve goes to ``soak.csv`` and its one line to ``soak.txt`` in the folder $MNISTM_DIST_SOAK_DIR (default: the
test's own, whose name is printed).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import launcher
from processes import alive, wait_until_gone

from mnistm_dist.training.run_dir import read_log, read_state

SECONDS = float(os.environ.get("MNISTM_DIST_SOAK_SECONDS", "300"))
LAUNCH_SECONDS = max(45.0, min(300.0, SECONDS / 6))
"""Long enough to measure growth within a launch."""
FLAGS = (
    *("--recipe", "fast", "--batch-size", "32", "--micro-batch", "16", "--image-size", "28", "--epochs", "1000000"),
    *("--checkpoint-every", "5", "--evaluate-every", "2", "--log-every", "100", "--threads", "1", "--tracker", "none"),
    *("--resume", "auto", "--no-report"),
)
MEMORY_SHARE, MEMORY_MB = 0.03, 16.0
"""Allowed growth of the memory of a launch, from its second third to its last."""
HANDLES, DISK_MB = 4.0, 4.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Resources of all processes of the run at one time."""

    seconds: float
    launch: int
    processes: int
    step: int
    memory_mb: float
    """Resident, private and shared, summed over the trainers."""
    handles: int
    """Open files and sockets of the trainers."""
    disk_mb: float
    """Of the run folder without ``log.jsonl``, which has a row more each epoch, by design."""
    log_mb: float


def sampled(run: Path, began: float, launch: int) -> Sample:
    memory, handles, pids = 0, 0, alive(run)
    trainers = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            if "accelerate.commands.launch" in Path(f"/proc/{pid}/cmdline").read_text():
                continue
            handles += len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # no Path of a process that may be gone
            memory += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            trainers += 1
        except (OSError, StopIteration):
            continue
    sizes = {}
    # rglob fails if a folder is renamed or removed meanwhile.
    for folder, _, names in os.walk(run):
        for name in names:
            with suppress(OSError):
                size = Path(folder, name).lstat().st_size
                sizes[name == "log.jsonl"] = sizes.get(name == "log.jsonl", 0) + size
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    return Sample(
        seconds=round(time.monotonic() - began, 1),
        launch=launch,
        processes=trainers,
        step=max(steps, default=0),
        memory_mb=round(memory / 1024, 1),
        handles=handles,
        disk_mb=round(sizes.get(False, 0) / 1e6, 3),
        log_mb=round(sizes.get(True, 0) / 1e6, 3),
    )


def launches(environment: dict[str, str], cwd: Path, run: Path, shards: Path, began: float) -> Iterator[Sample]:
    """Launches of two processes and of one in turn, ended by a signal and by SIGKILL in turn."""
    for launch, world_size in zip(itertools.count(), itertools.cycle((2, 1)), strict=False):
        command = [sys.executable, *launcher(world_size), "-m", "mnistm_dist.train", "--shards", str(shards)]
        with (cwd / f"launch-{launch}.log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--run-dir", str(run), *FLAGS],
                cwd=cwd,
                env=environment,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until, ends_well = min(time.monotonic() + LAUNCH_SECONDS, began + SECONDS), False
        try:
            while time.monotonic() < until:
                time.sleep(1)
                assert process.poll() is None, (cwd / f"launch-{launch}.log").read_text()[-3000:]
                sample = sampled(run, began, launch)
                if sample.processes == world_size:
                    yield sample
            ends_well = launch % 4 in (0, 1)
        finally:
            if ends_well:
                process.send_signal(signal.SIGTERM)
            else:
                for pid in alive(run):
                    os.kill(pid, signal.SIGKILL)
        process.wait(60)
        wait_until_gone(run, 60)
        if until >= began + SECONDS:
            return


def thirds(samples: list[Sample], value: Callable[[Sample], float]) -> tuple[float, float]:
    """Medians of the second third and of the last."""
    third = max(1, len(samples) // 3)
    return statistics.median(map(value, samples[third : 2 * third] or samples)), statistics.median(
        map(value, samples[-third:])
    )


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_memory_handles_and_disk_stay_flat(environment, tmp_path, small_set):
    out, run, began = Path(os.environ.get("MNISTM_DIST_SOAK_DIR", tmp_path)), tmp_path / "run", time.monotonic()
    names = [field.name for field in dataclasses.fields(Sample)]
    samples: list[Sample] = []
    with (out / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for sample in launches(environment, tmp_path, run, small_set, began):
            samples.append(sample)
            writer.writerow(dataclasses.asdict(sample))
            file.flush()
    of_launch = [list(group) for _, group in itertools.groupby(samples, lambda sample: sample.launch)]
    # A launch's first third is its start; one that was cut short has no thirds to compare.
    long = [group for group in of_launch if len(group) >= 15 and group[-1].step > group[0].step]
    assert long, f"no launch trained for 15 s: {out / 'soak.csv'}"
    parts = [
        f"{samples[-1].seconds:.0f} s, {max(sample.step for sample in samples)} steps, {len(of_launch) - 1} restarts"
    ]
    for name in ("memory_mb", "handles", "disk_mb"):
        for size in (1, 2):
            left = [thirds(group, lambda s: getattr(s, name)) for group in long if group[0].processes == size]  # noqa: B023
            if left:
                parts.append(f"{name} at {size}: {left[0][0]:.1f} -> {left[-1][1]:.1f}")
    text = "; ".join(parts)
    (out / "soak.txt").write_text(text + "\n")
    print(f"{text}; {out / 'soak.csv'}")
    for group in long:
        memory, handles, disk = (
            thirds(group, value) for value in (lambda s: s.memory_mb, lambda s: s.handles, lambda s: s.disk_mb)
        )
        assert memory[1] <= memory[0] * (1 + MEMORY_SHARE) + MEMORY_MB, text
        assert handles[1] <= handles[0] + HANDLES, text
        assert disk[1] <= disk[0] + DISK_MB, text
    assert (read_state(run) or {})["state"] in ("preempted", "running")
    rows = read_log(run / "log.jsonl")
    assert (run / "log.jsonl").stat().st_size < 400 * len(rows) + 4096
    kinds = [row["kind"] for row in rows]
    assert kinds.count("start") + kinds.count("resume") <= len(of_launch)
