"""The environment of a run, to repeat it: versions, hardware, job, command."""

import os
import platform
import shlex
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import mnistm_dist
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.training.distributed import World

# What the last bits of a training depend on, beside its configuration: each launch logs them.
DECIDES_BITS = ("world_size", "threads", "device", "torch", "cuda")
PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "wandb", "numpy", "pillow", "safetensors")


def describe_environment(world: World, argv: list[str]) -> dict[str, str | int | None]:
    """Return the content of ``environment.json``: a flat mapping without secrets. ``argv``: the flags of the run."""
    device = world.device
    return {
        "mnistm_dist": mnistm_dist.__version__,
        "git_commit": git_commit(),
        "command": shlex.join(["python", "-m", "mnistm_dist.train", *argv]),
        "python": platform.python_version(),
        # None for a package without metadata.
        **{name: next((found.version for found in metadata.distributions(name=name)), None) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "gpus_on_this_node": torch.cuda.device_count(),
        "cpu_cores": available_cores(),
        "world_size": world.size,
        "threads": world.threads,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
    }


def device_name(device: torch.device) -> str:
    """Return the device's name for the header of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.backends.mps.is_available() or torch.xpu.is_available():
        return "CPU (of GPUs, only NVIDIA's and AMD's are supported)"
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return "CPU (no GPU found)" if given == "0" else f"CPU (Slurm allocated {given} GPUs, torch finds none)"


def processor() -> str:
    """Return the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def git_commit() -> str | None:
    """Return the commit of the package's git checkout, with ``+`` if tracked files were changed; None outside of
    one."""
    root = Path(mnistm_dist.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
