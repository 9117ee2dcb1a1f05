"""A map over worker processes that keeps the order and bounds what is in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from mnistm_dist.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT = 3
"""Items under way per worker: one being worked on, one waiting, one coming back."""

_WORTH_A_WORKER = 4096
"""Images that take about as long as a worker process takes to start."""
_MOST_WORKERS = 8
"""Beyond it the process that feeds them is the slowest; each holds some 40 MB."""


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(count: int) -> int:
    """How many worker processes pay for ``count`` images to decode or encode: at most one per core, none for a few."""
    return min(available_cores(), _MOST_WORKERS, count // _WORTH_A_WORKER)


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes, results in the order of the items.

    At most `_IN_FLIGHT` items per worker are held at once, however many there are. ``function`` is a module's own
    function; what it raises is raised here. Fewer than two workers: it runs in this process. Raises `UserError` where
    a worker was killed.
    """
    if workers < 2:
        yield from map(function, items)
        return
    # spawn: a fork would copy the locks of this process's other threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_start_worker)
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(_submit(pool, function, item))
            if len(pending) >= _IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        # A worker that was just starting when another one was killed is not known to the pool, which waits for it.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise UserError(
            f"a worker process of {workers} was killed, as the system does where memory runs out; "
            "look for what killed it, and run this again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future[Result]:
    try:
        return pool.submit(function, item)
    except (OSError, ValueError) as error:
        # It starts a worker, whose pipes the pool closes where another one was killed meanwhile.
        raise BrokenProcessPool(str(error)) from error


def _start_worker() -> None:
    # Ctrl-C goes to the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A pool's workers hold both ends of their queue, so they would wait for ever after their parent was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
