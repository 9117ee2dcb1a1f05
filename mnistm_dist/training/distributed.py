"""The processes of a run: how they join, exchange data, agree and shut down.

Accelerate is set up here, once. It prepares the model and the optimizer and nothing else: a prepared loader would be
sharded twice (accelerate#3547), and a prepared scheduler would step once per process (accelerate#2773). All explicit
collective operations of the package are in this file; functions that call one say "All ranks take part".
"""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn import functional

from mnistm_dist.config import MachineConfig
from mnistm_dist.errors import NodeError, PeerFailure, RankError, UserError, errors_once_per_node
from mnistm_dist.training.hardware import (
    Environment,
    Precision,
    check_gpus,
    check_launcher,
    check_reproducible,
    check_world_size,
    choose_precision,
    default_threads,
    native_precisions,
)

T = TypeVar("T")

# Limit of each wait until the data is open: one node may decode for hours while the others wait.
SETUP_TIMEOUT = timedelta(hours=12)
# How long the other ranks wait for rank 0 to listen: on a slow disk, processes start minutes apart.
RENDEZVOUS_SECONDS = 300.0
# How long a rank that exits with an error waits for the others, which may not know of it. Rank 0 may need 20 seconds to
# close its tracker first.
SHUTDOWN_TIMEOUT = timedelta(seconds=25)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process and its peers."""

    accelerator: Accelerator
    rank: int
    size: int
    local_rank: int
    is_main: bool
    """Whether this is rank 0."""
    device: torch.device
    control: dist.ProcessGroup | None
    """A gloo group for objects, errors and the stop consensus: it never waits for a GPU. None for one process."""
    precision: Precision
    threads: int
    """CPU threads of this process."""
    collective_timeout: timedelta
    """Limit of each wait for a peer once the data is open; before that it is `SETUP_TIMEOUT`."""

    def broadcast_object(self, value: T | None) -> T:
        """Return rank 0's ``value`` on every rank. All ranks take part."""
        box = [value]
        if self.control is not None:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]  # rank 0 passes a T

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank; if it raises a `UserError` on one, raise that error on all. All ranks take
        part.

        Otherwise the ranks without an error would wait for the one that exited.
        """
        result, message = None, None
        try:
            result = function()
        except UserError as error:
            message = str(error)
        for other in filter(None, self.gather_objects(message)):
            raise UserError(other)
        return result  # type: ignore[return-value]  # no error, so function() returned

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0; return its result, or raise its `UserError`, on every rank.

        All ranks take part.
        """
        return self.broadcast_object(self.run_on_all_ranks(lambda: function() if self.is_main else None))

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's ``value``, in rank order, on every rank. All ranks take part."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Return every rank's ``value``, in rank order, on rank 0 and None elsewhere. All ranks take part."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def gather_rows(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Return every rank's ``values``, float (counts[rank], n), as (sum(counts), n), in rank order, on every rank.

        All ranks take part.
        """
        if self.size == 1:
            return values
        longest = max(counts)
        padded = functional.pad(values, (0, 0, 0, longest - len(values)))
        rows = self.all_gather(padded, out=values.new_empty(self.size * longest, *values.shape[1:]))
        return torch.cat([part[:count] for part, count in zip(rows.split(longest), counts, strict=True)])

    def all_gather(self, part: Tensor, out: Tensor) -> Tensor:
        """Concatenate every rank's ``part``, all of one shape, in ``out`` and return it. All ranks take part."""
        # torch 2.14 renamed all_gather_into_tensor; 2.10 does not know its new name.
        dist.all_gather(list(out.split(len(part))), part.contiguous())
        return out

    def all_to_all(self, parts: Tensor, counts: Sequence[int]) -> Tensor:
        """Send the s-th of equal parts of a flat tensor to rank s; return what each rank sent, in rank order.

        ``counts``: how many elements each rank sends. All ranks take part.
        """
        received = parts.new_empty(sum(counts))
        dist.all_to_all_single(received, parts, list(counts), [len(parts) // self.size] * self.size)
        return received

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy rank 0's values into ``tensors`` on every rank. All ranks take part."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def with_run_timeout(self) -> World:
        """Return this world with ``collective_timeout`` as the limit of every wait. All ranks take part."""
        if self.control is None:
            return self
        return replace(self, control=_control_group(self.collective_timeout))

    def shutdown(self, timeout: timedelta | None = None) -> bool:
        """Destroy the process groups once all ranks are here, or after ``timeout`` (default: ``collective_timeout``).

        Return whether all ranks were here. All ranks take part.
        """
        if not dist.is_initialized():
            return True
        try:
            self._barrier(timeout or self.collective_timeout)
            return True
        except RuntimeError:
            return False
        finally:
            dist.destroy_process_group()

    def _barrier(self, timeout: timedelta) -> None:
        """Wait for all ranks.

        torch's monitored_barrier applies its limit on rank 0 only, not where rank 0 is missing.
        """
        token = torch.zeros(1)
        if self.is_main:
            for rank in range(1, self.size):
                _wait(dist.irecv(token, rank, group=self.control), timeout)
            for rank in range(1, self.size):
                _wait(dist.isend(token, rank, group=self.control), timeout)
        else:
            _wait(dist.isend(token, 0, group=self.control), timeout)
            _wait(dist.irecv(token, 0, group=self.control), timeout)

    def shutdown_with_error(self, error: UserError) -> UserError:
        """Shut down and return the error to raise: a `RankError` if the other ranks do not have it.

        All ranks take part.
        """
        return error if self.shutdown(SHUTDOWN_TIMEOUT) else RankError(str(error))


class StopConsensus:
    """The largest action that any rank asks for, known to all ranks one step later.

    Step s sends this rank's action and reads the answer to step s - 1: no step waits for a message under way, and all
    ranks read the same answer at the same step.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: tuple[dist.Work, Tensor] | None = None

    def exchange(self, action: int) -> int:
        """Send ``action``; return the largest of the previous step, 0 at the first. For one process, return ``action``.

        All ranks take part.
        """
        if self.group is None:
            return action
        agreed = 0
        if self.pending is not None:
            work, message = self.pending
            work.wait()
            agreed = int(message)
        message = torch.tensor([action], dtype=torch.int32)
        self.pending = (dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group, async_op=True), message)
        return agreed


def join(machine: MachineConfig, *, expect_world_size: int | None, collective_timeout: float) -> World:
    """Join the other processes that the launcher started. All ranks take part.

    Raise `UserError` if the world size is not the expected one, or if the hardware lacks what was asked for.
    """
    if dist.is_initialized():
        # accelerate's debug_launcher, which leaves these variables to its process group.
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
    check_launcher(os.environ)
    on_gpu = torch.cuda.is_available()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(world_size, expect_world_size, os.environ)
    if on_gpu:
        check_gpus(local_world_size, torch.cuda.device_count())
    if machine.sync_batchnorm and not on_gpu:
        raise UserError(
            "sync_batchnorm: torch supports SyncBatchNorm on GPUs only, found none; use --no-sync-batchnorm"
        )
    precision = choose_precision(machine.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"), native_precisions())
    threads = default_threads(local_world_size, os.environ) if machine.threads == "auto" else machine.threads
    if machine.reproducible:
        threads = check_reproducible(machine, precision)
    if machine.deterministic or (machine.reproducible and on_gpu):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world_size > 1 and not dist.is_initialized():
        wait_for_rank_0(os.environ, min(collective_timeout, RENDEZVOUS_SECONDS))
    # Otherwise Accelerate sets it to 1 for several processes on CPU, and each process prints a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision="no" if precision == "fp32" else precision,
            # A configuration file of Accelerate may ask for both, which are --compile and --micro-batch here.
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                # Buffers are broadcast once before an evaluation instead of before every forward.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout)),
            ],
        )
        if world_size > 1:
            # Creating a group waits for all ranks: with the short limit once, so that the next one finds them all.
            _control_group(timedelta(seconds=collective_timeout))
    except dist.DistError as error:
        raise NodeError(
            f"rendezvous at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: rank "
            f"{os.environ.get('RANK')} on {socket.gethostname()} failed: {str(error).splitlines()[0].rstrip('.')}; "
            f"check that the port is free and that all {world_size} processes started and live"
        ) from error
    torch.set_num_threads(threads)
    if accelerator.num_processes != world_size:
        raise UserError(f"world size: the launcher set {world_size}, Accelerate has {accelerator.num_processes}")
    return World(
        accelerator=accelerator,
        rank=accelerator.process_index,
        size=world_size,
        local_rank=accelerator.local_process_index,
        is_main=accelerator.process_index == 0,
        device=accelerator.device,
        control=_control_group(SETUP_TIMEOUT) if world_size > 1 else None,
        precision=precision,
        threads=threads,
        collective_timeout=timedelta(seconds=collective_timeout),
    )


@contextmanager
def joined(machine: MachineConfig, *, expect_world_size: int | None, collective_timeout: float) -> Iterator[World]:
    """`join` the other processes for the block and shut down with them afterwards, also after a `UserError`.

    All ranks take part.
    """
    with errors_once_per_node(), peer_failures(collective_timeout):
        world = join(machine, expect_world_size=expect_world_size, collective_timeout=collective_timeout)
    try:
        yield world
    except UserError as error:
        raise world.shutdown_with_error(error) from error
    world.shutdown()


# Error texts of gloo and NCCL when a peer is dead, or silent for longer than a collective operation may take.
_PEER_FAILURE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Application timeout caused pair closure|"
    r"Timed out waiting \d+ms|[Ww]atchdog caught collective operation timeout|remote process exited|"
    r"communicator was aborted"
)


@contextmanager
def peer_failures(collective_timeout: float) -> Iterator[None]:
    """Turn the error of a collective operation with a dead or silent peer into a `PeerFailure`.

    ``collective_timeout``, in seconds, is named in the message. Other errors pass through.
    """
    try:
        yield
    except RuntimeError as error:
        match = _PEER_FAILURE.search(str(error))
        if match is None:
            raise
        raise PeerFailure(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: another process of the run was killed, or "
            f"silent for --collective-timeout {collective_timeout:g} s ({match[0]}); see the log of its node; "
            "resume from the last checkpoint with --resume auto"
        ) from error


def wait_for_rank_0(environment: Environment, timeout: float) -> None:
    """Return when rank 0 listens; on rank 0, when its own name resolves.

    Raise `UserError` if the name is unknown or nobody listens within ``timeout`` seconds. The process group would wait
    as well, but its error has forty lines.
    """
    address = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "29500"))
    deadline = time.monotonic() + timeout
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
                    f"head node {address[0]}:{address[1]}: rank {environment.get('RANK')} on {socket.gethostname()} "
                    f"cannot reach it ({error}); check that rank 0 started there, MASTER_ADDR, MASTER_PORT and the "
                    "network"
                ) from error
        time.sleep(0.5)


def prepare(
    world: World, model: nn.Module, optimizer: torch.optim.Optimizer, machine: MachineConfig
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Move model and optimizer to the device; wrap the model in DDP if there are several processes and it is to sum the
    gradients. All ranks take part.

    Return the model to call in training; the one passed in stays unwrapped and shares its parameters. Its memory format
    must be set before.
    """
    prepared: nn.Module
    prepared_optimizer: torch.optim.Optimizer
    with warnings.catch_warnings():
        # torch 2.14 renamed the argument; Accelerate 1.15 still passes the old name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared = world.accelerator.prepare_model(model, evaluation_mode=machine.reproducible)
        prepared_optimizer = world.accelerator.prepare_optimizer(optimizer)
    if machine.compile:
        # A compiled copy: with one process, ``prepared`` is ``model`` itself, which evaluation uses uncompiled.
        prepared = cast(nn.Module, torch.compile(prepared))
    return prepared, prepared_optimizer


def _control_group(timeout: timedelta) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


def _wait(work: dist.Work | None, timeout: timedelta) -> None:
    assert work is not None, "every rank is a member of the control group"
    work.wait(timeout)
