"""Measure, side by side in one run: readers, training steps, processes, launches, recipes.

    python -m benchmarks loader    readers, on one core: ours, WebDataset, ImageFolder, what else is installed
    python -m benchmarks step      the trainer against a bare loop and a plain script; what else is faster
    python -m benchmarks ranks     one process against several, and the share of communication
    python -m benchmarks startup   from the launch to the first step, with an empty and with a full cache
    python -m benchmarks recipe    time and images to an accuracy on val, by seed

Rounds are interleaved (A B C, A B C); medians, ratios and spreads are over the rounds. --json FILE writes
{"bench": NAME, "rows": [{"name": ..., "output": "uint8"|"model-ready", "images_per_second": x, "ratio": x,
"against": NAME, "spread": x}, ...], "conditions": {...}}; mnistm_dist/benches/ says what each one measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.flags import create_parser
from mnistm_dist import config as configuration
from mnistm_dist.config import Config
from mnistm_dist.errors import run_cli

if TYPE_CHECKING:
    from benchmarks.rounds import Result
    from benchmarks.setting import Setting


def main(argv: list[str]) -> int:
    """Runs one bench; returns the exit code. Raises `UserError`."""
    args = create_parser("python -m benchmarks", str(__doc__)).parse_args(argv)
    cores = usable_cores()
    threads = args.threads or len(cores)
    if args.bench in ("loader", "step"):
        # Before torch and NumPy are loaded: their threads inherit it.
        cores = stay_on(cores[:threads])
    load_before = os.getloadavg()

    from benchmarks.setting import Setting, conditions, open_set
    from benchmarks.table import show
    from mnistm_dist.data.cache import choose_cache_dir
    from mnistm_dist.files import explain_os_errors
    from mnistm_dist.reporting.console import Console

    setting = Setting(
        shards=args.shards,
        cache_dir=choose_cache_dir(args.cache_dir),
        rounds=args.rounds,
        threads=threads,
        cores=cores,
        batch_size=args.batch_size,
        only=tuple(filter(None, args.only.split(","))),
        console=Console(stream=sys.stderr),
    )
    found = measure(args, setting)
    around = conditions(setting, open_set(setting), argv, load_before)
    found = replace(found, conditions={**around, **found.conditions})
    show(args.bench, found, sys.stdout)
    if args.json is not None:
        with explain_os_errors(args.json):
            args.json.write_text(json.dumps(found.to_json(args.bench), indent=1) + "\n", encoding="utf-8")
    return 0


def measure(args: argparse.Namespace, setting: Setting) -> Result:
    """The bench that was asked for."""
    match args.bench:
        case "loader":
            from benchmarks import loader

            return loader.bench(
                setting, seconds=args.seconds, images=args.images, image_size=args.image_size, workers=args.workers
            )
        case "step":
            from benchmarks import step

            config = configuration_of(args, setting)
            return step.bench(setting, config, steps=args.steps, compiled=args.compile, memory=args.memory)
        case "ranks":
            from benchmarks import ranks

            config = configuration_of(args, setting)
            return ranks.bench(setting, config, world_sizes=world_sizes(args.processes), steps=args.steps)
        case "startup":
            from benchmarks import startup

            return startup.bench(setting, recipe=args.recipe)
        case _:
            from benchmarks import recipe

            return recipe.bench(
                setting,
                args.recipe,
                against=args.against,
                seeds=args.seeds,
                accuracy=args.accuracy,
                to_end=args.to_end,
                runs=Path(args.runs),
            )


def configuration_of(args: argparse.Namespace, setting: Setting) -> Config:
    """The recipe, for training steps alone: nothing saved or tracked on the way."""
    given = {
        **configuration.read_recipe(args.recipe),
        "shards": setting.shards,
        "cache_dir": str(setting.cache_dir),
        "reader": "resident",
        "batch_size": setting.batch_size,
        "threads": setting.threads,
        "max_steps": None,
        "checkpoint_every": 0,
        "checkpoint_minutes": 0,
        "tracker": "none",
        "sanity_checks": False,
    }
    if args.image_size is not None:
        given["image_size"] = (args.image_size,)
    return configuration.build(args.recipe, given)


def world_sizes(asked: list[int] | None) -> tuple[int, ...]:
    """The world sizes to compare: 1, and one process per GPU, or 2 without a GPU."""
    import torch

    if asked:
        return tuple(asked)
    gpus = torch.cuda.device_count()
    return (1,) if gpus == 1 else (1, gpus or 2)


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def stay_on(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Keeps this process, and what it starts, on these cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
        return cores
    return usable_cores()


if __name__ == "__main__":
    sys.exit(run_cli(main))
