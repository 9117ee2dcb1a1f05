"""The processes of a run: who they are, how they agree, how they leave together.

Accelerate is set up once, here. It prepares the model and the optimizer and nothing else: a prepared loader would be
sharded twice (accelerate#3547), a prepared scheduler would step once per process (accelerate#2773). Every collective
of the package stands in this file or says "all ranks take part".
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from mnistm_dist.config import MachineConfig
from mnistm_dist.errors import NodeError, RankError, UserError, errors_once_per_node
from mnistm_dist.training.hardware import (
    Environment,
    Precision,
    check_gpus,
    check_world_size,
    choose_precision,
    default_threads,
    native_precisions,
)

T = TypeVar("T")

SETUP_TIMEOUT = timedelta(hours=12)
"""Limit of the waits until the data is open: one node may decode for long while the others wait for it."""
HEAD_PATIENCE = 300.0
"""Seconds in which rank 0 must listen: the processes of a job start together, and a slow disk makes it minutes."""
FAILURE_PATIENCE = timedelta(seconds=25)
"""How long a rank that leaves with a person's mistake waits for the others: it may be the only one to have found it.
Rank 0 comes last, after W&B has been told: up to 20 seconds."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others."""

    accelerator: Accelerator
    control: dist.ProcessGroup | None
    """Group on gloo for what the hosts agree on (objects, errors, the action to stop): it never waits for a GPU. None:
    one process."""
    precision: Precision
    threads: int
    collective_timeout: timedelta
    """How long a collective operation may wait for a process once the data is open; until then `SETUP_TIMEOUT`."""

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def local_rank(self) -> int:
        return self.accelerator.local_process_index

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's ``value``, on every rank. All ranks take part."""
        box = [value]
        if self.control is not None:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]  # rank 0 passes a T

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on every rank; a person's mistake found on any of them is raised on all. All ranks take part.

        Without it the ranks that found nothing wrong would wait for the one that left.
        """
        result, mistake = None, None
        try:
            result = work()
        except UserError as error:
            mistake = str(error)
        for found in self.gather_objects(mistake):
            if found is not None:
                raise UserError(found)
        return result  # type: ignore[return-value]  # there was no mistake, so work() returned

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0 and gives its result, or raises its mistake, on every rank. All ranks take part."""
        return self.broadcast_object(self.run_on_all_ranks(lambda: work() if self.is_main else None))

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's ``value`` by rank, on every rank. All ranks take part."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Every rank's ``value`` by rank, on rank 0; None elsewhere. All ranks take part."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def gather_stacked(self, values: Tensor) -> Tensor:
        """float (n, k) of every rank as (n, world size * k), rank by rank, on every rank. All ranks take part."""
        if self.size == 1:
            return values
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous())
        return torch.cat(gathered, dim=1)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values into every rank's ``tensors``. All ranks take part."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def with_run_timeout(self) -> World:
        """This world once the data is open: from here on no wait for a lost process is longer than
        ``collective_timeout``. All ranks take part."""
        if self.control is None:
            return self
        return replace(self, control=_control_group(self.collective_timeout))

    def shutdown(self, patience: timedelta | None = None) -> bool:
        """Ends the process groups once all ranks are here, or after ``patience`` (``collective_timeout`` by default);
        gives whether all were. All ranks take part."""
        if not dist.is_initialized():
            return True
        try:
            self._wait_for_all(patience or self.collective_timeout)
            return True
        except RuntimeError:
            return False
        finally:
            dist.destroy_process_group()

    def _wait_for_all(self, patience: timedelta) -> None:
        """A barrier whose limit holds on every rank: that of torch's monitored_barrier holds on rank 0 alone, and where
        rank 0 does not come the others would wait for the group's own, of hours."""
        token = torch.zeros(1)
        if self.is_main:
            for rank in range(1, self.size):
                _wait(dist.irecv(token, rank, group=self.control), patience)
            for rank in range(1, self.size):
                _wait(dist.isend(token, rank, group=self.control), patience)
        else:
            _wait(dist.isend(token, 0, group=self.control), patience)
            _wait(dist.irecv(token, 0, group=self.control), patience)

    def shutdown_with_error(self, mistake: UserError) -> UserError:
        """Leaves with a person's mistake; gives the error to raise, a `RankError` where not all ranks came with it."""
        return mistake if self.shutdown(FAILURE_PATIENCE) else RankError(str(mistake))


class StopConsensus:
    """The largest action of any rank, known to all of them one step later.

    Step s sends this rank's action and reads the answer to step s - 1: no step waits for a message under way, and all
    ranks read the same answer at the same step.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: tuple[dist.Work, Tensor] | None = None

    def step(self, action: int) -> int:
        """Sends ``action``; returns the largest of the step before on every rank, 0 at the first; alone, ``action``.
        All ranks take part."""
        if self.group is None:
            return action
        agreed = self._receive()
        message = torch.tensor([action], dtype=torch.int32)
        self.pending = (dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group, async_op=True), message)
        return agreed

    def _receive(self) -> int:
        if self.pending is None:
            return 0
        work, message = self.pending
        self.pending = None
        work.wait()
        return int(message)


def start(machine: MachineConfig, *, expect_world_size: int | None, collective_timeout: float) -> World:
    """Joins the other processes that the launcher started. All ranks take part.

    Raises `UserError` where the world is not what was asked for, or the hardware cannot do what is asked of it.
    """
    on_gpu = torch.cuda.is_available()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(world_size, expect_world_size, os.environ)
    if on_gpu:
        check_gpus(local_world_size, torch.cuda.device_count())
    if machine.sync_batchnorm and not on_gpu:
        raise UserError(
            "sync_batchnorm: there is no GPU here, and torch has SyncBatchNorm for GPUs only; use --no-sync-batchnorm"
        )
    precision = choose_precision(machine.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"), native_precisions())
    threads = machine.threads
    if threads == "auto":
        threads = default_threads(local_world_size, os.environ)
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world_size > 1:
        wait_for_head(os.environ, min(collective_timeout, HEAD_PATIENCE))
    # Else Accelerate chooses 1 for several processes on CPU, and warns of it on each of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[
                # Buffers are broadcast once before an evaluation instead of before every forward.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout)),
            ],
        )
    except dist.DistError as error:
        raise NodeError(
            f"rendezvous at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: rank "
            f"{os.environ.get('RANK')} on {socket.gethostname()} found {str(error).splitlines()[0].rstrip('.')}; "
            f"check that the port is free and that all {world_size} processes started"
        ) from error
    torch.set_num_threads(threads)
    if accelerator.num_processes != world_size:
        raise UserError(f"world size: the launcher asked for {world_size}, Accelerate has {accelerator.num_processes}")
    return World(
        accelerator=accelerator,
        control=_control_group(SETUP_TIMEOUT) if world_size > 1 else None,
        precision=precision,
        threads=threads,
        collective_timeout=timedelta(seconds=collective_timeout),
    )


@contextmanager
def joined(machine: MachineConfig, *, expect_world_size: int | None, collective_timeout: float) -> Iterator[World]:
    """The processes that the launcher started, as `start` joins them; at the end of the block they leave together, at a
    person's mistake too. All ranks take part."""
    with errors_once_per_node():
        world = start(machine, expect_world_size=expect_world_size, collective_timeout=collective_timeout)
    try:
        yield world
    except UserError as error:
        raise world.shutdown_with_error(error) from error
    world.shutdown()


def _wait(work: dist.Work | None, patience: timedelta) -> None:
    assert work is not None, "every rank is a member of the control group"
    work.wait(patience)


def _control_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member of the control group"
    return group


def wait_for_head(environment: Environment, patience: float) -> None:
    """Returns once rank 0 listens; on rank 0, if its own name is known. Raises `UserError` where the name is unknown or
    nobody listens within ``patience``, in seconds.

    The process group would wait as well, but say what it waited for in forty lines.
    """
    address = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "29500"))
    deadline = time.monotonic() + patience
    while True:
        try:
            if environment.get("RANK") == "0":
                socket.getaddrinfo(*address)
            else:
                socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
            if unknown or time.monotonic() > deadline - 0.5:
                raise NodeError(
                    f"head node {address[0]}:{address[1]}: not reached by rank {environment.get('RANK')} on "
                    f"{socket.gethostname()} ({error}); check that rank 0 started there, MASTER_ADDR, MASTER_PORT and "
                    "the network between"
                ) from error
        time.sleep(0.5)


def prepare(
    world: World, model: nn.Module, optimizer: torch.optim.Optimizer, machine: MachineConfig
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer for training: on the device, wrapped in DDP where there are several processes. All ranks
    take part.

    The model's memory format is set before. Gives the model to call in training; the one passed in stays the unwrapped
    one, with the same parameters.
    """
    prepared: nn.Module
    prepared_optimizer: torch.optim.Optimizer
    with warnings.catch_warnings():
        # torch 2.14 has a new name for it, which Accelerate 1.15 cannot pass on.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, prepared_optimizer = world.accelerator.prepare(model, optimizer)
    if machine.compile:
        # Around it, not in place: with one process it is the unwrapped model itself, which evaluation uses as it is.
        prepared = cast(nn.Module, torch.compile(prepared))
    return prepared, prepared_optimizer
