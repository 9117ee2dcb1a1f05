"""What every bench is told, and the conditions that every result tells."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.resident import Resident, open_resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.reporting.console import Console
from mnistm_dist.training.environment import PACKAGES, processor
from mnistm_dist.training.setup import SAMPLE, pack_sample

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every bench is told."""

    shards: str | None
    """A packed set: a folder or an address. None: the bundled sample, packed first if need be."""
    cache_dir: Path
    rounds: int
    threads: int
    """Threads of torch in each process."""
    cores: tuple[int, ...]
    """The cores that this process, and what it starts, is kept on."""
    batch_size: int
    """Images of a batch; in training, over all processes."""
    only: tuple[str, ...]
    """Texts of which a contender's name must hold one. Empty: all contenders."""
    console: Console


def open_set(setting: Setting) -> ShardSet:
    """The packed set. Raises `UserError`."""
    if setting.shards is None:
        pack_sample(setting.console)
    return open_shards(setting.shards or str(SAMPLE), cache_dir=setting.cache_dir)


def open_train(setting: Setting, shards: ShardSet, device: torch.device) -> Resident:
    """The training split, decoded first if it is not in the cache. Raises `UserError`."""
    with setting.console.progress("opening train", shards.split("train").count) as bar:
        return open_resident(
            shards,
            "train",
            cache_dir=setting.cache_dir,
            device=device,
            workers=len(setting.cores),
            progress=bar,
        )


def device_here() -> torch.device:
    """The GPU if there is one, as in training."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def conditions(setting: Setting, shards: ShardSet, argv: Sequence[str], load_before: Sequence[float]) -> dict[str, Any]:
    """Command, machine, versions, data, and how busy the machine was: load averages over 1, 5 and 15 minutes."""
    device = device_here()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "platform": platform.platform(),
        "cores": list(setting.cores),
        "threads": setting.threads,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "shards": str(shards.root),
        "set": shards.manifest.identity[:16],
        "lineage": shards.manifest.lineage,
        "counts": {name: split.count for name, split in shards.manifest.splits.items()},
        "load_average_before": [round(load, 2) for load in load_before],
        "load_average_after": [round(load, 2) for load in os.getloadavg()],
    }
