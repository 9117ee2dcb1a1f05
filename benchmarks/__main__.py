"""Benchmarks that measure alternatives side by side in one run.

python -m benchmarks loader|step|logs|ranks|startup|recipe [--shards DIR] [--json FILE]
python -m benchmarks faithful [--only TOOL,...] [--json FILE]

Rounds are interleaved (A B C, A B C); rates, ratios and spreads are over the rounds. --json FILE writes {"bench": NAME,
"rows": [{"name", "output": "uint8"|"model-ready", "images_per_second", "ratio", "against", "spread"}, ...],
"conditions": {...}}.
"""

import dataclasses
import importlib
import json
import os
import sys

import tyro

from benchmarks.options import Faithful, Loader, Logs, Options, Output, Ranks, Recipe, Startup, Step
from mnistm_dist.errors import run_cli

# The module of a benchmark's function, which has the benchmark's name. It is imported after the flags are parsed.
MODULES = {
    **{Loader: "loader", Step: "steps", Logs: "logs", Ranks: "steps", Startup: "runs", Recipe: "runs"},
    Faithful: "faithful",
}


def main(argv: list[str]) -> int:
    """Run one benchmark and return the exit code. Raises `UserError`."""
    options: Output = tyro.extras.subcommand_cli_from_dict(
        {each.__name__.lower(): each for each in MODULES},
        prog="python -m benchmarks",
        description=__doc__,
        args=argv,
    )
    name, load_before = type(options).__name__.lower(), os.getloadavg()
    # Before torch and NumPy are imported: their threads inherit the affinity.
    cores = pin(options.threads if isinstance(options, Loader | Step | Logs) else 0)
    # WebDataset reads it when it is imported: no pickles, no shell commands. `faithful` measures it as it is.
    os.environ["WDS_SECURE"] = "1" if isinstance(options, Options) else "0"
    module = importlib.import_module(f"benchmarks.{MODULES[type(options)]}")
    if isinstance(options, Options):
        from mnistm_dist.training.hardware import find_device

        # A GPU that does not work is one line, as in training.
        find_device(os.environ)
        options = dataclasses.replace(options, threads=options.threads or len(cores))
    result = getattr(module, name)(options)
    result["conditions"] |= {"cores": cores, "load_average_before": load_before}
    if isinstance(options, Faithful):
        module.print_answers(result)
    else:
        importlib.import_module("benchmarks.measure").print_table(name, result)
    if options.json:
        options.json.write_text(json.dumps({"bench": name, **result}, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def pin(count: int) -> list[int]:
    """Keep this process and its children on the first ``count`` of its cores (0: all) if the system can; return the
    cores."""
    if not hasattr(os, "sched_setaffinity"):
        return list(range(os.cpu_count() or 1))
    cores = sorted(os.sched_getaffinity(0))[: count or None]
    os.sched_setaffinity(0, cores)
    return cores


if __name__ == "__main__":
    sys.exit(run_cli(main))
