"""Signals that ask a run to save and exit. A handler only notes it; the ranks agree on it at a step boundary."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from mnistm_dist.errors import UserError

SECOND_INTERRUPT_AFTER = 1.0
"""Seconds after which another Ctrl-C counts as the second one: a launcher passes the first one on, so that it comes
twice."""

Handler = Callable[[int, FrameType | None], object] | int


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[signal.Signals, Handler] = {}
        self._first_interrupt: float | None = None

    def install(self, signals: tuple[signal.Signals, ...]) -> None:
        """Listens to ``signals`` and to SIGINT, in this process, from its main thread."""
        for number in (*signals, signal.SIGINT):
            # None: of a handler that was not set by Python, which Python cannot set again.
            handler = self._interrupt if number == signal.SIGINT else self._note
            self._before[number] = signal.signal(number, handler) or signal.SIG_DFL

    def close(self, *, process_ends: bool) -> None:
        """Gives the signals back to who had them. Where the process ends it ignores them, but for SIGINT.

        The interpreter's end takes seconds and takes the handlers away first: a signal that is sent twice would kill
        the process there, and the exit code would no longer say that all is saved.
        """
        for number, handler in self._before.items():
            if not process_ends:
                signal.signal(number, handler)
            elif number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_interrupt is not None and now - self._first_interrupt > SECOND_INTERRUPT_AFTER:
            raise KeyboardInterrupt
        self._first_interrupt = self._first_interrupt or now
        self._note(number, frame)


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """Signals by name, comma-separated. Raises `UserError` for one that is unknown or cannot be caught."""
    found = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP", "SIGINT"):
            raise UserError(
                f"signals: {name!r} is not accepted; use names such as SIGTERM,SIGUSR1 (SIGINT always stops)"
            )
        found.append(signal.Signals[name])
    return tuple(found)


def die_with_launcher() -> None:
    """Asks the kernel for SIGTERM when the launcher dies, so that no trainer is left behind (Linux, prctl(2)).

    Only under a launcher: a run started by hand goes on when its shell ends.
    """
    under_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not under_launcher:
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
