"""Work in processes and threads, in order, with a bounded number of items in flight; and how it reports progress."""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path, PurePath
from types import ModuleType
from typing import TypeVar

from mnistm_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # called with (done, total)

_IN_FLIGHT = 3  # items per worker that are held at once: one in work, one waiting, one coming back
_IMAGES_PER_WORKER = 4096  # images that take about as long as a worker process takes to start
# With more workers, the process that feeds them is the bottleneck; each takes some 40 MB.
_MAX_WORKERS = 8


def available_cores() -> int:
    """Return how many CPU cores this process may use: those of its affinity mask, at most the CPU quota of its
    container or job (rounded down), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the CPU quota of this process, cores: the smallest of its cgroup and the cgroups above it; infinite if
    there is none.

    ``own`` has a line ``NUMBER:CONTROLLERS:PATH`` for each hierarchy; the controllers are empty in version 2. In a
    container the path may be that of the host: only ``root`` itself exists then. See cgroups(7).
    """
    quotas = [math.inf]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        if not controllers or "cpu" in controllers.split(","):
            for folder in (PurePath(path), *PurePath(path).parents):
                top = root / ("cpu" if controllers else "") / folder.relative_to("/")
                # Without a limit the quota is "max", or -1.
                with suppress(OSError, ValueError):
                    quota, period = map(int, " ".join((top / name).read_text() for name in names).split())
                    quotas.append(quota / period if quota > 0 else math.inf)
    return min(quotas)


def workers_for(count: int) -> int:
    """Return how many worker processes pay off to decode or encode ``count`` images: none for a few."""
    return min(available_cores(), _MAX_WORKERS, count // _IMAGES_PER_WORKER)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Yield ``map(function, items)``, computed in ``workers`` processes, in the order of the items.

    At most `_IN_FLIGHT` items per worker are held at once. ``function`` must be defined at the top of a module that is
    imported, not in the script itself; its exceptions are raised here. With fewer than two workers it runs in this
    process. Raises `UserError` if a worker was killed.
    """
    if workers < 2:
        yield from map(function, items)
        return
    # spawn: a fork would copy the locks of this process's other threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_start_worker) as pool:
        tasks = (_submit(pool, function, item) for item in items)
        try:
            for future in read_ahead(tasks, lambda _: _IN_FLIGHT * workers - 1):
                yield future.result()
        except BrokenProcessPool as error:
            # The pool waits forever for a worker that was still starting when another one was killed.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise UserError(
                f"a worker process of {workers} was killed, as the system does when memory runs out: find out what "
                "killed it and run this again"
            ) from error


def read_ahead(items: Iterable[Item], count: Callable[[Item], int]) -> Iterator[Item]:
    """Yield the items, each only when ``count(item)`` further ones have been created."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count(item):
            yield waiting.popleft()
    yield from waiting


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    # It may start a worker, which would import the caller's script: run it again if it has no `if __name__ ==
    # "__main__":`, fail if it came from stdin.
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        return pool.submit(function, item)
    except (OSError, ValueError) as error:
        # A broken pool closes the pipes for a worker that is started.
        raise BrokenProcessPool(str(error)) from error
    finally:
        sys.modules["__main__"] = script


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent decides what happens to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A pool's workers hold both ends of their queue, so they would wait forever after their parent was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def stage(progress: Progress | None, number: int, stages: int, count: int) -> Progress:
    """Return a callback for the progress of stage ``number`` of ``stages`` over ``count`` items.

    It may be called with any total, such as bytes: ``progress`` gets the part of ``count`` that is done overall.
    """

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress((number * total + done) * count // (stages * max(1, total)), count)

    return report
