"""The flags of ``python -m benchmarks``: a subcommand for each bench. Loads nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mnistm_dist.errors import print_error

ONE_CORE, ALL_CORES = 1, 0
"""Default threads."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a mistake told in one line: ``error: ...``, exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see --help)")
        raise SystemExit(2)


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: whole numbers of a range."""

    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else low - 1
        if not low <= value <= high:
            bound = f"from {low} to {high}" if high < 2**63 - 1 else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not accepted; use a whole number {bound}")
        return value

    return parse


def create_parser(prog: str, description: str) -> ArgumentParser:
    """A subcommand for each bench, described by its line ``bench NAME   WHAT`` of the description."""
    parser = ArgumentParser(prog=prog, description=description)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="loader|step|ranks|startup|recipe")

    def add(name: str, *, threads: int, threads_help: str) -> ArgumentParser:
        what = next(line for line in description.splitlines() if f"bench {name} " in line).partition(name)[2].strip()
        bench = benches.add_parser(name, description=f"{what[0].upper()}{what[1:]}.")
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
        bench.add_argument(
            "--only", default="", metavar="TEXT,TEXT", help="only rows of the table whose name holds a TEXT"
        )

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
    help_text = f"{text} (default: {shown or default})"
    parser.add_argument(flag, type=integer(low, 2**31), default=default, metavar="N", help=help_text)


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
