"""Stopping a run cleanly: signal handlers that only set a flag, and the agreement of all ranks at a step boundary."""

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from mnistm_dist.errors import UserError
from mnistm_dist.training.distributed import StopConsensus, World

# What a rank asks for at a step boundary; the largest value of any rank wins. EXIT saves first.
CONTINUE, SAVE, EXIT = 0, 1, 2
# Seconds after which another Ctrl-C counts as the second one: a launcher forwards the first, so it arrives twice.
SECOND_INTERRUPT_AFTER = 1.0


class Preempted(Exception):
    """The run was asked to stop, by the signal of this name, and has saved a checkpoint."""


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self._signals = signals
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int] = {}
        self._first_interrupt = math.inf

    def install(self) -> None:
        """Handle the signals and SIGINT in this process: from now on there is something to save.

        In another thread than the main one, which alone may install handlers, do nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*self._signals, signal.SIGINT):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            # signal.signal returns None for a handler that was not installed from Python; it cannot be put back.
            self._previous[number] = signal.signal(number, self._request_stop) or signal.SIG_DFL

    def close(self, *, process_ends: bool) -> None:
        """Restore the previous handlers. If the process ends, ignore the signals instead, except for SIGINT.

        The interpreter takes seconds to exit and removes its handlers first: a signal that is sent again would kill the
        process then, and the exit code would no longer say that the run was saved.
        """
        for number, handler in self._previous.items():
            if not process_ends:
                signal.signal(number, handler)
            elif number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._first_interrupt = min(self._first_interrupt, now := time.monotonic())
            if now - self._first_interrupt > SECOND_INTERRUPT_AFTER:
                raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name


class StepBoundary:
    """What to do after a step: the ranks agree on CONTINUE, SAVE or EXIT, one step after a rank has asked for it."""

    def __init__(self, world: World, stop: StopRequest, checkpoint_minutes: float) -> None:
        self.world, self.stop = world, stop
        self._checkpoint_seconds = 60 * checkpoint_minutes
        self._consensus = StopConsensus(world.control)
        self._saved_at = time.monotonic()

    def next_action(self) -> int:
        """Return what all ranks do now. All ranks take part."""
        requested = CONTINUE if self.stop.reason is None else EXIT
        # Rank 0's clock decides for all.
        timed = requested == CONTINUE and self.world.is_main and self._checkpoint_seconds
        if timed and time.monotonic() - self._saved_at > self._checkpoint_seconds:
            requested = SAVE
            # The answer comes with the next step, which must not ask again.
            self.checkpoint_saved()
        return self._consensus.exchange(requested)

    def checkpoint_saved(self) -> None:
        """Restart the clock of ``--checkpoint-minutes``."""
        self._saved_at = time.monotonic()

    def stop_reason(self) -> str:
        """Return the signal that stops the run, of whichever rank received it. All ranks take part."""
        return next(filter(None, self.world.gather_objects(self.stop.reason)), "a signal")


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """Return the signals of a comma-separated list of names. Raise `UserError` for one that cannot be handled."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP", "SIGINT"):
            raise UserError(
                f"stop_signals: {name!r} is not accepted; use names such as SIGTERM,SIGUSR1 (SIGINT is always handled)"
            )
    return tuple(signal.Signals[name] for name in names)
