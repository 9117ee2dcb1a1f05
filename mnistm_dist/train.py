"""Train: the story of a run, from its configuration to its report.

    python -m mnistm_dist.train                                             one process, on a GPU or the CPU
    accelerate launch --config_file accelerate_config.yaml --num_processes 8 -m mnistm_dist.train
    sbatch slurm/train.sh --recipe fast --shards shards/official            a cluster

1. The configuration: defaults, recipe, flags; at a resume, the run's own.
2. The processes join, the data is opened, every ``auto`` is resolved.
3. The run folder is locked; model and optimizer are created and, at a resume, restored.
4. The loop (training/trainer.py): step, log, evaluation, checkpoint; a signal saves and exits.
5. The final evaluation, the figures, the report.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mnistm_dist.cli import parse_train_flags
from mnistm_dist.errors import EXIT_PREEMPTED, errors_once_per_node, run_cli

if TYPE_CHECKING:
    from mnistm_dist.config import Config
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.tracking import Tracker
    from mnistm_dist.training.checkpoint import Checkpoint
    from mnistm_dist.training.distributed import World
    from mnistm_dist.training.preemption import StopRequest
    from mnistm_dist.training.setup import RunSetup


def main(argv: list[str]) -> int:
    """Train. Return the exit code: 0 finished, 2 user error, 75 saved and exited after a signal."""
    request = parse_train_flags(argv)
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.training import distributed
    from mnistm_dist.training.preemption import StopRequest, exit_with_launcher, parse_signals
    from mnistm_dist.training.resume import choose_start

    with errors_once_per_node():
        start = choose_start(request)
    if start is None:
        return 0
    config, checkpoint = start
    timeout, stop = config.run.collective_timeout, StopRequest()
    stop.install(parse_signals(config.run.signals))
    try:
        exit_with_launcher()
        with distributed.joined(
            config.machine, expect_world_size=config.run.expect_world_size, collective_timeout=timeout
        ) as world:
            console = Console(enabled=world.is_main)
            with console.library_warnings(), distributed.peer_failures(timeout):
                return train(config, checkpoint, world, console, stop)
    finally:
        stop.close(process_ends=__name__ == "__main__")


def train(config: Config, checkpoint: Checkpoint | None, world: World, console: Console, stop: StopRequest) -> int:
    """Steps 2 to 5 of a run. Return the exit code. All ranks take part."""
    from mnistm_dist.reporting.run_logger import RunLogger
    from mnistm_dist.results import finish, header_rows
    from mnistm_dist.training.distributed import peer_failures
    from mnistm_dist.training.preemption import Preempted
    from mnistm_dist.training.resume import agree_on_start, restore_state
    from mnistm_dist.training.schedule import Schedule
    from mnistm_dist.training.setup import acquire_run_dir, open_run, write_start
    from mnistm_dist.training.train_state import create_train_state
    from mnistm_dist.training.trainer import Trainer

    checkpoint = agree_on_start(config, checkpoint, world)
    run = open_run(config, world, console)
    world = run.world
    run_dir = world.run_on_all_ranks(lambda: acquire_run_dir(run, checkpoint))
    with run_dir, peer_failures(run.config.run.collective_timeout):
        classes, schedule = run.shards.manifest.classes, Schedule.of(run.config, run.shards.split("train").count)
        state = create_train_state(run.config, world, len(classes), run.shares)
        if checkpoint is not None:
            world.run_on_all_ranks(lambda: restore_state(state, checkpoint, run, console.warn))
        world.run_on_all_ranks(lambda: write_start(run, run_dir, state, resumed=checkpoint is not None))
        try:
            with tracking(run, console) as tracker:
                console.header("mnistm_dist", header_rows(run, state, schedule))
                logger = RunLogger(console, tracker, run_dir.log, classes)
                trainer = Trainer(run, run_dir, state, schedule, logger, stop)
                if run.config.run.sanity_checks and checkpoint is None:
                    trainer.check_model()
                trainer.fit()
                finish(run, run_dir, state, console, tracker)
        except Preempted as preempted:
            resume = f"python -m mnistm_dist.train --resume {shlex.quote(str(run.path))}"
            console.line(f"{preempted.reason}: saved at step {state.steps_done}. Resume with: {resume}")
            return EXIT_PREEMPTED
        run_dir.set_state("finished")
    return 0


@contextmanager
def tracking(run: RunSetup, console: Console) -> Iterator[Tracker]:
    """Open the tracker for the block and close it with the run's state: W&B would show a crashed run as finished."""
    from mnistm_dist.reporting.tracking import open_tracker
    from mnistm_dist.training.preemption import Preempted

    tracker = open_tracker(
        run.config.run.tracker if run.world.is_main else "none",
        run_dir=run.path,
        config=dataclasses.asdict(run.config),
        name=run.path.name,
        group=run.path.name,
        say=console.line,
    )
    try:
        yield tracker
    except Preempted:
        tracker.finish(EXIT_PREEMPTED, "preempted")
        raise
    except BaseException:
        tracker.finish(1, "failed")
        raise
    tracker.finish(0, "finished")


if __name__ == "__main__":
    sys.exit(run_cli(main))
