"""The processes of a run: how they join, exchange data, agree and shut down.

Accelerate is set up here, once. It prepares the model and the optimizer and nothing else: a prepared loader would be
sharded twice (accelerate#3547), and a prepared scheduler would step once per process (accelerate#2773). All explicit
collective operations of the package are in this file; functions that call one say "All ranks take part".
"""

import ctypes
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from mnistm_dist.config import Config, MachineConfig
from mnistm_dist.errors import NodeError, PeerFailure, RankError, UserError, errors_once_per_node
from mnistm_dist.training.hardware import (
    Environment,
    Precision,
    check_launcher,
    check_reproducible,
    check_world_size,
    choose_precision,
    default_threads,
    find_device,
    first_line,
    native_precisions,
)

T = TypeVar("T")

# Limit of each wait until the data is open: one node may decode for hours while the others wait.
SETUP_TIMEOUT = timedelta(hours=12)
# How much longer NCCL waits for a peer than gloo. Its watchdog aborts the process; gloo's error is one line.
NCCL_EXTRA_TIMEOUT = timedelta(seconds=60)
# Interval at which the device is polled; the ranks ask each other about as often whether to stop, or at every step.
POLL_SECONDS, CONSENSUS_SECONDS = 0.001, 0.01
# How long the other ranks wait for rank 0 to listen: on a slow disk, processes start minutes apart.
RENDEZVOUS_SECONDS = 300.0
# How long a rank that exits with an error waits for the others, which may not know of it. Rank 0 may need 20 seconds to
# close its tracker first.
SHUTDOWN_TIMEOUT = timedelta(seconds=25)
# Of prctl(2).
PR_SET_PDEATHSIG = 1


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

    def gather_objects(self, value: T, *, on_main: bool = False) -> list[T]:
        """Return every rank's ``value``, in rank order, on every rank; or ``on_main`` only, and no values elsewhere.

        All ranks take part.
        """
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main or not on_main else []
        if on_main:
            dist.gather_object(value, values or None, dst=0, group=self.control)
        else:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_rows(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Return every rank's ``values``, float (counts[rank], n), as (sum(counts), n), in rank order, on every rank.

        All ranks take part.
        """
        if self.size == 1:
            return values
        longest = max(counts)
        padded = nn.functional.pad(values, (0, 0, 0, longest - len(values)))
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

    def fetch(self, values: Tensor) -> Tensor:
        """Return ``values`` on the CPU.

        A GPU is polled: if it waits for a silent peer, this raises a `RuntimeError` that `peer_failures` knows, before
        NCCL aborts the process.
        """
        if values.is_cuda:
            done, started = torch.cuda.current_stream().record_event(), time.monotonic()
            while not done.query():
                if time.monotonic() - started > self.collective_timeout.total_seconds():
                    raise RuntimeError(f"Timed out waiting {self.collective_timeout.total_seconds():.0f}000ms")
                time.sleep(POLL_SECONDS)
        return values.cpu()

    def limit_waits(self, timeout: timedelta) -> None:
        """Make ``timeout`` the limit of every wait for a peer."""
        if self.control is not None:
            self.control._get_backend(torch.device("cpu"))._set_default_timeout(timeout)

    def shutdown(self, timeout: timedelta | None = None) -> bool:
        """Destroy the process groups once all ranks are here, or after ``timeout`` (default: ``collective_timeout``).

        Return whether all ranks were here. All ranks take part.
        """
        if not dist.is_initialized():
            return True
        complete = False
        with suppress(RuntimeError):
            self._barrier(timeout or self.collective_timeout)
            complete = True
        if complete or self.device.type == "cpu":
            # Otherwise NCCL would wait for the missing peer before the error is printed. The process's end aborts it.
            dist.destroy_process_group()
        return complete

    def _barrier(self, timeout: timedelta) -> None:
        """Wait for all ranks.

        torch's monitored_barrier applies its limit on rank 0 only, not where rank 0 is missing.
        """
        token = torch.zeros(1)
        # Rank 0 hears from every rank, then answers each.
        peers = range(1, self.size) if self.is_main else [0]
        for exchange in (dist.irecv, dist.isend) if self.is_main else (dist.isend, dist.irecv):
            for rank in peers:
                work = exchange(token, rank, group=self.control)
                assert work is not None, "every rank is a member of the control group"
                work.wait(timeout)


class StopConsensus:
    """The largest action that any rank asks for, known to all ranks one exchange later.

    An exchange sends this rank's action and reads the answer to the last one: no step waits for a message under way,
    and all ranks read the same answer at the same step. There is one at every step; if steps are shorter than
    `CONSENSUS_SECONDS`, every few steps, as many as the answer says.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: tuple[dist.Work, Tensor] | None = None
        self.action, self.steps, self.every, self.started = 0, 0, 1, time.perf_counter()

    def exchange(self, action: int) -> int:
        """Send ``action``; return the largest of the last exchange, 0 if there is none at this step. For one process,
        return ``action``. All ranks take part.
        """
        if self.group is None:
            return action
        self.action, self.steps, agreed = max(self.action, action), self.steps + 1, 0
        if self.steps < self.every:
            return 0
        now = time.perf_counter()
        step_microseconds = int((now - self.started) / self.steps * 1e6)
        if self.pending is not None:
            work, message = self.pending
            work.wait()
            agreed, longest = message.tolist()
            self.every = max(1, int(CONSENSUS_SECONDS * 1e6 / max(1, longest)))
        message = torch.tensor([self.action, step_microseconds], dtype=torch.int64)
        self.pending = (dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group, async_op=True), message)
        self.action, self.steps, self.started = 0, 0, now
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
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(world_size, expect_world_size, os.environ)
    device = find_device(os.environ)
    on_gpu = device == "cuda"
    if machine.sync_batchnorm and not on_gpu:
        raise UserError(
            "sync_batchnorm: torch supports SyncBatchNorm on GPUs only, found none; use --no-sync-batchnorm"
        )
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision = choose_precision(machine.precision, launcher_precision, native_precisions(device))
    threads = default_threads(local_world_size, os.environ) if machine.threads == "auto" else machine.threads
    timeout = timedelta(seconds=collective_timeout)
    if machine.reproducible:
        threads = check_reproducible(machine, precision)
    if machine.deterministic or (machine.reproducible and on_gpu):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if machine.cuda_graph and on_gpu:
        # The default stream cannot be captured. No other thread of this process gives work to its GPU.
        torch.cuda.set_stream(torch.cuda.Stream(int(os.environ.get("LOCAL_RANK", "0"))))
        # As torch's documentation asks for. `World.fetch` has a time limit of its own.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
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
                InitProcessGroupKwargs(timeout=timeout + (NCCL_EXTRA_TIMEOUT if on_gpu else timedelta())),
            ],
        )
        if accelerator.num_processes != world_size:
            raise UserError(f"world size: the launcher set {world_size}, Accelerate has {accelerator.num_processes}")
        torch.set_num_threads(threads)
        # Creating a group waits for all ranks.
        control = _control_group(timeout) if world_size > 1 else None
        world = World(
            accelerator=accelerator,
            rank=accelerator.process_index,
            size=world_size,
            local_rank=accelerator.local_process_index,
            is_main=accelerator.process_index == 0,
            device=accelerator.device,
            control=control,
            precision=precision,
            threads=threads,
            collective_timeout=timeout,
        )
        if world_size > 1:
            # NCCL connects at the first collective operation: an error of it comes now, not after decoding.
            token = torch.ones(1, device=world.device)
            dist.all_reduce(token)
            world.fetch(token)
    except dist.DistError as error:
        # A rendezvous fails on all ranks alike, NCCL perhaps on one.
        kind = RankError if isinstance(error, dist.DistBackendError) else NodeError
        raise kind(
            f"rendezvous at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: rank "
            f"{os.environ.get('RANK')} on {socket.gethostname()} failed: {first_line(error)}; "
            f"check that the port is free and that all {world_size} processes started and live"
        ) from error
    world.limit_waits(SETUP_TIMEOUT)
    return world


def exit_promptly() -> None:
    """Let Ctrl-C end this process at once if it is one of several, and the death of its launcher end it, too.

    Python's own handler of SIGINT waits until a collective operation ends. The kernel sends SIGTERM when the launcher
    dies, so that no trainer is left behind (Linux, prctl(2)); a run started from a shell continues when the shell ends.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def joined(config: Config, *, expect_world_size: int | None = None) -> Iterator[World]:
    """`join` the other processes for the block and shut down with them afterwards, also after a `UserError`.

    In the block, a dead or silent peer is a `PeerFailure`. All ranks take part.
    """
    exit_promptly()
    timeout = config.run.collective_timeout
    with errors_once_per_node(), peer_failures(timeout):
        world = join(config.machine, expect_world_size=expect_world_size, collective_timeout=timeout)
    try:
        with peer_failures(timeout):
            yield world
    except UserError as error:
        # The other ranks may not have this error, and not come.
        raise (error if world.shutdown(SHUTDOWN_TIMEOUT) else RankError(str(error))) from error
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
    with warnings.catch_warnings():
        # torch 2.14 renamed the argument; Accelerate 1.15 still passes the old name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared = world.accelerator.prepare_model(model, evaluation_mode=machine.reproducible)
        prepared_optimizer = world.accelerator.prepare_optimizer(optimizer)
    if machine.compile:
        # A compiled copy: with one process, ``prepared`` is ``model`` itself, which evaluation uses uncompiled. Each
        # image size is compiled by itself: dynamic sizes are slower.
        prepared = torch.compile(prepared, dynamic=False)
    return prepared, prepared_optimizer


def _control_group(timeout: timedelta) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
