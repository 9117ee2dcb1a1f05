"""Evaluate a trained run, exactly, at any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 -m mnistm_dist.evaluate runs/NAME

Writes into the run: ``predictions_SPLIT.csv``, ``confusion_matrix_SPLIT.png``, ``mistakes_SPLIT.png`` and the split's
numbers in ``summary.json``; ``python -m mnistm_dist.report RUN`` then brings ``report.html`` up to date. On one kind of
device the predictions are the same, byte for byte, at every world size.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mnistm_dist.cli import ArgumentParser
from mnistm_dist.errors import errors_once_per_node, run_cli


def main(argv: list[str]) -> int:
    """Evaluates a run's checkpoint on its splits. Exit codes: 0, or 2 for a person's mistake."""
    parser = ArgumentParser(prog="python -m mnistm_dist.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--shards", metavar="DIR", help="the packed set (default: the run's)")
    parser.add_argument("--split", choices=["val", "test"], help="one split only (default: both)")
    parser.add_argument("--checkpoint", default="chosen", metavar="best|last|PATH", help="default: the run's choice")
    args = parser.parse_args(argv)

    from mnistm_dist import config as configuration
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.results import choose_checkpoint, evaluate_checkpoint, print_result, read_summary, write_summary
    from mnistm_dist.training import distributed
    from mnistm_dist.training.hardware import native_precisions
    from mnistm_dist.training.preemption import exit_with_launcher
    from mnistm_dist.training.run_dir import require_run
    from mnistm_dist.training.run_lock import RunLock
    from mnistm_dist.training.setup import EVALUATED_SPLITS, open_evaluation

    run_dir = Path(args.run)
    with errors_once_per_node():
        require_run(run_dir)
        config = configuration.load(run_dir / "config.yaml")
        if args.shards:
            config = configuration.replace(config, shards=args.shards)
    machine = replace(config.machine, threads="auto")
    emulated = machine.precision not in ("auto", *native_precisions())
    if emulated:
        machine = replace(machine, precision="fp32")
    exit_with_launcher()
    timeout = config.run.collective_timeout
    with distributed.joined(machine, expect_world_size=None, collective_timeout=timeout) as world:
        console = Console(enabled=world.is_main)
        if emulated:
            console.warn(f"precision: {config.machine.precision} is not native here; evaluating in fp32")
        lock = world.run_on_all_ranks(lambda: RunLock(run_dir) if world.is_main else nullcontext())
        with lock, console.library_warnings(), distributed.peer_failures(timeout):
            run = open_evaluation(config, world, console, run_dir, args.split)
            has_test = "test" in run.shards.manifest.splits
            checkpoint, entry = run.world.run_on_main(
                lambda: choose_checkpoint(run_dir, args.checkpoint, has_test=has_test)
            )
            results = evaluate_checkpoint(run, checkpoint, console)
            if world.is_main:
                summary = read_summary(run_dir)
                if summary.get("checkpoint") != entry or args.shards:
                    # The numbers of the other split are of another checkpoint, or of another set.
                    summary = {name: value for name, value in summary.items() if name not in EVALUATED_SPLITS}
                summary = write_summary(run_dir, summary | {"checkpoint": entry}, results)
                print_result(console, run_dir, summary, results)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
