"""Work in threads, in order, with a bounded number of items in flight; and how it reports progress."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # called with (done, total)

_IN_FLIGHT = 3  # items per thread that are held at once: one in work, one waiting, one coming back
_MAX_WORKERS = 8  # with more threads, the one that feeds them is the bottleneck


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


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``map(function, items)``, computed in threads, one per core up to 8, in the order of the items.

    At most `_IN_FLIGHT` items per thread are held at once. The codecs of Pillow and zlib, and hashes, release the
    interpreter's lock. Exceptions of ``function`` are raised here.
    """
    workers = min(available_cores(), _MAX_WORKERS)
    with ThreadPoolExecutor(workers, "map") as pool:
        tasks = (pool.submit(function, item) for item in items)
        for task in read_ahead(tasks, lambda _: _IN_FLIGHT * workers - 1):
            yield task.result()


def read_ahead(items: Iterable[Item], count: Callable[[Item], int]) -> Iterator[Item]:
    """Yield the items, each only when ``count(item)`` further ones have been created."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count(item):
            yield waiting.popleft()
    yield from waiting


def stage(progress: Progress | None, number: int, stages: int, count: int) -> Progress:
    """Return a callback for the progress of stage ``number`` of ``stages`` over ``count`` items.

    It may be called with any total, such as bytes: ``progress`` gets the part of ``count`` that is done overall.
    """

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress((number * total + done) * count // (stages * max(1, total)), count)

    return report
