"""Runs the package's commands as real processes that need not import torch anew.

A server process imports the package once and forks: a child has its own arguments, environment, folder, output and
exit code, as ``python -m mnistm_dist.NAME`` has, a few seconds sooner. With several processes the child forks the
ranks, which find one another by the variables that torchrun, or slurm/train.sh, would set. The real launchers are
tested where they matter.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

from mnistm_dist.errors import run_cli


@dataclass(frozen=True)
class Command:
    """What a child is to be."""

    run_command: str
    arguments: tuple[str, ...]
    world_size: int
    cwd: Path
    environment: dict[str, str]
    stdout: Path
    stderr: Path
    before: str | None = None
    """``module:function`` to call in each rank before the run_command, where a test wants to look inside."""


class Started:
    """A run_command that runs, in a process group of its own."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._process = server().Process(target=_child, args=(command,), daemon=False)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        self._process.join(0)
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What it left when it ended. A run_command that does not end in time is killed, and fails the test."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(
                f"{self.command.run_command} ran for {timeout} s: {self.command.stderr.read_text()[-2000:]}"
            )
        texts = [path.read_text() for path in (self.command.stdout, self.command.stderr)]
        return subprocess.CompletedProcess(self.command.arguments, self._process.exitcode, *texts)

    def send_signal(self, number: int) -> None:
        """A signal to the process, or to the parent of its ranks."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                # It has not come to lead a group yet.
                os.kill(self.pid, signal.SIGKILL)
        self._process.join()


def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have the package imported already. A process has one such server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes_preload"])
    # Python 3.11's server does not take over sys.path, and says nothing of a module that it does not find.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _child(command: Command) -> None:
    """Becomes the run_command. Leads a process group, so that all of it can be killed at once."""
    assert "mnistm_dist.training.trainer" in sys.modules, "processes_preload.py could not be imported"
    os.setsid()
    os.chdir(command.cwd)
    for path, descriptor in ((command.stdout, 1), (command.stderr, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(command.environment)
    sys.argv = [f"mnistm_dist.{command.run_command}", *command.arguments]
    if command.world_size > 1:
        rank = _become_a_rank(command.world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if command.before is not None:
        module, _, function = command.before.partition(":")
        getattr(importlib.import_module(module), function)()
    code = 1
    try:
        code = run_cli(importlib.import_module(f"mnistm_dist.{command.run_command}").main)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become_a_rank(world_size: int) -> int:
    """Forks the ranks and returns in each of them; the parent waits and ends with the largest exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            return rank
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(code if code >= 0 else 128 - code for code in codes))


def alive(run: Path) -> list[int]:
    """Trainers of a run that live."""
    result = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "mnistm_dist.train" in command and str(run) in command:
            result.append(int(path.parent.name))
    return result


def wait_until_gone(run: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(run)
