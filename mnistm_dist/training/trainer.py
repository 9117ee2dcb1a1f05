"""The training loop of a run.

At every step boundary the ranks agree whether to continue, to save, or to save and exit: a signal to any of them, or
the clock of rank 0, decides for all. Saving, logging and evaluating change nothing that is learned. (An evaluation
gives all ranks the BatchNorm statistics of rank 0, the only ones that are kept.)
"""

import math
import shlex
import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from mnistm_dist.data.order import step_positions
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.transforms import create_augment
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.diagnostics import check_model_learns, profile_steps
from mnistm_dist.training.evaluation import predict_split
from mnistm_dist.training.hardware import CoreWatch, peak_memory_gb
from mnistm_dist.training.log_window import LogWindow
from mnistm_dist.training.preemption import CONTINUE, EXIT, Preempted, StepBoundary, StopRequest
from mnistm_dist.training.run_dir import RunDir
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.step import create_step, gradient_norm
from mnistm_dist.training.train_state import BestEvaluation, TrainState


class TrainLogger(Protocol):
    """Where a training reports to; on all ranks but 0 it does nothing."""

    def training(self, last_step: int, steps_done: int) -> AbstractContextManager[None]:
        """Show the progress of the training while the block runs."""

    def train_row(self, row: dict[str, Any]) -> None:
        """Log the steps since the last row."""

    def evaluation_row(self, row: dict[str, Any], labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Log an evaluation."""

    def evaluating(self, split: str, count: int) -> AbstractContextManager[Progress]:
        """Show the progress of an evaluation of ``count`` images while the block runs."""

    def message(self, text: str) -> None:
        """Print a line."""


class Trainer:
    """Trains a run from its first or its resumed step to its last."""

    def __init__(
        self, run: RunSetup, run_dir: RunDir, state: TrainState, logger: TrainLogger, stop: StopRequest
    ) -> None:
        self.run, self.run_dir, self.state, self.logger = run, run_dir, state, logger
        self.config, self.world, self.schedule = run.config, run.world, run.schedule
        augment = create_augment(run.config, run.shards.split("train"), run.world.device)
        self.preprocess = augment.preprocess
        self.train_step = create_step(run.world, state, augment, run.config)
        self.boundary = StepBoundary(run.world, stop, run.config.run.checkpoint_minutes)
        self.window = LogWindow(run.world, run.shares, state.history)
        self.core_watch = CoreWatch()
        self.train_loss = float("nan")
        """Mean loss of the last row of the log."""

    def fit(self) -> None:
        """Train all remaining steps. All ranks take part. Raise `Preempted` after a signal, on all ranks."""
        run, schedule, state = self.config.run, self.schedule, self.state
        profile_dir = self.run_dir.path / "profile" if self.world.is_main else None
        profiler = profile_steps(profile_dir, steps=run.profile_steps, first_step=state.steps_done)
        state.train_model.train()
        with (
            self.logger.training(schedule.last_step, state.steps_done),
            profiler as step_profiled,
            torch.random.fork_rng(),
        ):
            started = time.perf_counter()
            batches = self.run.batches(state.steps_done, schedule.last_step)
            for step, micro_batches in enumerate(batches, start=state.steps_done):
                losses, norm = self.train_step(micro_batches, schedule.image_size(step), schedule.learning_rate(step))
                if state.ema is not None:
                    state.ema.update(state.model, step)
                self.window.add(step, losses)
                state.steps_done = self.run_dir.steps_done = step + 1

                ends_epoch, ends_run = schedule.ends_epoch(step), state.steps_done == schedule.last_step
                if state.steps_done % run.log_every == 0 or ends_epoch or ends_run:
                    # Fetching the losses waits for the device, so the seconds are those of the steps.
                    self.fetch_losses()
                    seconds = state.history.train_seconds + time.perf_counter() - started
                    self.log_training(step, seconds, gradient_norm(state.model) if norm is None else float(norm))
                step_profiled()
                state.history.train_seconds += time.perf_counter() - started

                evaluation_due = ends_epoch and schedule.epoch(state.steps_done) % run.evaluate_every == 0
                if evaluation_due or ends_run:
                    self.evaluate(step)
                action = self.boundary.next_action()
                checkpoint_due = run.checkpoint_every and state.steps_done % run.checkpoint_every == 0
                if checkpoint_due or ends_epoch or ends_run or action != CONTINUE:
                    self.save()
                if action == EXIT and not ends_run:
                    reason = self.boundary.stop_reason()
                    self.run_dir.log({"kind": "preempted", "step": state.steps_done, "world_size": self.world.size})
                    # Before the tracker is closed, which may wait for a server.
                    self.run_dir.set_state("preempted", reason)
                    raise Preempted(reason)
                started = time.perf_counter()

    def log_training(self, step: int, train_seconds: float, norm: float) -> None:
        """Log the steps since the last row; ``norm`` is the gradient's, of ``step``, before clipping."""
        losses = list(self.window.losses)
        self.train_loss, steps_per_second = self.window.close(train_seconds)
        self.logger.train_row(
            {
                "step": self.state.steps_done,
                "epoch": self.schedule.epoch(step) + 1,
                "train/loss": self.train_loss,
                # Of each step since the last row: which one a spike is of, and what a replay must give.
                "losses": losses,
                "train/learning_rate": self.schedule.learning_rate(step),
                "train/images_per_second": steps_per_second * self.config.steps.batch_size,
                # None: the gradient overflowed in fp16, and the scaler skipped the step.
                "train/gradient_norm": norm if math.isfinite(norm) else None,
                "train/image_size": self.schedule.image_size(step),
                "train/peak_memory_gb": peak_memory_gb(self.world.device),
            }
        )
        if warning := self.core_watch.warning():
            self.logger.message(f"warning: {warning}")

    def evaluate(self, step: int) -> None:
        """Evaluate val at the image size of ``step`` and record it if it is the best. All ranks take part."""
        reader = self.run.readers.get("val")
        if reader is None:
            return
        started, image_size, history = time.monotonic(), self.schedule.image_size(step), self.state.history
        with self.logger.evaluating("val", reader.size) as progress:
            outputs = predict_split(
                self.world, self.state.eval_model, self.preprocess, reader, image_size=image_size, progress=progress
            )
        if outputs is not None:
            is_best = history.best is None or outputs.accuracy > history.best.accuracy
            if is_best:
                history.best = BestEvaluation(
                    step=self.state.steps_done, accuracy=outputs.accuracy, image_size=image_size
                )
            row = {
                "step": self.state.steps_done,
                "epoch": self.schedule.epoch(step) + 1,
                "split": "val",
                "image_size": image_size,
                "full_image_size": max(self.config.steps.image_size),
                "train/loss": self.train_loss,
                "best": is_best,
            }
            self.logger.evaluation_row(row, outputs.labels, outputs.probabilities)
        history.evaluate_seconds += time.monotonic() - started

    def save(self) -> None:
        """Write a checkpoint and remove old ones. All ranks take part; rank 0 writes."""
        started = time.monotonic()
        # Parameters that were updated with a non-finite loss are never saved.
        self.fetch_losses()
        self.state.history.pending = list(self.window.losses)
        self.world.run_on_main(self._write_checkpoint)
        self.boundary.checkpoint_saved()
        self.state.history.save_seconds += time.monotonic() - started

    def _write_checkpoint(self) -> None:
        state, manifest, scaler = self.state, self.run.shards.manifest, self.world.accelerator.scaler
        scalars = checkpoints.Scalars(
            history=state.history,
            shards=manifest.identity,
            classes=list(manifest.classes),
            learning=checkpoints.learning_values(self.config, self.world.device),
            scaler=scaler.state_dict() if scaler is not None else None,
            averaged=state.ema is not None,
            image_size=self.schedule.image_size(state.steps_done - 1),
            resize=manifest.resize,
            mean=list(manifest.splits["train"].mean),
            std=list(manifest.splits["train"].std),
        )
        checkpoints.save(self.run_dir.path, state, scalars)
        best_step = state.history.best.step if state.history.best else None
        checkpoints.prune(self.run_dir.path, keep=self.config.run.keep_checkpoints, best_step=best_step)

    def check_model(self) -> None:
        """Run the sanity checks of ``--sanity-checks`` on a few training images."""
        positions = step_positions(0, batch_size=min(32, self.schedule.train_size))
        images, labels = self.run.readers["train"].gather(self.run.order.ids(positions))
        inputs = self.preprocess(images, self.schedule.image_size(0))
        first, last = check_model_learns(self.state.model, inputs, labels, len(self.run.shards.manifest.classes))
        self.logger.message(f"sanity checks: initial loss {first:.3f}; one batch overfitted to loss {last:.4f}")

    def fetch_losses(self) -> None:
        """Fetch the losses on the device. All ranks take part.

        Raise `UserError` on all of them for a loss that is not finite, with the images of its step and the last good
        checkpoint.
        """
        step = self.window.fetch()
        if step is None:
            return
        positions = step_positions(step, batch_size=self.config.steps.batch_size)
        keys = self.run.shards.keys("train", self.run.order.ids(positions))
        good = checkpoints.latest(self.run_dir.path, self.logger.message) if self.world.is_main else None
        last_good = self.world.broadcast_object(str(good.path) if good else "none")
        raise UserError(
            f"the training loss of step {step} is not finite; keys of its batch: {' '.join(keys[:16])}"
            f"{' ...' if len(keys) > 16 else ''} "
            f"(all: python -m mnistm_dist.plan {shlex.quote(str(self.run_dir.path))} --step {step}); "
            f"last good checkpoint: {last_good}; a resume would repeat it: start a new run with a smaller "
            "--learning-rate or --precision fp32"
        )
