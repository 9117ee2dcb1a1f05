"""Trainings as a person launches them, in processes of their own, watched by what they write into their run folder."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting
from mnistm_dist.errors import EXIT_PREEMPTED, UserError
from mnistm_dist.training.run_dir import read_log

LogRow = dict[str, Any]
STOP_SECONDS = 600.0
"""How long a training may take to save and leave after it was asked to."""
SAVE_SECONDS = 60.0
"""The same, after something went wrong here."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A training that has ended."""

    rows: list[LogRow]
    """Its log."""
    launched: float
    """When it was launched, Unix seconds."""
    peak_megabytes: float
    """The largest resident memory of the process."""


def train_command(setting: Setting, run_dir: Path, *flags: object) -> list[str]:
    """``python -m mnistm_dist.train`` with the setting's shards and cache."""
    shards = [] if setting.shards is None else ["--shards", setting.shards]
    places = ["--cache-dir", str(setting.cache_dir), "--run-dir", str(run_dir)]
    return [sys.executable, "-m", "mnistm_dist.train", "--tracker", "none", *shards, *places, *map(str, flags)]


def launch(command: Sequence[str], run_dir: Path, until: Callable[[list[LogRow]], bool], *, every: float) -> Launched:
    """Runs a training until ``until`` its log holds, looked at ``every`` so many seconds; then it saves and leaves.

    A training that finishes before is as good. Raises `UserError` with the training's own words where it fails.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    said = run_dir.parent / f"{run_dir.name}.out"
    with said.open("wb") as output:
        launched = time.time()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            peak = _watch(process, run_dir / "log.jsonl", until, every)
        finally:
            # Only after an exception, such as Ctrl-C, is it still there.
            if process.returncode is None:
                _leave(process)
    if process.returncode not in (0, EXIT_PREEMPTED):
        words = last_words(said.read_text(errors="replace"))
        raise UserError(f"{' '.join(command)}: exit code {process.returncode}: {words}")
    return Launched(rows=read_log(run_dir / "log.jsonl"), launched=launched, peak_megabytes=peak)


def last_words(output: str) -> str:
    """What a process that failed said: its first line on an error, else its last line."""
    lines = output.splitlines() or ["it said nothing"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Lets a training save what it has, or ends it where it does not leave."""
    process.terminate()
    try:
        process.wait(SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _watch(process: subprocess.Popen[bytes], log: Path, until: Callable[[list[LogRow]], bool], every: float) -> float:
    """Waits for the end, which it brings about once ``until`` the log holds; gives the largest resident memory that the
    process was seen with, megabytes."""
    asked: float | None = None
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, peak_megabytes(process.pid))
        if asked is None and until(read_log(log)):
            process.terminate()
            asked = time.monotonic()
        if asked is not None and time.monotonic() - asked > STOP_SECONDS:
            raise UserError(f"{log.parent}: the training did not leave within {STOP_SECONDS:.0f} s after SIGTERM")
        time.sleep(every)
    return peak


def peak_megabytes(pid: int) -> float:
    """The largest resident memory of a process until now; 0 where it has ended. Not that of getrusage(2), which begins
    with what the parent had."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1.024e-3 if found else 0.0


def has_trained(rows: list[LogRow]) -> bool:
    """Whether a log holds a training step."""
    return any(row["kind"] == "train" for row in rows)


def whole_run(rows: list[LogRow]) -> bool:
    """Never: the training is left to its end."""
    return False
