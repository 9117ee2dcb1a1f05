"""What a person got wrong, and how a door says so: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST_CHARACTERS = 2_500
"""Of a message: what a person gave may be longer than a terminal is high."""
_UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR)
"""What a path of a person's can be, wherever it is looked at first."""
EXIT_PEER_FAILURE = 1
"""Exit code of a process that another one of its run has left alone."""
EXIT_USER_ERROR = 2
"""Exit code of a person's mistake."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell gives it: 128 + SIGINT."""
EXIT_PREEMPTED = 75
"""Exit code of a run that a signal cut short after a clean save (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """A person's mistake: the message names the thing, what was found, what is accepted and what to do, in one line."""


class NodeError(UserError):
    """A mistake that this node may be the only one to find, so that its first process tells it, whatever its rank."""


class RankError(UserError):
    """A mistake that this process alone has found, so that it tells it, whatever its rank."""


class PeerFailure(Exception):
    """Another process of the run has gone, in one line, which each that is left tells: rank 0 may be the one."""


@contextmanager
def errors_once_per_node() -> Iterator[None]:
    """A mistake that is found inside is told by the first process of each node: no rank knows yet what others find."""
    try:
        yield
    except NodeError:
        raise
    except UserError as error:
        raise NodeError(str(error)) from error


def print_error(text: str, *, teller: str | None = "RANK") -> None:
    """``error: ...`` in one line on stderr, from the process whose number in the variable ``teller`` is 0; without a
    variable, from this one."""
    if teller is None or os.environ.get(teller, "0") == "0":
        line = escape_control(" ".join(text.split()))
        shown = line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]} ..."
        print(f"error: {shown}", file=sys.stderr, flush=True)


def escape_control(text: str) -> str:
    """Text without what a terminal would obey or could not show: a file's name is anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def os_error_reason(error: Exception) -> str:
    """What the system says of a path, in words and without its number and the path."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file stands where a folder is needed"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def run_cli(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a door's ``main`` and turns a `UserError` into one line on stderr and exit code 2.

    Of several processes rank 0 alone speaks: all of them find the same mistake, or share it (`World.together`). One
    that found it alone says so itself (`World.shutdown_with_error`).
    A path that cannot be looked at is one line too, and Ctrl-C, and the loss of another process, told by each that is
    left, with exit code 1. Returns the exit code; every other exception passes through, since it is our own mistake.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        alone = isinstance(error, RankError)
        print_error(str(error), teller=None if alone else "LOCAL_RANK" if isinstance(error, NodeError) else "RANK")
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in _UNREACHABLE or error.filename is None:
            raise
        print_error(f"{os.fsdecode(error.filename)}: cannot be looked at ({error.strerror}); name another path")
        return EXIT_USER_ERROR
    except PeerFailure as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_PEER_FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
