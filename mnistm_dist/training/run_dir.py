"""A run folder: its state and its log, written by rank 0 while it holds the lock."""

import json
import shutil
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal, Self

from mnistm_dist.errors import PeerFailure, UserError, near_path
from mnistm_dist.files import explain_os_errors, write_atomic
from mnistm_dist.run_lock import RunLock

State = Literal["running", "preempted", "finished", "failed"]
CONFIG_NAME, STATE_NAME, LOG_NAME = "config.yaml", "state.json", "log.jsonl"
SUMMARY_NAME, ENVIRONMENT_NAME, ARCHITECTURE_NAME = "summary.json", "environment.json", "architecture.json"
# What a run folder has from its start; each checkpoint holds their hashes.
RUN_FILES = (CONFIG_NAME, ENVIRONMENT_NAME, ARCHITECTURE_NAME, LOG_NAME)
# The results of a run, which results.py writes.
RESULT_NAMES = (
    *(SUMMARY_NAME, "report.html", "learning_curve.png", "mistakes"),
    *(f"{name}_{split}.*" for split in ("val", "test") for name in ("predictions", "confusion_matrix", "mistakes")),
)


def writing(run_dir: Path) -> AbstractContextManager[None]:
    """Turn an `OSError` while a run folder is written into a `UserError`."""
    return explain_os_errors(f"run folder {run_dir}", advice="free some space there and --resume, or choose another")


def require_run(path: Path) -> None:
    """Raise `UserError` unless ``path`` is a run folder."""
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path}: not a run folder (no {CONFIG_NAME}){near_path(path)}; name one, such as runs/NAME")


class RunDir:
    """The folder of a run. Rank 0 holds and writes it; on the other ranks (``active=False``) every method does nothing.

    As a context manager it writes ``failed`` to ``state.json`` if the block raises, and releases the lock.
    """

    def __init__(self, path: Path, *, active: bool) -> None:
        """Create the folder if it is missing and acquire its lock. Raise `UserError` if that is not possible."""
        self.path, self.active = path, active
        self.steps_done = 0
        """Steps done, for ``state.json``; the trainer keeps it up to date."""
        self.rows: list[dict[str, Any]] = []
        """The rows of ``log.jsonl``."""
        self._log_is_behind = False
        if not active:
            return
        with writing(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if not self.active:
            if isinstance(error, PeerFailure):
                write_state_for_dead_owner(self.path, self.steps_done, str(error))
            return
        if error is not None:
            # If the disk is full, the state cannot be written; the first error is the one to show.
            with suppress(UserError):
                self.set_state("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        self.lock.release()

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Move checkpoints and the results to a new folder in this one; copy `RUN_FILES` to it.

        The new folder is a run folder, too: it can be evaluated and resumed.
        """
        folder = self.path / f"set-aside-{time.strftime('%Y%m%d-%H%M%S')}"
        results = [path for name in RESULT_NAMES for path in self.path.glob(name)]
        with writing(self.path):
            (folder / "checkpoints").mkdir(parents=True)
            for path in filter(Path.exists, (self.path / name for name in RUN_FILES)):
                shutil.copy2(path, folder)
            for path in (*results, *checkpoints):
                path.rename(folder / path.relative_to(self.path))
        return folder

    def set_state(self, state: State, reason: str | None = None) -> None:
        """Write ``state.json``."""
        if self.active:
            with writing(self.path):
                write_state(self.path, state, self.steps_done, reason)

    def write(self, name: str, content: Any) -> None:
        """Write a file of the folder: text as it is, anything else as JSON."""
        if self.active:
            with writing(self.path):
                write_atomic(self.path / name, content if isinstance(content, str) else json.dumps(content, indent=1))

    def open_log(self, steps_done: int) -> None:
        """Continue ``log.jsonl`` after ``steps_done`` steps: drop later rows, which will be written again."""
        self.steps_done = steps_done
        if self.active:
            rows = read_log(self.path / LOG_NAME) if steps_done else []
            self.rows = [row for row in rows if row["step"] <= steps_done]
            self.write(LOG_NAME, _to_lines(self.rows))

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to ``log.jsonl``, with the time in Unix seconds.

        If the disk is full, the row is kept and written with the next one; the next checkpoint decides whether the run
        can continue.
        """
        if not self.active:
            return
        self.rows.append({**row, "time": round(time.time(), 3)})
        try:
            if self._log_is_behind:
                write_atomic(self.path / LOG_NAME, _to_lines(self.rows))
            else:
                with (self.path / LOG_NAME).open("a", encoding="utf-8") as file:
                    file.write(_to_lines(self.rows[-1:]))
            self._log_is_behind = False
        except OSError:
            self._log_is_behind = True


def write_state(run_dir: Path, state: State, step: int, reason: str | None = None) -> None:
    """Write ``state.json``: how the run stands, for programs that cannot see its exit code. Raise `OSError`."""
    path, text = run_dir / STATE_NAME, json.dumps({"state": state, "step": step, "reason": reason})
    try:
        write_atomic(path, text)
    except OSError:
        if not path.exists():
            raise
        # A full disk has no room for a second file; the existing file still has its block.
        with path.open("r+") as file:
            file.write(text)
            file.truncate()


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return the content of ``state.json``, empty if it is missing or damaged."""
    return _read(run_dir / STATE_NAME)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of ``summary.json``, empty if it is missing or damaged."""
    return _read(run_dir / SUMMARY_NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_state_for_dead_owner(run_dir: Path, step: int, reason: str) -> None:
    """Write ``failed`` for a rank 0 that was killed or suspended, and release its lock.

    Wait for a rank 0 that lives to write how it ended, and keep that. Any rank may call it.
    """
    with suppress(UserError), RunLock(run_dir, patient=True), writing(run_dir):
        if read_state(run_dir).get("state", "running") == "running":
            write_state(run_dir, "failed", step, f"PeerFailure: {reason}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log. A last line that was cut while it was written is dropped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def launches(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a log that a launch begins with: its step, world size and machine."""
    return [row for row in rows if row["kind"] in ("start", "resume")]


def step_losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Return the training loss of each step, by step from 0, that the rows of a log have."""
    windows = [(row["step"], row.get("losses", [])) for row in rows if row["kind"] == "train"]
    return {end - len(losses) + i: loss for end, losses in windows for i, loss in enumerate(losses)}


def _to_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
