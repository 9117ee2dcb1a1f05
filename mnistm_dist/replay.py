"""Train steps of a run again, in a temporary folder, by the code that trained them.

1. `opened`: the configuration and the data of the run; nothing is written to its folder.
2. `train_again`: from a checkpoint, or from the initial weights, up to a step.
3. `compare`: what came out, with the checkpoints and the log of the run.
4. `image_losses`: the loss of each image of the next step.

On one kind of machine, on as many processes and threads, the bits agree. Elsewhere rounding differs, and training
amplifies it: mean losses are compared to `LOSS_BOUND`.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mnistm_dist.config import Config, replace
from mnistm_dist.errors import UserError
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.run_logger import RunLogger
from mnistm_dist.reporting.tracking import Tracker
from mnistm_dist.results import evaluate_checkpoint, read_summary
from mnistm_dist.training import distributed
from mnistm_dist.training.checkpoint import MODEL, TRAINING, Checkpoint, checkpoint_dirs
from mnistm_dist.training.environment import DECIDES_BITS, describe_environment
from mnistm_dist.training.hardware import native_or_fp32
from mnistm_dist.training.log_window import NonFiniteLoss
from mnistm_dist.training.preemption import StopRequest, exit_promptly
from mnistm_dist.training.resume import restore_state
from mnistm_dist.training.run_dir import LOG_NAME, RunDir, launches, read_log, step_losses
from mnistm_dist.training.setup import RunSetup, open_run
from mnistm_dist.training.step import train_step
from mnistm_dist.training.train_state import create_train_state
from mnistm_dist.training.trainer import Trainer

# On another kind of machine, the largest relative difference of a mean loss.
LOSS_BOUND = 0.05
# What a row of the log has of its own step.
OF_ONE_STEP = ("train/gradient_norm", "train/learning_rate", "val/loss", "val/accuracy")


@contextmanager
def opened(config: Config, console: Console) -> Iterator[RunSetup]:
    """Join the other processes and open the data of a run for the block, with a temporary folder as its run folder.

    All ranks take part.
    """
    exit_promptly()
    machine, timeout = native_or_fp32(config.machine), config.run.collective_timeout
    with (
        distributed.joined(machine, expect_world_size=None, collective_timeout=timeout) as world,
        console.library_warnings(),
        distributed.peer_failures(timeout),
        TemporaryDirectory() as folder,
    ):
        here = {"run_dir": folder, "resume": None, "precision": world.precision}
        quiet = {
            "log_every": 1,
            "keep_checkpoints": "all",
            "checkpoint_minutes": 0,
            "profile_steps": 0,
            "report": False,
        }
        yield open_run(replace(config, **here, **quiet), world, console)


def train_again(run: RunSetup, start: Checkpoint | None, stop: int, console: Console) -> Trainer:
    """Train from a checkpoint, or from the initial weights, until ``stop`` steps are done. All ranks take part."""
    run = dataclasses.replace(run, config=replace(run.config, max_steps=stop or None))
    world, classes = run.world, run.shards.manifest.classes
    state = create_train_state(run.config, world, len(classes), run.shares)
    if start is not None:
        world.run_on_all_ranks(lambda: restore_state(state, start, run))
    with world.run_on_all_ranks(lambda: RunDir(run.path, active=world.is_main)) as run_dir:
        logger = RunLogger(console, Tracker(), run_dir.log, classes)
        trainer = Trainer(run, run_dir, state, run.schedule, logger, StopRequest(()))
        if state.steps_done < stop:
            trainer.fit()
    return trainer


def choose_stretch(steps: list[int], which: str, seed: int) -> tuple[int, int]:
    """Return the first step to train again, and how many are done in the end.

    Raise `UserError` for steps without a checkpoint.

    Args:
        steps: 0, for the initial weights, and those of the complete checkpoints.
        which: last, or random (by ``seed``): between two neighbours; or one or two of the steps, such as 64:128.
    """
    stretches = list(pairwise(steps))
    if which == "last":
        return stretches[-1]
    if which == "random":
        return random.Random(seed).choice(stretches)
    named = [int(step) for step in which.split(":")]
    before = max((step for step in steps if step < named[-1]), default=0)
    first, stop = named if len(named) == 2 else (before, *named)
    if first >= stop or not {first, stop} <= set(steps):
        raise UserError(
            f"--replay {which}: no complete checkpoints of these steps; there are {', '.join(map(str, steps))}"
        )
    return first, stop


def why_inexact(run: RunSetup, run_dir: Path, start: int, stop: Checkpoint) -> str:
    """Return why bits may differ here from those of the run: what differs; an empty text if nothing does."""
    rows = read_log(run_dir / LOG_NAME)
    config, here, learning = run.config, describe_environment(run.world, []), stop.scalars.learning
    before = [row for row in launches(rows) if row["step"] <= start][-1:]
    during = [row for row in launches(rows) if start < row["step"] < stop.step]
    names = [name for name in DECIDES_BITS if name != "world_size" or not config.machine.reproducible]
    facts = [(name, row.get(name), here[name]) for row in (*before, *during) for name in names]
    facts.append(("precision", learning.get("precision"), config.machine.precision))
    facts.append(("micro_batch", learning.get("micro_batch"), config.steps.micro_batch))
    return "; ".join(dict.fromkeys(f"{name} was {was}, here {now}" for name, was, now in facts if was != now))


def compare(run_dir: Path, trainer: Trainer, start: int, stop: Checkpoint, *, exact: bool) -> list[str]:
    """Return a line for each thing that came out otherwise than in the run. Rank 0 only."""
    pending = stop.scalars.history.pending
    logged = _facts(read_log(run_dir / LOG_NAME))
    logged |= {("loss", stop.step - len(pending) + i): loss for i, loss in enumerate(pending)}
    again = _facts(read_log(trainer.run.path / LOG_NAME))
    losses = [key for key in again if key[0] == "loss"]
    findings = [f"{LOG_NAME}: no loss of step {step}" for _, step in losses if ("loss", step) not in logged][:1]
    if not exact:
        was, now = (np.mean([facts[key] for key in losses if key in logged]) for facts in (logged, again))
        return findings + [f"{LOG_NAME}: mean loss {was:.5f}, trained again {now:.5f}"] * bool(
            abs(now - was) > LOSS_BOUND * was
        )
    findings += [
        f"{LOG_NAME}: {name} of step {step} is {logged[name, step]!r}, trained again it is {value!r}"
        for (name, step), value in again.items()
        if logged.get((name, step), value) != value
    ]
    return findings + [
        f"{folder.name}: {name} has other bytes than training from step {start} gives"
        for folder in checkpoint_dirs(trainer.run.path)
        for name in (MODEL, TRAINING)
        if (kept := run_dir / "checkpoints" / folder.name / name).exists()
        and kept.read_bytes() != (folder / name).read_bytes()
    ]


def compare_results(
    run_dir: Path, run: RunSetup, kept: Mapping[int, Checkpoint | None], console: Console, *, exact: bool
) -> list[str]:
    """Evaluate the checkpoint of the summary again; return a line for each split that comes out otherwise.

    ``kept``: the complete checkpoints, by step. All ranks take part.
    """
    summary = run.world.run_on_main(lambda: read_summary(run_dir))
    checkpoint = kept.get(summary.get("checkpoint", {}).get("step", 0))
    if checkpoint is None:
        return []
    findings = []
    for split, predictions in evaluate_checkpoint(run, checkpoint, console).items():
        path, was, now = run_dir / f"predictions_{split}.csv", summary.get(split, {}), predictions.metrics.log_loss
        if exact and path.is_file() and path.read_bytes() != (run.path / path.name).read_bytes():
            findings.append(f"{path.name}: has other bytes than evaluating {checkpoint.path.name} gives")
        elif abs(now - was.get("log_loss", now)) > LOSS_BOUND * now:
            findings.append(f"{path.name}: log loss {was['log_loss']:.5f}, evaluated again {now:.5f}")
    return run.world.broadcast_object(findings)


def image_losses(trainer: Trainer) -> tuple[np.ndarray, float] | None:
    """Train the next step; return the loss of each image, float32 (B,), in the order of positions, and of the step.

    The latter is the mean as training computes it: in float32 within a micro-batch, then in float64. On rank 0; None
    elsewhere. All ranks take part.
    """
    world, state, config, logits = trainer.world, trainer.state, trainer.config, list[Tensor]()
    step, smoothing = state.steps_done, config.optim.label_smoothing
    state.train_model.train()
    state.train_model.register_forward_hook(lambda _model, _images, output: logits.append(output.detach()))
    (micro_batches,) = trainer.run.batches(step, step + 1)
    losses, _ = train_step(world, state, trainer.augment, micro_batches, trainer.schedule.image_size(step), config)
    labels = torch.cat([batch.labels for batch in micro_batches])
    own = functional.cross_entropy(torch.cat(logits).float(), labels, reduction="none", label_smoothing=smoothing)
    gathered = world.gather_on_main(world.fetch(own).numpy())
    trainer.window.add(step, losses)
    try:
        trainer.window.fetch()
    except NonFiniteLoss:
        trainer.window.losses.append(float("nan"))
    return None if gathered is None else (np.concatenate(gathered), trainer.window.losses[-1])


def _facts(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the losses of a log by step, from 0, and its other values by the steps that were done."""
    losses = {("loss", step): loss for step, loss in step_losses(rows).items()}
    return losses | {(name, row["step"]): row[name] for row in rows for name in OF_ONE_STEP if name in row}
