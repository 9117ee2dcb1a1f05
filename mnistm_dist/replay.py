"""Train steps of a run again, in a temporary folder, by the code that trained them.

1. `opened`: the configuration and the data of the run; nothing is written to its folder.
2. `train_again`: from a checkpoint, or from the initial weights, up to a step.
3. `losses_of_step`: the loss of each image of a step, and of the step.

On one kind of machine, on as many processes and threads, losses and weights are the same to the last bit.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from mnistm_dist.config import Config, replace
from mnistm_dist.errors import is_first
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.describe import duration
from mnistm_dist.reporting.run_logger import RunLogger
from mnistm_dist.reporting.tracking import Tracker
from mnistm_dist.training import distributed
from mnistm_dist.training.checkpoint import Checkpoint, complete, restore
from mnistm_dist.training.hardware import native_or_fp32
from mnistm_dist.training.initial_state import create_train_state
from mnistm_dist.training.preemption import StopRequest
from mnistm_dist.training.run_dir import LOG_NAME, RunDir, read_log, step_losses
from mnistm_dist.training.setup import RunSetup, open_run
from mnistm_dist.training.trainer import Trainer


@contextmanager
def opened(config: Config, console: Console) -> Iterator[RunSetup]:
    """Join the other processes and open the data of a run for the block, with a temporary folder as its run folder.

    All ranks take part.
    """
    with (
        distributed.joined(native_or_fp32(config)) as world,
        console.library_warnings(),
        TemporaryDirectory() as folder,
    ):
        config = replace(
            config,
            run_dir=folder,
            resume=None,
            precision=world.precision,
            log_every=1,
            keep_checkpoints="all",
            checkpoint_minutes=0,
            profile_steps=0,
            report=False,
            cuda_graph=False,
        )
        yield open_run(config, world, console)


def train_again(run: RunSetup, start: Checkpoint | None, stop: int, console: Console) -> Trainer:
    """Train from a checkpoint, or from the initial weights, until ``stop`` steps are done. All ranks take part."""
    run = dataclasses.replace(run, config=replace(run.config, max_steps=stop or None))
    world, classes = run.world, run.shards.manifest.classes
    state = create_train_state(run.config, world, len(classes), run.shares, resumed=start is not None)
    if start is not None:
        world.run_on_all_ranks(lambda: restore(start, state, world.accelerator.scaler))
    with world.run_on_all_ranks(lambda: RunDir(run.path, active=world.is_main)) as run_dir:
        logger = RunLogger(console, Tracker(), run_dir.log, classes)
        trainer = Trainer(run, run_dir, state, logger, StopRequest(()))
        if state.steps_done < stop:
            trainer.fit()
    return trainer


def losses_of_step(run_dir: Path, config: Config, step: int) -> tuple[np.ndarray, float, float | None]:
    """Train a run from its last checkpoint before ``step`` up to it; print what is trained to stderr.

    Return the loss of each image of the step, float32 (B,), in the order of positions, the loss of the step, as
    training computes it (the mean in float32 within a micro-batch, then in float64), and that of the log, None if it
    has none. All ranks take part.
    """
    console, logits = Console(enabled=is_first(), stream=sys.stderr), list[Tensor]()
    with opened(config, console) as run:
        # Without evaluations of val.
        run = dataclasses.replace(run, readers={"train": run.readers["train"]})
        kept = run.world.run_on_main(lambda: list(complete(run_dir, console.warn)))
        start = next((checkpoint for checkpoint in kept if checkpoint.step <= step), None)
        first, place = (start.step, start.path.name) if start else (0, "the initial weights")
        seconds = kept[0].scalars.history.train_seconds / kept[0].step * (step - first) if kept else 0.0
        took = f"; the run took {duration(seconds)}" if seconds else ""
        console.line(f"training from step {first} to step {step} again ({place}){took}")
        trainer = train_again(run, start, step, console)
        model, schedule, smoothing = trainer.state.train_model.train(), run.schedule, config.optim.label_smoothing
        model.register_forward_hook(lambda _model, _images, output: logits.append(output.detach()))
        (micro_batches,) = run.batches(step, step + 1)
        losses, _ = trainer.train_step(micro_batches, schedule.image_size(step), schedule.learning_rate(step))
        labels = torch.cat([batch.labels for batch in micro_batches])
        own = nn.functional.cross_entropy(
            torch.cat(logits).float(), labels, reduction="none", label_smoothing=smoothing
        )
        trainer.window.add(step, losses)
        trainer.window.fetch()
        of_images = np.concatenate(run.world.gather_objects(run.world.fetch(own).numpy()))
    return of_images, trainer.window.losses[-1], step_losses(read_log(run_dir / LOG_NAME)).get(step)
