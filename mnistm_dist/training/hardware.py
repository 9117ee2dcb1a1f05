"""What a process finds here and may use: as many others as were asked for, a GPU, cores, native precisions."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Literal

import torch

from mnistm_dist.data.parallel import available_cores
from mnistm_dist.errors import NodeError, UserError

Precision = Literal["fp32", "bf16", "fp16"]
Environment = Mapping[str, str]


def check_world_size(world_size: int, expected: int | None, environment: Environment) -> None:
    """Raises `UserError` unless the world is as large as the flag and Slurm's step say: 1 where 2 were asked for is no
    slow run."""
    if expected is not None and world_size != expected:
        raise UserError(
            f"world size: found {world_size}, --expect-world-size is {expected} (by a flag or the recipe); check that "
            "every node started, and --num_processes (with --config_file accelerate_config.yaml or --multi_gpu)"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size < tasks:
        raise UserError(
            f"world size: found {world_size}, Slurm's step has {tasks} tasks; the tasks do not know of each other: "
            "start them by slurm/train.sh, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )


def check_gpus(local_world_size: int, gpus: int) -> None:
    """Raises `UserError` where this node has more processes than GPUs: two on one GPU train no faster, and NCCL refuses
    them."""
    if local_world_size > gpus:
        raise NodeError(
            f"processes: {local_world_size} on {socket.gethostname()}, where torch finds {gpus} GPUs; "
            "use at most one process per GPU (--num_processes; under Slurm --gpus-per-node and --ntasks-per-node)"
        )


def default_threads(local_world_size: int, environment: Environment) -> int:
    """CPU threads of one process: its share of the CPUs of Slurm's task, else of the cores that this process may use.

    A launcher exports OMP_NUM_THREADS=1 even for one process, so the choice is made here.
    """
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_CPUS_PER_TASK" in environment:
        # A task is one process of slurm/train.sh, or a launcher of several.
        processes = int(environment.get("WORLD_SIZE", "1")) // int(environment["SLURM_STEP_NUM_TASKS"])
        return max(1, int(environment["SLURM_CPUS_PER_TASK"]) // max(1, processes))
    return max(1, available_cores() // local_world_size)


def native_precisions() -> tuple[Precision, ...]:
    """What this machine computes in without emulation."""
    if not torch.cuda.is_available():
        return ("fp32",)
    return ("fp32", "fp16", "bf16") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", "fp16")


def choose_precision(asked: str, launcher: str | None, native: tuple[Precision, ...]) -> Precision:
    """The precision to train in, one of ``native``: never one that the hardware emulates.

    ``launcher``: what it names. Its "no" names none, since `accelerate launch` says that too where nobody chose. Raises
    `UserError` where one that is not native was asked for by name.
    """
    if asked == "auto":
        candidates: tuple[Precision, ...] = ("fp16", "bf16", "fp32") if launcher == "fp16" else ("bf16", "fp32")
        return next(action for action in candidates if action in native)
    if asked not in native:
        raise UserError(
            f"precision: {asked} would be emulated on this machine, many times slower; use --precision auto or fp32"
        )
    return asked
