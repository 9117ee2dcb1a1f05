"""Train: the story of a run, from its configuration to its report.

    python -m mnistm_dist.train                                             one process, on a GPU or the CPU
    accelerate launch --config_file accelerate_config.yaml --num_processes 8 -m mnistm_dist.train
    sbatch slurm/train.sh --recipe fast --shards shards/official            a cluster

1. The configuration: defaults, recipe, flags; at a resume, the run's own.
2. The processes join; the data is opened; every ``auto`` is settled.
3. The run folder is taken; model, optimizer and, at a resume, their state.
4. The loop: step, log, evaluation, checkpoint; a signal saves and leaves.
5. The final evaluation, the figures, the report.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mnistm_dist.cli import parse_flags
from mnistm_dist.errors import EXIT_PREEMPTED, errors_once_per_node, escape_control, run_cli

if TYPE_CHECKING:
    from mnistm_dist.config import Config
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.training.checkpoint import Checkpoint
    from mnistm_dist.training.distributed import World
    from mnistm_dist.training.preemption import StopRequest
    from mnistm_dist.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """Trains, and returns the exit code: 0 finished, 2 a person's mistake, 75 saved and left after a signal."""
    request = parse_flags(argv)
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.training import distributed
    from mnistm_dist.training.peer_failure import peer_failures
    from mnistm_dist.training.preemption import StopRequest, die_with_launcher, parse_signals
    from mnistm_dist.training.setup import choose_start

    with errors_once_per_node():
        config, checkpoint = choose_start(request)
    if config is None:
        return 0
    stop = StopRequest()
    stop.install(parse_signals(config.run.signals))
    try:
        die_with_launcher()
        with distributed.joined(
            config.machine,
            expect_world_size=config.run.expect_world_size,
            collective_timeout=config.run.collective_timeout,
        ) as world:
            console = Console(enabled=world.is_main)
            with console.library_warnings(), peer_failures(config.run.collective_timeout):
                return train(config, checkpoint, world, console, stop)
    finally:
        stop.close(process_ends=__name__ == "__main__")


def train(config: Config, checkpoint: Checkpoint | None, world: World, console: Console, stop: StopRequest) -> int:
    """Steps 2 to 5 of a run. All ranks take part."""
    from mnistm_dist.training.peer_failure import peer_failures
    from mnistm_dist.training.setup import acquire_run_dir, agree, choose_run_dir, open_readers, open_set, resolve
    from mnistm_dist.training.trainer import Preempted, Trainer

    checkpoint = agree(config, checkpoint, world)
    shards = open_set(config.data, world, console)
    config = world.run_on_all_ranks(lambda: resolve(config, world, shards.manifest))
    readers = open_readers(shards, config.data, shards.manifest.splits, world, console)
    world = world.with_run_timeout()
    run_dir = world.run_on_main(lambda: choose_run_dir(config))
    folder = world.run_on_all_ranks(
        lambda: acquire_run_dir(run_dir, resume=config.run.resume, checkpoint=checkpoint, active=world.is_main)
    )
    with folder, peer_failures(config.run.collective_timeout):
        trainer = Trainer(config, world, console, folder, shards, readers, stop)
        trainer.begin(checkpoint)
        try:
            with trainer.tracking():
                if config.run.sanity_checks and checkpoint is None:
                    trainer.check()
                trainer.train()
                finish(trainer)
        except Preempted as preempted:
            console.line(f"{preempted.reason}: saved after step {folder.steps_done}; --resume {run_dir} goes on")
            return EXIT_PREEMPTED
        folder.tell("finished")
    return 0


def finish(trainer: Trainer) -> None:
    """The final evaluation of the chosen checkpoint on val and test, the figures, the summary, the report. All ranks
    take part."""
    from mnistm_dist.reporting.curves import learning_curve
    from mnistm_dist.reporting.html import write_report
    from mnistm_dist.reporting.predictions import read_predictions
    from mnistm_dist.reporting.style import save
    from mnistm_dist.reporting.tracking import log_results
    from mnistm_dist.results import choose_checkpoint, evaluate_checkpoint, tell_result, write_summary
    from mnistm_dist.training.run_dir import writing
    from mnistm_dist.training.trainer import summary_fields

    world, folder, console = trainer.world, trainer.folder, trainer.console
    readers = {split: reader for split, reader in trainer.readers.items() if split != "train"}
    checkpoint, how = world.run_on_main(lambda: choose_checkpoint(folder.path, "chosen", has_test="test" in readers))
    results = evaluate_checkpoint(folder.path, checkpoint, trainer.config, world, console, trainer.shards, readers)
    if not world.is_main:
        return
    summary = {**summary_fields(trainer), "checkpoint": how, **results}
    write_summary(folder.path, summary)
    if trainer.config.run.report:
        curve = learning_curve(folder.rows, f"Learning curve, {escape_control(folder.path.name)}")
        with writing(folder.path):
            save(curve, folder.path / "learning_curve.png")
    predictions = {split: read_predictions(folder.path / f"predictions_{split}.csv") for split in results}
    if trainer.config.run.report:
        write_report([folder.path], folder.path / "report.html", predictions)
    trainer.tracker.summary(summary)
    log_results(trainer.tracker, sorted(folder.path.glob("*.png")), predictions, folder.steps_done)
    if trainer.config.run.upload_checkpoint:
        trainer.tracker.log_checkpoint(checkpoint.path, [str(how["chosen"]).split()[0]])
    tell_result(console, folder.path, summary, list(results), report=trainer.config.run.report)


if __name__ == "__main__":
    sys.exit(run_cli(main))
