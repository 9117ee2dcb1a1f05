"""A run folder: who holds it, its state, its log.

One process, rank 0 of a run, holds a folder at a time. The lock names host, pid and the process's start time, and is
touched while the holder lives: on the same host a dead holder is known at once, from another host by a lock that is no
longer touched.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from mnistm_dist.errors import PeerFailure, UserError, os_error_reason
from mnistm_dist.training.checkpoint import write_durably

State = Literal["running", "preempted", "finished", "failed"]
HEARTBEAT_SECONDS = 5.0
FOREIGN_PATIENCE_SECONDS = 20.0
"""How long a lock of another host must stay untouched before its holder counts as dead."""


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Something of a run folder is written inside: a disk that is full or read-only is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run folder {run_dir}: cannot be written ({os_error_reason(error)}); make room there and --resume, "
            "or choose another"
        ) from error


class RunLock:
    """The hold on a run folder. Raises `UserError` while another process lives that holds it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self.identity = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}
        )
        self._acquire()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._take_from_dead()
                continue
            except OSError as error:
                raise UserError(
                    f"run folder {self.path.parent}: cannot be written ({os_error_reason(error)}); "
                    "choose another --run-dir"
                ) from error
            try:
                with writing(self.path.parent), os.fdopen(descriptor, "w") as file:
                    file.write(self.identity)
            except UserError:
                self.path.unlink()
                raise
            return

    def _take_from_dead(self) -> None:
        """Removes the lock of a dead holder; raises `UserError` if it lives."""
        try:
            content = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return
        if holder_lives(content, self.path):
            raise UserError(
                f"run folder {self.path.parent}: held by a live run ({content}); "
                "wait for its end, or choose another --run-dir"
            )
        taken = self.path.with_name(f".lock.taken.{socket.gethostname()}.{os.getpid()}")
        with suppress(FileNotFoundError):
            # The rename decides between two that saw the same dead holder.
            self.path.rename(taken)
            if taken.read_text(errors="replace") == content:
                taken.unlink()
            else:
                # The other one had it by then: this is its lock, and it lives.
                taken.rename(self.path)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                return

    def release(self) -> None:
        """Gives the folder free."""
        self._released.set()
        self._thread.join()
        # A holder that was suspended for long has lost the folder to another.
        with suppress(FileNotFoundError):
            if self.path.read_text(errors="replace") == self.identity:
                self.path.unlink()


def holder_lives(content: str, path: Path) -> bool:
    """Whether the process that a lock names lives; of another host, whether the lock is still touched (this waits)."""
    try:
        holder = json.loads(content)
        host, pid, started = holder["host"], int(holder["pid"]), holder["started"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        # Cut while it was written: as old as its file says.
        return _touched_within(path)
    if host == socket.gethostname():
        return process_start(pid) == started
    return _touched_within(path)


def _touched_within(path: Path) -> bool:
    """Whether ``path`` is touched while we watch: times of two hosts are compared with themselves only."""
    deadline, before = time.monotonic() + FOREIGN_PATIENCE_SECONDS, _touched(path)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def process_start(pid: int) -> str | None:
    """When a process of this host started, in a unit that only equality is asked of; None if there is no such
    process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start


def is_locked(run_dir: Path) -> bool:
    """Whether a live run holds the folder."""
    try:
        content = (run_dir / ".lock").read_text(errors="replace")
    except OSError:
        return False
    return holder_lives(content, run_dir / ".lock")


def write_state(run_dir: Path, state: State, step: int, reason: str | None = None) -> None:
    """``state.json``: how the run stands, for whoever cannot see its exit code."""
    path, data = run_dir / "state.json", json.dumps({"state": state, "step": step, "reason": reason}).encode()
    try:
        write_durably(path, data)
    except OSError:
        if not path.exists():
            raise
        # A full disk has no room for a second file, but the block that the old one has.
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """``state.json``, or None where there is none that can be read."""
    try:
        found = json.loads((run_dir / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def tell_of_dead_holder(run_dir: Path, step: int, reason: str) -> None:
    """Tells for a holder of this host that was killed what it cannot tell itself: ``failed``, and gives the folder
    free. Any process of its run may call this; of a holder that lives, or of another host, nothing is told."""
    try:
        holder = json.loads((run_dir / ".lock").read_text())
        dead = holder["host"] == socket.gethostname() and process_start(int(holder["pid"])) != holder["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if dead:
        with suppress(UserError):
            lock = RunLock(run_dir)
            try:
                with writing(run_dir):
                    write_state(run_dir, "failed", step, f"PeerFailure: {reason}")
            finally:
                lock.release()


class RunDir:
    """A run's folder while the run lives: held by rank 0, which alone writes; on other ranks every method does nothing.

    A context manager: an exception that passes through is told in ``state.json`` as ``failed``, and the folder is
    given free.
    """

    def __init__(self, path: Path, *, active: bool) -> None:
        """Makes the folder if need be and takes hold of it. Raises `UserError` where it cannot be written or is
        held."""
        self.path, self.active = path, active
        self.steps_done = 0
        self.rows: list[dict[str, Any]] = []
        self._log_is_cut = False
        if not active:
            return
        with writing(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(path)
        for leftover in path.glob(".*.[0-9]*"):
            # What a killed writer left half-written; that of one of this host that lives is not touched.
            if leftover.suffix[1:].isdecimal() and process_start(int(leftover.suffix[1:])) is None:
                leftover.unlink(missing_ok=True)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if not self.active:
            if isinstance(error, PeerFailure):
                tell_of_dead_holder(self.path, self.steps_done, str(error))
            return
        if error is not None:
            # On a full disk it cannot be told, and the error that came first is the one to show.
            with suppress(UserError):
                self.tell("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        self._lock.release()

    def release(self) -> None:
        """Gives the folder free as it was found."""
        if self.active:
            self._lock.release()

    def tell(self, state: State, reason: str | None = None) -> None:
        """Writes ``state.json``."""
        if self.active:
            with writing(self.path):
                write_state(self.path, state, self.steps_done, reason)

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder, whole or not at all."""
        if self.active:
            with writing(self.path):
                write_durably(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Writes ``value`` as JSON, whole or not at all."""
        self.write(name, json.dumps(value, indent=1))

    def cut_log(self, steps_done: int) -> None:
        """Cuts ``log.jsonl`` back to ``steps_done``: what a killed run wrote later will be written again."""
        self.steps_done = steps_done
        if self.active:
            path = self.path / "log.jsonl"
            self.rows = [row for row in read_log(path) if row["step"] <= steps_done] if steps_done else []
            self.write("log.jsonl", lines(self.rows))

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row to ``log.jsonl``, with the time in Unix seconds.

        One that finds the disk full is written with the next: whether the run can go on, the next checkpoint tells.
        """
        if not self.active:
            return
        self.rows.append({**row, "time": round(time.time(), 3)})
        try:
            if self._log_is_cut:
                write_durably(self.path / "log.jsonl", lines(self.rows).encode())
            else:
                with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(lines(self.rows[-1:]))
            self._log_is_cut = False
        except OSError:
            self._log_is_cut = True


def lines(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut while it was written is left out."""
    try:
        written = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in written:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows
