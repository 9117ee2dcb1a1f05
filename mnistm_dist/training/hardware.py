"""What this process may use: GPUs, CPU threads and native precisions."""

import os
import re
import resource
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from mnistm_dist.config import Config, MachineConfig, replace
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.errors import NodeError, RankError, UserError, errors_once_per_node

Precision = Literal["fp32", "bf16", "fp16"]
Environment = Mapping[str, str]
# What a configuration file of Accelerate may ask for in place of DDP.
STRATEGIES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
# What NVIDIA's driver creates.
DRIVER_VERSION, DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
# Of the last this many seconds, or more, the threads of a process waited this share for a core: the cores are busy.
BUSY_SECONDS, BUSY_SHARE = 10.0, 0.3


def check_launcher(environment: Environment) -> None:
    """Raise `UserError` if the variables of a launcher are incomplete, or ask for another strategy than DDP."""
    if "LOCAL_RANK" in environment or environment.get("WORLD_SIZE", "1") != "1" or environment.get("RANK", "0") != "0":
        numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        wrong = [name for name in numbers if not environment.get(name, "").isdecimal()]
        wrong += ["MASTER_ADDR"] * (not environment.get("MASTER_ADDR"))
        if wrong or int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
            found = [f"{name}={environment[name]}" for name in (*numbers, "MASTER_ADDR") if name in environment]
            raise UserError(
                f"launcher: found {', '.join(found)}; {', '.join(wrong) or 'RANK, which counts from 0,'} must be set "
                "for each of several processes; use accelerate launch or slurm/train.sh, or unset all for one process"
            )
    strategies = [name for name in STRATEGIES if environment.get(f"ACCELERATE_USE_{name}") == "true"]
    if strategies:
        raise UserError(
            f"Accelerate: its configuration asks for {strategies[0]}, accepted is DDP; use accelerate launch with "
            "--config_file accelerate_config.yaml"
        )


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has used so far, GB: of its GPU, else of the machine."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 4)
    # In bytes on macOS, in KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 4)


def find_device(environment: Environment) -> Literal["cuda", "cpu"]:
    """Return "cuda", with this process's GPU started, or "cpu" if there is none or Accelerate's launcher asks for it.

    Raise `UserError` if this node has more processes than GPUs, which NCCL refuses, or if torch cannot use a GPU that
    is there, as with a driver older than its CUDA.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    visible, processes = environment.get("CUDA_VISIBLE_DEVICES", "all"), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if found and processes > (gpus := torch.cuda.device_count()):
        raise NodeError(
            f"processes: {processes} on {socket.gethostname()}, torch finds {gpus} GPUs (CUDA_VISIBLE_DEVICES: "
            f"{visible}); use at most one process per GPU (--num_processes; under Slurm --gpus-per-node and "
            "--ntasks-per-node), and let each process see all GPUs of its node (no --gpu-bind, no "
            "--virtual-local-rank; of several MIG instances CUDA shows one)"
        )
    if found:
        gpu = f"cuda:{environment.get('LOCAL_RANK', '0')}"
        try:
            torch.ones(1, device=gpu).cpu()
        except RuntimeError as error:
            raise RankError(
                f"{gpu} on {socket.gethostname()} cannot be used: {first_line(error)}; see nvidia-smi, or set "
                "CUDA_VISIBLE_DEVICES= to use the CPU"
            ) from error
        return "cuda"
    # A job without GPUs may not open their devices.
    allowed = visible not in ("", "-1") and any(os.access(path, os.R_OK) for path in DEVICES.glob("nvidia[0-9]*"))
    if allowed and DRIVER_VERSION.exists():
        reason = "".join(f" ({warning.message})" for warning in reasons[:1])
        driver = re.search(r"\d+\.\d[.\d]*", DRIVER_VERSION.read_text())
        raise NodeError(
            f"GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPUs of "
            f"{socket.gethostname()}, whose NVIDIA driver is {driver and driver[0]}{reason}; "
            "install a newer driver or another torch, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return "cpu"


def check_world_size(world_size: int, expected: int | None, environment: Environment) -> None:
    """Raise `UserError` if the world size is not ``expected``, or is smaller than the number of tasks of Slurm's
    step."""
    if expected is not None and world_size != expected:
        raise UserError(
            f"world size: found {world_size}, --expect-world-size is {expected} (set by flag or recipe); check that "
            "every node started, and --num_processes (with --config_file accelerate_config.yaml or --multi_gpu)"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    # With restarts, nodes may be lost.
    if world_size < tasks and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        raise UserError(
            f"world size: found {world_size}, Slurm's step has {tasks} tasks that do not know of each other; "
            "use slurm/train.sh, or set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; "
            "in an interactive shell (srun --pty) use accelerate launch, or env -u SLURM_STEP_NUM_TASKS for one process"
        )


def first_line(error: RuntimeError) -> str:
    """Return the first line of an error of torch, and NCCL's own words if it has any: the rest are C++ frames."""
    text = str(error).strip()
    detail = re.search(r"^Last error:\s*(.+)", text, re.MULTILINE)
    return text.partition("\n")[0].rstrip(".") + (f" ({detail[1]})" if detail else "")


def check_compile(device: torch.device) -> None:
    """Raise `UserError` if torch.compile does not work on this machine, as without a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise UserError(
            f"compile: {str(error).splitlines()[0]}; install what torch.compile needs, or use --no-compile"
        ) from error


def default_threads(local_world_size: int, environment: Environment) -> int:
    """Return the CPU threads of one process: its share of the CPUs of Slurm's task, else of the available cores.

    OMP_NUM_THREADS is not used: launchers export OMP_NUM_THREADS=1 even for one process.
    """
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_CPUS_PER_TASK" in environment:
        # A task is one process of slurm/train.sh, or a launcher of several.
        processes = int(environment.get("WORLD_SIZE", "1")) // int(environment["SLURM_STEP_NUM_TASKS"])
        return max(1, int(environment["SLURM_CPUS_PER_TASK"]) // max(1, processes))
    return max(1, available_cores() // local_world_size)


def check_reproducible(machine: MachineConfig, precision: Precision) -> int:
    """Return the CPU threads of a reproducible run, on any number of processes: 1 for auto. Raise `UserError` for what
    cannot be reproduced on another number of processes."""
    if machine.sync_batchnorm:
        raise UserError("reproducible: --sync-batchnorm sums over the processes; use --no-sync-batchnorm")
    if precision == "fp16":
        raise UserError("reproducible: the gradient scaler of fp16 is not supported; use --precision bf16 or fp32")
    return 1 if machine.threads == "auto" else machine.threads


def check_cuda_graph(machine: MachineConfig, precision: Precision, device: torch.device, forwards: int) -> None:
    """Raise `UserError` for a step that a CUDA graph cannot hold. ``forwards``: forward passes of a process in it."""
    obstacles = {
        "it needs a GPU, found none": device.type != "cuda",
        "the gradient scaler of fp16 reads its scale on the host": precision == "fp16",
        "a --reproducible step sums its gradients outside the graph": machine.reproducible,
        f"it holds one forward pass, a step has {forwards} (--micro-batch)": forwards > 1,
    }
    for obstacle in (text for text, applies in obstacles.items() if applies):
        raise UserError(f"cuda_graph: {obstacle}; use --no-cuda-graph")


class CoreWatch:
    """Notices if the threads of this process wait for CPU cores, because others use them or a quota is used up."""

    def __init__(self, seconds: float = BUSY_SECONDS) -> None:
        self._seconds, self._since, self._warned = seconds, (time.perf_counter(), core_wait_seconds()), False

    def warning(self) -> str | None:
        """Return a warning if the cores were busy since the last call that looked, ``seconds`` ago or more; once."""
        if self._warned or time.perf_counter() - self._since[0] < self._seconds:
            return None
        before, self._since = self._since, (time.perf_counter(), core_wait_seconds())
        seconds, waited = (now - then for now, then in zip(self._since, before, strict=True))
        self._warned = waited > BUSY_SHARE * seconds
        if not self._warned:
            return None
        return (
            f"the CPU cores are busy: in {seconds:.0f} s, threads of this process waited {waited:.0f} s for a core, so "
            "steps take longer; stop other processes, or use fewer --threads or processes"
        )


def core_wait_seconds() -> float:
    """Return for how long the threads of this process were ready to run and had no CPU core, added up; 0 if the system
    does not count it (Linux does, in schedstat)."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may have ended.
        with suppress(OSError):
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


def native_precisions(device: str) -> tuple[Precision, ...]:
    """Return the precisions that ``device``, "cuda" or "cpu", does not emulate, the one to train in first.

    A CPU has bf16 with AMX or with AVX-512 BF16.
    """
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "fp32", "fp16") if has_bf16 else ("fp32", "fp16")
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return ("bf16", "fp32") if has_bf16 else ("fp32",)


def native_or_fp32(config: Config) -> Config:
    """Return how to compute here: in fp32 if the precision would be emulated. Raise `UserError` of `find_device`."""
    with errors_once_per_node():
        native = config.machine.precision in ("auto", *native_precisions(find_device(os.environ)))
    return config if native else replace(config, precision="fp32")


def choose_precision(requested: str, launcher: str | None, native: tuple[Precision, ...]) -> Precision:
    """Return the precision to train in, one of ``native``.

    ``launcher`` is the launcher's mixed precision; its "no" counts as none, since `accelerate launch` sets "no" by
    default. Raise `UserError` if ``requested`` is not auto and not native.
    """
    if requested == "auto":
        return "fp16" if launcher == "fp16" and "fp16" in native else native[0]
    if requested not in native:
        raise UserError(
            f"precision: {requested} would be emulated on this machine and many times slower; use --precision fp32"
        )
    return requested
