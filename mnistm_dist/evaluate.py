"""Evaluate a trained run, exactly, with any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 \\
        -m mnistm_dist.evaluate runs/NAME

Writes into RUN, for each split: predictions_SPLIT.csv, mistakes_SPLIT.png,
confusion_matrix_SPLIT.png, and the metrics in summary.json. Update report.html
with python -m mnistm_dist.report RUN. On one kind of device the predictions are
the same bytes at every world size.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import OrNone
from mnistm_dist.errors import errors_once_per_node, run_cli


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
    from mnistm_dist.results import choose_checkpoint, evaluate_checkpoint, print_result, read_summary, write_summary
    from mnistm_dist.training import distributed
    from mnistm_dist.training.hardware import find_device, native_precisions
    from mnistm_dist.training.preemption import exit_with_launcher
    from mnistm_dist.training.run_dir import CONFIG_NAME, require_run
    from mnistm_dist.training.run_lock import RunLock
    from mnistm_dist.training.setup import EVALUATED_SPLITS, open_evaluation

    run_dir = Path(run)
    with errors_once_per_node():
        require_run(run_dir)
        config = configuration.load(run_dir / CONFIG_NAME)
        if shards:
            config = configuration.replace(config, shards=shards)
    machine = replace(config.machine, threads="auto")
    with errors_once_per_node():
        emulated = machine.precision not in ("auto", *native_precisions(find_device(os.environ)))
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
            opened = open_evaluation(config, world, console, run_dir, split)
            has_test = "test" in opened.shards.manifest.splits
            chosen, entry = opened.world.run_on_main(lambda: choose_checkpoint(run_dir, checkpoint, has_test=has_test))
            predictions = evaluate_checkpoint(opened, chosen, console)
            if world.is_main:
                summary = read_summary(run_dir)
                if summary.get("checkpoint") != entry or shards:
                    # The numbers of the other split are of another checkpoint, or of another set.
                    summary = {name: value for name, value in summary.items() if name not in EVALUATED_SPLITS}
                summary = write_summary(run_dir, summary | {"checkpoint": entry}, predictions)
                print_result(console, run_dir, summary, predictions)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
