"""Measure, side by side in one run: readers, training steps, processes, launches, recipes.

    python -m mnistm_dist.bench loader    readers, on one core: ours, WebDataset, ImageFolder, what else is installed
    python -m mnistm_dist.bench step      the trainer against a bare loop and a plain script; what else is faster
    python -m mnistm_dist.bench ranks     one process against several, and the share of communication
    python -m mnistm_dist.bench startup   from the launch to the first step, with an empty and with a full cache
    python -m mnistm_dist.bench recipe    time and images to an accuracy on val, by seed

Rounds are interleaved (A B C, A B C); medians, ratios and spreads are over the rounds. --json FILE writes
{"bench": NAME, "rows": [{"name": ..., "output": "uint8"|"model-ready", "images_per_second": x, "ratio": x,
"against": NAME, "spread": x}, ...], "conditions": {...}}; benches/ says what each one measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mnistm_dist import config as configuration
from mnistm_dist.config import ArgumentParser, Config
from mnistm_dist.errors import run_door

if TYPE_CHECKING:
    from mnistm_dist.benches.rounds import Result
    from mnistm_dist.benches.setting import Setting

ONE_CORE, ALL_CORES = 1, 0
"""Default threads."""


def main(argv: list[str]) -> int:
    """Runs one bench; returns the exit code. Raises `UserError`."""
    args = create_parser().parse_args(argv)
    cores = usable_cores()
    threads = args.threads or len(cores)
    if args.bench in ("loader", "step"):
        # Before torch and NumPy are loaded: their threads inherit it.
        cores = stay_on(cores[:threads])
    load_before = os.getloadavg()

    from mnistm_dist.benches.setting import Setting, conditions, open_set
    from mnistm_dist.benches.table import show
    from mnistm_dist.data.loader import default_cache_dir
    from mnistm_dist.data.output import saying_what_fails
    from mnistm_dist.reporting.console import Console

    setting = Setting(
        shards=args.shards,
        cache_dir=Path(args.cache_dir) if args.cache_dir else default_cache_dir(),
        rounds=args.rounds,
        threads=threads,
        cores=cores,
        batch_size=args.batch_size,
        only=tuple(filter(None, args.only.split(","))),
        console=Console(stream=sys.stderr),
    )
    found = measure(args, setting)
    found = replace(found, conditions={**conditions(setting, open_set(setting), load_before), **found.conditions})
    show(args.bench, found, sys.stdout)
    if args.json is not None:
        with saying_what_fails(args.json):
            args.json.write_text(json.dumps(found.to_json(args.bench), indent=1) + "\n", encoding="utf-8")
    return 0


def measure(args: argparse.Namespace, setting: Setting) -> Result:
    """The bench that was asked for."""
    match args.bench:
        case "loader":
            from mnistm_dist.benches import loader

            return loader.bench(
                setting, seconds=args.seconds, images=args.images, image_size=args.image_size, workers=args.workers
            )
        case "step":
            from mnistm_dist.benches import step

            config = configuration_of(args, setting)
            return step.bench(setting, config, steps=args.steps, compiled=args.compile, memory=args.memory)
        case "ranks":
            from mnistm_dist.benches import ranks

            config = configuration_of(args, setting)
            return ranks.bench(setting, config, world_sizes=world_sizes(args.processes), steps=args.steps)
        case "startup":
            from mnistm_dist.benches import startup

            return startup.bench(setting, recipe=args.recipe)
        case _:
            from mnistm_dist.benches import recipe

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
        "data": "resident",
        "batch_size": setting.batch_size,
        "threads": setting.threads,
        "max_steps": None,
        "checkpoint_every": 0,
        "checkpoint_minutes": 0,
        "track": "none",
        "checks": False,
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


def create_parser() -> ArgumentParser:
    """The flags."""
    parser = ArgumentParser(prog="python -m mnistm_dist.bench", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="loader|step|ranks|startup|recipe")

    def add(name: str, *, threads: int, threads_help: str) -> ArgumentParser:
        bench = benches.add_parser(name, description=f"{name}: see python -m mnistm_dist.bench --help")
        bench.add_argument(
            "--shards", metavar="DIR|URL", help="a packed set (default: shards/sample, packed if need be)"
        )
        bench.add_argument("--cache-dir", metavar="DIR", help="default: as in training")
        bench.add_argument("--json", type=result_path, metavar="FILE", help="write the result there too")
        number(bench, "--threads", threads, low=1, text=threads_help, shown="all cores" if not threads else None)
        return bench

    def add_rounds(bench: ArgumentParser, rounds: int) -> None:
        number(bench, "--rounds", rounds, low=1, text="interleaved rounds")
        number(bench, "--batch-size", 256, low=2, text="images of a batch; in training, over all processes")
        bench.add_argument("--only", default="", metavar="TEXT,TEXT", help="only contenders whose name holds a TEXT")

    one_core = "threads, and the cores that the process is kept on"
    loader = add("loader", threads=ONE_CORE, threads_help=one_core)
    add_rounds(loader, 5)
    loader.add_argument(
        "--seconds", type=positive, default=2.0, metavar="X", help="of a round of a reader (default: 2)"
    )
    number(loader, "--images", 10_000, low=10, text="images written out for readers of other formats")
    number(loader, "--image-size", 64, low=16, text="of what is model-ready, pixels")
    number(loader, "--workers", 0, low=0, text="worker processes of the other readers; 0: in this process")

    step = add("step", threads=ALL_CORES, threads_help=one_core)
    add_rounds(step, 5)
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure torch.compile")
    step.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="launch a training for its peak memory"
    )
    ranks = add("ranks", threads=ONE_CORE, threads_help="threads of each process")
    add_rounds(ranks, 3)
    ranks.add_argument(
        "--processes",
        type=numbers,
        metavar="N,N",
        help="world sizes, the reference first (default: 1 and 2, or all GPUs)",
    )
    for bench in (step, ranks):
        bench.add_argument("--recipe", default="baseline", metavar="NAME|FILE", help="default: baseline")
        number(bench, "--steps", None, low=1, text="steps of a round", shown="some seconds")
        number(bench, "--image-size", None, low=16, text="pixels", shown="the recipe's first")

    startup = add("startup", threads=ALL_CORES, threads_help="threads of the training")
    add_rounds(startup, 3)
    startup.add_argument("--recipe", default="baseline", metavar="NAME|FILE", help="default: baseline")

    recipe = add("recipe", threads=ALL_CORES, threads_help="threads of the trainings")
    recipe.set_defaults(rounds=1, batch_size=0, only="")
    recipe.add_argument(
        "--recipe", type=names, default=["fast"], metavar="NAME|FILE,...", help="recipes to train (default: fast)"
    )
    recipe.add_argument("--against", metavar="NAME|FILE", help="a recipe to compare with, trained with the first seed")
    recipe.add_argument("--accuracy", type=share, default=0.975, metavar="X", help="on val (default: 0.975)")
    recipe.add_argument("--seeds", type=numbers, default=[0], metavar="N,N", help="default: 0")
    recipe.add_argument("--to-end", action="store_true", help="let a training go on after it has reached the accuracy")
    recipe.add_argument(
        "--runs", default="runs/bench", metavar="DIR", help="where the trainings live and go on (default: runs/bench)"
    )
    return parser


def number(
    parser: ArgumentParser, flag: str, default: int | None, *, low: int, text: str, shown: str | None = None
) -> None:
    """A flag that takes a whole number from ``low`` on."""

    def parse(given: str) -> int:
        value = int(given) if given.isdecimal() else low - 1
        if not low <= value <= 2**31:
            raise argparse.ArgumentTypeError(f"{given!r} is not accepted; use a whole number from {low} on")
        return value

    help_text = f"{text} (default: {shown or default})"
    parser.add_argument(flag, type=parse, default=default, metavar="N", help=help_text)


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between, each once."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; use different whole numbers with commas between")
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """An argparse type: recipes with commas between, each once."""
    parts = text.split(",")
    if not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; use different recipes with commas between")
    return parts


def share(text: str) -> float:
    """An argparse type: a number above 0 and up to 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; use a number from 0 to 1, such as 0.975")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; use a number above 0")
    return value


def result_path(text: str) -> Path:
    """An argparse type: a file that can be written, so that no measurement is lost at its end."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: not a file in a folder that is there; make the folder first")
    return path


if __name__ == "__main__":
    sys.exit(run_door(main))
