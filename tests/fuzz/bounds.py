"""What every input must end in, and what it must not do on its way.

It works, or it ends in a `UserError` of one line (at a run_command: exit code 2 and one line on stderr). Never another
exception; no program is started, nothing is written outside of the folder of the test, no memory is taken because a
header says so, and no input takes long.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mnistm_dist.errors import UserError, run_cli

CPU_SECONDS, WALL_SECONDS = 10.0, 120.0
"""What one input may take: far more than it does, far less than one that never ends."""
MEMORY_BYTES = 256 << 20
"""How much one input may add to the memory that the process has held at once."""
ADDRESS_BYTES = 4 << 30
"""How much address space one input may ask for: what asks for more fails, and is told by the `MemoryError` below it."""


def ending(work: Callable[[], Any]) -> str:
    """``works`` or ``refused``; every other end is an exception or a failed assertion."""
    try:
        work()
    except UserError as error:
        refusal = error
    else:
        return "works"
    assert_one_line(str(refusal))
    cause: BaseException | None = refusal
    while cause is not None:
        assert not isinstance(cause, MemoryError), f"memory was asked for because a header says so: {refusal}"
        cause = cause.__cause__ or cause.__context__
    return "refused"


def assert_one_line(text: str) -> None:
    """A message that a person can read: it names the thing, in one line that no terminal obeys."""
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 20_000, text[:300]


def at_door(main: Callable[[list[str]], int], *arguments: object, codes: tuple[int, ...] = (0,)) -> None:
    """Runs a run_command in this process. Raises `UserError` with its line where it ended with exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(Stdout(out)), contextlib.redirect_stderr(err):
        try:
            code = run_cli(main, list(map(str, arguments)))
        except SystemExit as left:
            code = int(left.code or 0)
    if code == 2:
        lines = err.getvalue().splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        assert len(told) == 1, lines
        assert told[0] == lines[-1], lines
        assert told[0].isprintable()
        assert len(told[0]) < 2_600
        raise UserError(told[0])
    assert code in codes, (code, err.getvalue()[-500:])


class Stdout(io.TextIOWrapper):
    """A stdout that is thrown away, with the ``buffer`` that some commands write to."""

    def __init__(self, _: io.StringIO) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="surrogateescape")


_allowed: Path | None = None
_forbidden: list[str] = []
_STARTS = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_HARMLESS = ("/dev/", "/proc/")
_LOOKUP = re.compile(r"/(ldconfig|gcc|ld|uname)'|^'git'$")
"""How Python finds a shared library or the system's name, when a module asks for it for the first time; and how a run
notes the commit of this package."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _allowed is None:
        return
    if event in _STARTS and not _LOOKUP.search(repr(arguments[0])):
        _forbidden.append(f"{event} {arguments!r:.200}")
    elif (event == "open" and arguments[2] and arguments[2] & _WRITES) or event in _CHANGES:
        for place in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(place, str | bytes | os.PathLike):
                path = os.path.realpath(os.fsdecode(place))
                # Byte code of modules that are imported by need is Python's own business.
                if not f"{path}{os.sep}".startswith((f"{_allowed}{os.sep}", *_HARMLESS)) and "__pycache__" not in path:
                    _forbidden.append(f"{event} {path}")


sys.addaudithook(_audit)


class TooLong(BaseException):
    """An input that does not end."""


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise TooLong(f"one input took more than {WALL_SECONDS:.0f} s")


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails where what runs inside starts a program, writes outside of ``folder``, or takes much memory or time."""
    global _allowed
    before = signal.signal(signal.SIGALRM, _give_up)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_BYTES, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    held, started = _status("VmRSS"), time.process_time()
    _forbidden.clear()
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    _allowed = folder.resolve()
    try:
        yield
    finally:
        _allowed = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _forbidden, _forbidden
    assert (took := time.process_time() - started) < CPU_SECONDS, f"{took:.1f} s of CPU time"
    assert (more := _status("VmHWM") - held) < MEMORY_BYTES, f"{more >> 20} MiB more"


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
