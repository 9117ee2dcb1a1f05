"""Evaluate a trained run, exactly, at any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 -m mnistm_dist.evaluate runs/NAME

Writes into the run: ``predictions_SPLIT.csv``, ``confusion_matrix_SPLIT.png``, ``mistakes_SPLIT.png`` and the split's
numbers in ``summary.json``; ``python -m mnistm_dist.report RUN`` then brings ``report.html`` up to date. On one kind of
device the predictions are the same, byte for byte, at every world size.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mnistm_dist.cli import ArgumentParser
from mnistm_dist.errors import UserError, errors_once_per_node, run_cli


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
    from mnistm_dist.results import choose_checkpoint, evaluate_checkpoint, read_summary, tell_result, write_summary
    from mnistm_dist.training import distributed
    from mnistm_dist.training.hardware import native_precisions
    from mnistm_dist.training.peer_failure import peer_failures
    from mnistm_dist.training.preemption import die_with_launcher
    from mnistm_dist.training.run_dir import is_locked
    from mnistm_dist.training.setup import open_readers, open_set

    run_dir = Path(args.run)
    with errors_once_per_node():
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir}: no run folder (no config.yaml); name one, such as runs/NAME")
        if is_locked(run_dir):
            raise UserError(f"{run_dir}: a live run holds it; wait for its end")
        config = configuration.load(run_dir / "config.yaml")
        if args.shards:
            config = configuration.replace(config, shards=args.shards)
    machine = replace(config.machine, threads="auto")
    emulated = machine.precision not in ("auto", *native_precisions())
    if emulated:
        machine = replace(machine, precision="fp32")
    die_with_launcher()
    timeout = config.run.collective_timeout
    with distributed.joined(machine, expect_world_size=None, collective_timeout=timeout) as world:
        console = Console(enabled=world.is_main)
        if emulated:
            console.warn(f"precision: the run's {config.machine.precision} is not native here; scored in fp32")
        with console.library_warnings(), peer_failures(timeout):
            shards = open_set(config.data, world, console)
            splits = [split for split in ("val", "test") if split in shards.manifest.splits]
            if args.split is not None:
                shards.split(args.split)
                splits = [args.split]
            has_test = "test" in shards.manifest.splits
            checkpoint, how = world.run_on_main(lambda: choose_checkpoint(run_dir, args.checkpoint, has_test=has_test))
            readers = open_readers(shards, config.data, splits, world, console)
            world = world.with_run_timeout()
            results = evaluate_checkpoint(run_dir, checkpoint, config, world, console, shards, readers)
            if world.is_main:
                summary = read_summary(run_dir)
                if summary.get("checkpoint") != how or args.shards:
                    # The other split's numbers are another checkpoint's, or another set's.
                    summary = {name: value for name, value in summary.items() if name not in ("val", "test")}
                summary = summary | {"checkpoint": how} | results
                write_summary(run_dir, summary)
                tell_result(console, run_dir, summary, list(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
