"""What a run ran on, for whoever wants to repeat it: versions, hardware, job, command."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import mnistm_dist
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.training.distributed import World

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "wandb", "numpy", "pillow", "safetensors")


def describe_environment(world: World) -> dict[str, str | int | None]:
    """A flat mapping for ``environment.json``. Reads no secret: of the environment's variables only the job's own."""
    device = world.device
    return {
        "mnistm_dist": mnistm_dist.__version__,
        "git_commit": git_commit(),
        "command": command_line(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
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


def command_line() -> str:
    """The command of this process, as a shell takes it."""
    return shlex.join(["python", "-m", "mnistm_dist.train", *sys.argv[1:]])


def device_name(device: torch.device) -> str:
    """What a run computes on, for its header."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return "CPU (no GPU found)" if given == "0" else f"CPU (Slurm gave {given} GPUs, torch finds none)"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def git_commit() -> str | None:
    """The commit of the checkout that the package runs from, with ``+`` if its files differ; None for an installed
    wheel."""
    root = Path(mnistm_dist.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
