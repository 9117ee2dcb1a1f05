"""How a command runs and ends: a user error is one line on stderr and exit code 2, without a traceback."""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXIT_PEER_FAILURE = 1  # another process of the run has failed
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # stopped at a signal after a clean save (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as in a shell

# How often an OpenMP thread of torch looks for work before it sleeps. With GNU's default, 300,000, a training on all
# cores falls to a fraction of its speed if another process uses one of them; with this it is as fast on idle cores.
SPIN_COUNT = "3000"

# Errors of a path from the command line, wherever it is opened first.
_BAD_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR)


class UserError(ValueError):
    """A user's error. The message is one line: the thing, what was found, what is accepted, what to do.

    All ranks of a run raise it, and rank 0 prints it. ``printed_by`` names the environment variable that is 0 in the
    processes that print; if it is None, every process prints.
    """

    printed_by: str | None = "RANK"


class NodeError(UserError):
    """A user's error that perhaps only this node has found. The first process of each node prints it."""

    printed_by = "LOCAL_RANK"


class RankError(UserError):
    """A user's error that only this process has found."""

    printed_by = None


class PeerFailure(Exception):
    """Another process of the run has failed. The message is one line; every remaining process prints it."""


@contextmanager
def errors_once_per_node() -> Iterator[None]:
    """Print user errors of the block once per node: before the process group exists, no rank knows those of others.
    A `RankError` is printed by its rank."""
    try:
        yield
    except UserError as error:
        if not isinstance(error, RankError):
            error.printed_by = NodeError.printed_by
        raise


def is_first(rank: str = "RANK") -> bool:
    """Return whether this process is number 0 by a launcher's variable, or has no launcher."""
    return os.environ.get(rank, "0") == "0"


def print_error(message: str, printed_by: str | None = None) -> None:
    """Print ``error: MESSAGE`` as one line on stderr, in the processes that `UserError.printed_by` describes."""
    if printed_by is None or is_first(printed_by):
        print(f"error: {escape_control(' '.join(message.split())):.2500}", file=sys.stderr, flush=True)


def escape_control(text: str) -> str:
    """Escape control characters; file names are untrusted."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` if a known name is close to ``name``, else an empty text."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def near_path(path: Path) -> str:
    """Return `` (did you mean X?)`` if the folder of ``path`` holds another, close name, else an empty text."""
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.name != path.name]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, siblings, 1)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def os_error_reason(error: Exception) -> str:
    """Return the reason of an `OSError`, without its number and its path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def import_optional(name: str, needed_by: str, extra: str) -> ModuleType:
    """Import a module of an optional package. Raises `UserError` with the command that installs ``extra``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'{needed_by} needs {package}: pip install "mnistm-dist[{extra}]"') from error


# The launcher's variables, and their names in Open MPI and in MPICH.
_MPI_VARIABLES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


def run_cli(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run the ``main`` of a command and return its exit code. Torch should be imported in ``main``.

    A `UserError` is one line on stderr and exit code 2, as is a path that cannot be opened. Other exceptions are bugs
    and pass through.
    """
    for name, of_mpi in _MPI_VARIABLES.items():
        for value in filter(None, map(os.environ.get, of_mpi)):
            os.environ.setdefault(name, value)
    # A closed stream (``>&-``) is None, and the next file that is opened would get its number.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    # OpenMP reads it when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print_error(str(error), error.printed_by)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in _BAD_PATH or error.filename is None:
            raise
        print_error(f"{os.fsdecode(error.filename)}: cannot be opened ({error.strerror}); name another path")
        return EXIT_USER_ERROR
    except PeerFailure as error:
        print_error(str(error))
        return EXIT_PEER_FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
