"""Evaluate a trained run, exactly, with any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --num_processes 4 -m mnistm_dist.evaluate runs/NAME

Writes into RUN, for each split: predictions_SPLIT.csv, mistakes_SPLIT.png,
confusion_matrix_SPLIT.png, and the metrics in summary.json. Update report.html
with python -m mnistm_dist.report RUN. On one kind of device the predictions are
the same bytes at every world size.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import OrNone
from mnistm_dist.errors import UserError, errors_once_per_node, run_cli


@command
def main(
    run: Annotated[str, arg(metavar="RUN")],
    /,
    *,
    shards: OrNone[str] = None,
    split: OrNone[Literal["val", "test"]] = None,
    checkpoint: str = "chosen",
) -> int:
    """Evaluate a checkpoint of a run.

    Args:
        run: A run folder.
        shards: Packed set. none: the one that the run was trained on.
        split: Evaluate only this split. none: all that the set has.
        checkpoint: best, last, or the path of a checkpoint. chosen: the one that the run has chosen.
    """
    from mnistm_dist import config as configuration
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.results import choose_checkpoint, evaluate_checkpoint, read_summary, tell_result, write_summary
    from mnistm_dist.training import distributed
    from mnistm_dist.training.hardware import native_precisions
    from mnistm_dist.training.peer_failure import peer_failures
    from mnistm_dist.training.preemption import die_with_launcher
    from mnistm_dist.training.run_dir import is_locked
    from mnistm_dist.training.setup import open_readers, open_set

    run_dir = Path(run)
    with errors_once_per_node():
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir}: no run folder (no config.yaml); name one, such as runs/NAME")
        if is_locked(run_dir):
            raise UserError(f"{run_dir}: a live run holds it; wait for its end")
        config = configuration.load(run_dir / "config.yaml")
        if shards:
            config = configuration.replace(config, shards=shards)
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
            packed = open_set(config.data, world, console)
            splits = [name for name in ("val", "test") if name in packed.manifest.splits]
            if split is not None:
                packed.split(split)
                splits = [split]
            has_test = "test" in packed.manifest.splits
            chosen, how = world.run_on_main(lambda: choose_checkpoint(run_dir, checkpoint, has_test=has_test))
            readers = open_readers(packed, config.data, splits, world, console)
            world = world.with_run_timeout()
            results = evaluate_checkpoint(run_dir, chosen, config, world, console, packed, readers)
            if world.is_main:
                summary = read_summary(run_dir)
                if summary.get("checkpoint") != how or shards:
                    # The other split's numbers are another checkpoint's, or another set's.
                    summary = {name: value for name, value in summary.items() if name not in ("val", "test")}
                summary = summary | {"checkpoint": how} | results
                write_summary(run_dir, summary)
                tell_result(console, run_dir, summary, list(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
