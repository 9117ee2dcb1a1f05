"""A run, from its configuration to its report.

1. The configuration: defaults, recipe, flags; at a resume, the run's own.
2. The processes join, the data is opened, every ``auto`` is resolved.
3. Model and optimizer are created and checked; the run folder is locked and, at a resume, a checkpoint restored.
4. The loop (training/trainer.py): step, log, evaluation, checkpoint; a signal saves and exits.
5. The final evaluation, the figures, the report.
"""

import dataclasses
import functools
import shlex
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.cli import TrainRequest, write_result
from mnistm_dist.config import Config, dump
from mnistm_dist.errors import EXIT_PREEMPTED, errors_once_per_node, is_first
from mnistm_dist.estimate import images_left, print_estimate
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.metrics import CustomMetrics, measure_custom
from mnistm_dist.reporting.run_logger import RunLogger
from mnistm_dist.reporting.tracking import Tracker, open_tracker
from mnistm_dist.results import finish, header_rows
from mnistm_dist.training import distributed
from mnistm_dist.training.checkpoint import Checkpoint, restore
from mnistm_dist.training.initial_state import create_train_state
from mnistm_dist.training.preemption import Preempted, StopRequest, parse_signals
from mnistm_dist.training.resume import agree_on_start, check_resume, choose_start
from mnistm_dist.training.run_dir import read_summary
from mnistm_dist.training.setup import RunSetup, acquire_run_dir, open_run, write_start
from mnistm_dist.training.trainer import Trainer


def launch(request: TrainRequest, metrics: CustomMetrics, *, process_ends: bool) -> tuple[int, dict[str, Any]]:
    """Step 1 of a run, and its processes. Return the exit code, and what the last run's ``summary.json`` holds.

    ``process_ends``: whether this process ends with the run, as that of a command does. ``metrics``: of the user's own.
    """
    with errors_once_per_node():
        requests = [request.of_seed(seed) for seed in request.seeds] or [request]
        starts = [(one, start) for one in requests if (start := choose_start(one)) is not None]
    run_dirs = [Path(str(one.config.run.run_dir)) for one in requests if request.seeds]
    if not starts:
        run = requests[-1].config.run
        return 0, conclude(Path(str(run.run_dir or run.resume)), run_dirs, Console(enabled=is_first()))
    _, (config, checkpoint) = starts[0]
    if request.flags.print_config:
        if is_first():
            write_result(dump(config))
        return 0, {}
    stop = StopRequest(parse_signals(config.run.stop_signals))
    try:
        with distributed.joined(config, expect_world_size=config.run.expect_world_size) as world:
            console = Console(enabled=world.is_main)
            with console.library_warnings():
                if request.flags.dry_run:
                    print_estimate(open_run(config, world, console), console, checkpoint.step if checkpoint else 0)
                    return 0, {}
                for one, (config, checkpoint) in starts:
                    run_dir = train(config, checkpoint, world, console, stop, one.argv, metrics)
                    if run_dir is None:
                        return EXIT_PREEMPTED, {}
                assert run_dir is not None, "starts is not empty"
                return 0, world.run_on_main(functools.partial(conclude, run_dir, run_dirs, console))
    finally:
        stop.close(process_ends=process_ends)


def conclude(last: Path, run_dirs: Sequence[Path], console: Console) -> dict[str, Any]:
    """Return the content of ``summary.json`` of the last run, and its folder. Of runs that differ in their seed, if
    any, print mean and spread of the accuracy, and write their comparison."""
    summaries = [read_summary(run_dir) for run_dir in run_dirs]
    for split in ("val", "test"):
        scores = [100 * summary[split]["accuracy"] for summary in summaries if split in summary]
        if len(scores) > 1:
            spread = f"standard deviation {statistics.stdev(scores):.2f}, {min(scores):.2f} to {max(scores):.2f}"
            console.line(f"{split}: mean {statistics.fmean(scores):.2f} % of {len(scores)} seeds, {spread}")
    if len(run_dirs) > 1:
        from mnistm_dist.reporting.html import write_report

        page = run_dirs[0].parent / "report.html"
        write_report(run_dirs, page)
        console.line(f"comparison: {page}")
    return {**read_summary(last), "run_dir": str(last)}


def train(
    config: Config,
    checkpoint: Checkpoint | None,
    world: distributed.World,
    console: Console,
    stop: StopRequest,
    argv: list[str],
    metrics: CustomMetrics,
) -> Path | None:
    """Steps 2 to 5 of a run. Return its folder, None if a signal has stopped it. All ranks take part."""
    checkpoint = agree_on_start(config, checkpoint, world)
    run = open_run(config, world, console)
    if checkpoint is not None:
        world.run_on_all_ranks(lambda: check_resume(checkpoint, run, console.warn))
    classes, resumed = run.shards.manifest.classes, checkpoint is not None
    # Before the run folder is made: it refuses what cannot be trained.
    state = create_train_state(run.config, world, len(classes), run.shares, resumed=resumed)
    measure_custom(metrics, np.eye(len(classes)), np.arange(len(classes)))
    run_dir = world.run_on_all_ranks(lambda: acquire_run_dir(run, checkpoint))
    stop.install()
    with run_dir, distributed.peer_failures(run.config.run.collective_timeout):
        if checkpoint is not None:
            world.run_on_all_ranks(lambda: restore(checkpoint, state, world.accelerator.scaler))
        world.run_on_all_ranks(lambda: write_start(run, run_dir, state, console.line, resumed=resumed, argv=argv))
        try:
            with tracking(run, console) as tracker:
                console.header(f"run {run.path}", header_rows(run, state, tracker.name))
                left = functools.partial(images_left, run)
                logger = RunLogger(console, tracker, run_dir.log, classes, left, metrics)
                trainer = Trainer(run, run_dir, state, logger, stop)
                if run.config.run.sanity_checks and not resumed:
                    trainer.check_model()
                trainer.fit()
                finish(run, run_dir, state, console, tracker, metrics)
        except Preempted as preempted:
            resume = f"python -m mnistm_dist.train --resume {shlex.quote(str(run.path))}"
            console.line(f"{preempted}: saved at step {state.steps_done}. Resume with: {resume}")
            return None
    return run.path


@contextmanager
def tracking(run: RunSetup, console: Console) -> Iterator[Tracker]:
    """Open the tracker for the block and close it with the run's state: W&B would show a crashed run as finished."""
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
