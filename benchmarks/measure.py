"""What every benchmark works with, and how it measures: interleaved rounds, medians, ratios, spreads.

A round measures each contender once, A B C, and the next one again, A B C, so that other load on the machine affects
all of them. A ratio is the median over the rounds of the ratios within a round.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import rich.progress
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.options import SAMPLE, Options, Rounds, Training
from mnistm_dist import config as configuration
from mnistm_dist.config import Config, DataConfig
from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.loader import Reader, open_reader
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError
from mnistm_dist.training.environment import PACKAGES, processor
from mnistm_dist.training.hardware import native_precisions

# One round of one contender: ``images_per_second``, and other quantities with the unit in the name.
Measurement = dict[str, float]
# ``rows`` and ``conditions``, as ``--json`` writes them.
Result = dict[str, Any]
RESIDENT = DataConfig(order="full", reader="resident")
# Training steps per round, by device: some seconds.
STEPS = {"cpu": 10, "cuda": 500}
# Steps that no benchmark reaches.
ENDLESS = 2**40


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to measure."""

    name: str
    measure: Callable[[], Measurement]  # One round.
    against: tuple[str, ...]  # Contenders to compare with, a row for each. A reference names itself.
    output: str = "model-ready"  # or "uint8": images as they are stored.


def default_device() -> torch.device:
    """Return the GPU if there is one, as in training."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_precision() -> str:
    """Return what ``--precision auto`` chooses in training."""
    return "bf16" if "bf16" in native_precisions(default_device().type) else "fp32"


def open_set(options: Options) -> ShardSet:
    """Open the packed set; pack the bundled sample first if necessary. Raises `UserError`."""
    if options.shards == SAMPLE and not Path(SAMPLE).exists():
        command = [sys.executable, "-m", "mnistm_dist.pack", "sample", "--out", SAMPLE]
        # The secure mode of webdataset writes no files.
        if subprocess.run(command, stdout=sys.stderr, env={**os.environ, "WDS_SECURE": "0"}).returncode:
            raise UserError(f"{SAMPLE}: the bundled sample could not be packed; name a packed set with --shards")
    return open_shards(options.shards, cache_dir=options.cache_dir)


def open_train(options: Options, shards: ShardSet, data: DataConfig = RESIDENT) -> Reader:
    """Open the training split; decode it first if it is not in the cache. Raises `UserError`."""
    return open_reader(
        shards, "train", data, cache_dir=options.cache_dir, device=default_device(), threads=options.threads
    )


def open_training(options: Training) -> tuple[Config, Manifest, Any]:
    """Return the recipe at one image size, the manifest, and the training split. Raises `UserError`."""
    config, shards = configuration.build(options.recipe, configuration.read_recipe(options.recipe)), open_set(options)
    image_size = (options.image_size or config.steps.image_size[0],)
    config = configuration.replace(config, batch_size=options.batch_size, image_size=image_size)
    return config, shards.manifest, open_train(options, shards)


def clock() -> tuple[float, float]:
    """Return the host's clock and the CPU time of this process, in seconds, after all work queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def rate(images: int, start: tuple[float, float]) -> Measurement:
    """Return the rate of ``images`` since the `clock` was ``start``."""
    seconds, cpu_seconds = (after - before for before, after in zip(start, clock(), strict=True))
    return {"images_per_second": images / seconds, "images_per_cpu_second": images / cpu_seconds}


def run(options: Rounds, contenders: Sequence[Contender], *, warm_up: int, **conditions: Any) -> Result:
    """Measure the contenders that ``--only`` selects, after ``warm_up`` rounds that do not count.

    Raises `UserError` if a text of ``--only`` is in no name.
    """
    unknown = [text for text in options.only if not any(text in contender.name for contender in contenders)]
    if unknown:
        names = "; ".join(contender.name for contender in contenders)
        raise UserError(f"--only: no row is named {unknown[0]!r}; choose from: {names}")
    chosen = [each for each in contenders if not options.only or any(text in each.name for text in options.only)]
    measured: dict[str, list[Measurement]] = {contender.name: [] for contender in chosen}
    turns, console = [*chosen] * (warm_up + options.rounds), Console(stderr=True)
    for turn in rich.progress.track(turns, "measuring", console=console, disable=not console.is_terminal):
        measured[turn.name].append(turn.measure())
    measured = {name: rounds[warm_up:] for name, rounds in measured.items()}
    conditions |= {
        "ratio": "median over the rounds of images_per_second / that of `against` in the same round",
        "spread": "(largest - smallest) / median of images_per_second over the rounds",
        "images_per_cpu_second": "per second of CPU time of this process, all threads",
        "details": {
            name: {key: [round(each[key], 4) for each in rounds] for key in rounds[0]}
            for name, rounds in measured.items()
        },
    }
    return {"rows": compare(chosen, measured), "conditions": {**machine(options), **conditions}}


def compare(contenders: Sequence[Contender], measured: dict[str, list[Measurement]]) -> list[Result]:
    """Return a row for each contender and each one that it is compared with; ratio None: that one was not measured."""
    rates = {name: [each["images_per_second"] for each in rounds] for name, rounds in measured.items()}
    return [
        {
            "name": contender.name,
            "output": contender.output,
            "images_per_second": round(median(rates[contender.name]), 2),
            "ratio": round(median(a / b for a, b in zip(rates[contender.name], rates[against], strict=True)), 4)
            if against in rates
            else None,
            "against": against,
            "spread": spread(rates[contender.name]),
        }
        for contender in contenders
        for against in contender.against
    ]


def spread(values: Sequence[float]) -> float:
    """Return (largest - smallest) / median."""
    return round((max(values) - min(values)) / median(values), 4)


def print_table(bench: str, result: Result) -> None:
    """Print the rows, then the conditions."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("name", "output", "images/s", "ratio", "against", "spread", title=f"bench {bench}", box=None)
    for row in result["rows"]:
        numbers = ("-" if row[key] is None else f"{row[key]:,.3f}" for key in ("images_per_second", "ratio"))
        table.add_row(row["name"], row["output"], *numbers, row["against"], f"{100 * row['spread']:.1f} %")
    console.print(table)
    conditions = dict(result["conditions"])
    details = conditions.pop("details")
    for name, value in {**conditions, **details}.items():
        console.print(f"{name}: {value}", markup=False, soft_wrap=True)


def machine(options: Options) -> Result:
    """Return command, machine, versions, options, data, and the load averages over 1, 5 and 15 minutes."""
    shards = open_set(options)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": default_device().type,
        "precision": default_precision(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        **vars(options),
        "set": shards.manifest.identity[:16],
        "lineage": shards.manifest.lineage,
        "counts": {name: split.count for name, split in shards.manifest.splits.items()},
        "load_average_after": os.getloadavg(),
    }
