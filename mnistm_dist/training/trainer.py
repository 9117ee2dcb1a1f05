"""The training loop, and what it tells on its way.

At every step boundary the ranks agree whether to go on, to save, or to save and leave: a signal to any of them, or
rank 0's clock, decides for all. Saving, logging and evaluating change nothing of what is learnt (an
evaluation gives all ranks the BatchNorm statistics of rank 0, the only ones that are kept).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from mnistm_dist import config as configuration
from mnistm_dist.config import Config
from mnistm_dist.data.loader import Batch, Reader, train_batches
from mnistm_dist.data.order import accumulation, epoch_ends, epochs_done, part_of_run, step_positions, steps_for
from mnistm_dist.data.order_choice import create_order
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.transforms import Augment, Preprocess
from mnistm_dist.errors import EXIT_PREEMPTED, UserError
from mnistm_dist.reporting.console import Bar, Console
from mnistm_dist.reporting.metrics import measure
from mnistm_dist.reporting.tracking import open_tracker
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Checkpoint, TrainingHistory, check_state
from mnistm_dist.training.diagnostics import check_model_learns, traced
from mnistm_dist.training.distributed import StopConsensus, World, prepare
from mnistm_dist.training.environment import describe_environment, device_name
from mnistm_dist.training.evaluation import predict_split
from mnistm_dist.training.models import architecture, count_parameters, create_model, to_device
from mnistm_dist.training.optim import WeightAverage, create_optimizer, learning_rate
from mnistm_dist.training.preemption import StopRequest
from mnistm_dist.training.run_dir import RunDir
from mnistm_dist.training.step import LossWindow, NonFiniteLoss, gradient_norm, train_step
from mnistm_dist.training.throughput import Throughput

CONTINUE, SAVE, EXIT = 0, 1, 2
"""What a rank asks for at a step boundary; the largest value wins."""


class Preempted(Exception):
    """The run was asked to stop, has saved and leaves."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Trainer:
    """A run in memory: model, optimizer, data and how far it is."""

    def __init__(
        self,
        config: Config,
        world: World,
        console: Console,
        folder: RunDir,
        shards: ShardSet,
        readers: dict[str, Reader],
        stop: StopRequest,
    ) -> None:
        """Builds the model with its initial weights; ``config`` holds no ``auto``. All ranks take part."""
        self.config, self.world, self.console, self.folder, self.stop = config, world, console, folder, stop
        self.shards, self.readers = shards, readers
        schedule = config.steps
        self.manifest = shards.manifest
        split = self.manifest.splits["train"]
        self.order = create_order(config.data, schedule, self.manifest)
        self.size = split.count
        self.total_steps = steps_for(schedule.epochs, size=split.count, batch_size=schedule.batch_size)
        self.last_step = min(self.total_steps, config.run.max_steps or self.total_steps)
        self.preprocess = Preprocess(split.mean, split.std, world.device)
        self.augment = Augment(config.augment, self.preprocess, schedule.seed)
        model = create_model(len(self.manifest.classes), schedule.seed)
        if config.machine.sync_batchnorm:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Before the wrapping: DDP lays its buckets out by the strides that it finds.
        self.model = to_device(model, world.device, config.machine.memory_format)
        self.wrapped, self.optimizer = prepare(
            world, self.model, create_optimizer(self.model, config.optim), config.machine
        )
        self.average = WeightAverage(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.past = TrainingHistory()
        self.steps_done = 0
        self.window, self.train_loss = LossWindow(world), float("nan")
        self.norm_before_clipping: torch.Tensor | None = None
        self.pace = Throughput(0)

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model to evaluate and to keep: the averaged one where the recipe averages."""
        return self.average.model if self.average else self.model

    def epoch(self, step: int) -> int:
        """The epoch of the step's first position."""
        return step * self.config.steps.batch_size // self.size

    def image_size(self, epoch: int) -> int:
        """The training size of an epoch, pixels: the run's sizes in equal parts."""
        sizes = self.config.steps.image_size
        return sizes[part_of_run(epoch, epochs=self.config.steps.epochs, parts=len(sizes))]

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Takes up the checkpoint, if any, and writes what a run folder holds from the start. All ranks take part."""
        if checkpoint is not None:
            self.world.run_on_all_ranks(lambda: self.restore(checkpoint))
        self.world.run_on_all_ranks(lambda: self.open_folder("start" if checkpoint is None else "resume"))
        self.tracker = open_tracker(
            self.config.run.tracker if self.world.is_main else "none",
            run_dir=self.folder.path,
            config=asdict(self.config),
            name=self.folder.path.name,
            group=self.folder.path.name,
            say=self.console.line,
        )
        self.console.header("mnistm_dist", header_rows(self))

    def open_folder(self, kind: str) -> None:
        """Writes what a run folder holds from the start. Rank 0 writes."""
        self.folder.cut_log(self.steps_done)
        if not self.world.is_main:
            return
        checkpoints.discard_after(self.folder.path, self.steps_done)
        self.folder.write("config.yaml", configuration.dump(self.config))
        self.folder.write_json("environment.json", describe_environment(self.world))
        self.folder.write_json("architecture.json", architecture(self.model, max(self.config.steps.image_size)))
        self.folder.tell("running")
        self.folder.log({"kind": kind, "step": self.steps_done, "world_size": self.world.size})

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Tells the tracker how the run ended: W&B would take a crash for a run that finished."""
        try:
            yield
        except Preempted:
            self.tracker.finish(EXIT_PREEMPTED, "preempted")
            raise
        except BaseException:
            self.tracker.finish(1, "failed")
            raise
        self.tracker.finish(0, "finished")

    def check(self) -> None:
        """The debug recipe's checks of the first loss and of learning by heart."""
        positions = step_positions(0, batch_size=min(32, self.size))
        images, labels = self.readers["train"].gather(self.order.ids(positions))
        size = self.image_size(0)
        classes = len(self.manifest.classes)
        first, last = check_model_learns(self.model, self.preprocess(images, size), labels, classes)
        self.console.line(f"checks: first loss {first:.3f}; one batch learnt by heart, loss {last:.4f}")

    def restore(self, checkpoint: Checkpoint) -> None:
        """The state of a checkpoint."""
        check_state(checkpoint)
        identity = checkpoint.state.get("shards")
        if identity != self.manifest.identity:
            raise UserError(
                f"shards {self.shards.root}: another set than the run began with; "
                "name the one of its config.yaml with --shards"
            )
        averaged = self.average.model if self.average else None
        checkpoints.restore(checkpoint, model=self.model, averaged=averaged, optimizer=self.optimizer)
        if self.world.accelerator.scaler is not None:
            self.world.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.past = TrainingHistory(**checkpoint.state["past"])
        if self.past.best and not checkpoints.checkpoint_dir(self.folder.path, self.past.best["step"]).is_dir():
            # Pruned for a better one, which was damaged or lies beyond the step that this resume begins at.
            self.past.best = None
        self.steps_done = checkpoint.step
        self.window, self.pace = LossWindow(self.world, self.past.pending), Throughput(checkpoint.step)
        before = checkpoint.state["micro_batch"]
        if before != self.config.steps.micro_batch:
            self.console.warn(
                f"micro_batch: {before} until now, {self.config.steps.micro_batch} from here on; "
                "BatchNorm's statistics are over another number of images"
            )
        if checkpoint.state["threads"] != self.config.machine.threads:
            self.console.warn(
                f"threads: {checkpoint.state['threads']} until now, {self.config.machine.threads} from here on; "
                "the numbers may differ in their last bits"
            )

    def train(self) -> None:
        """Every step that is left. All ranks take part. Raises `Preempted` after a signal, on all ranks alike."""
        run = self.config.run
        agreement, saved_at = StopConsensus(self.world.control), time.monotonic()
        profile_folder = self.folder.path / "profile" if self.world.is_main else None
        tracing = traced(profile_folder, steps=run.profile_steps, first_step=self.steps_done)
        self.wrapped.train()
        with self.console.training(self.last_step, self.steps_done) as bar, tracing as step_traced:
            self.pace.go()
            for step, micro_batches in enumerate(self.batches(), start=self.steps_done):
                self.train_on(step, micro_batches)
                ends_epoch = epoch_ends(step, size=self.size, batch_size=self.config.steps.batch_size)
                ends_run = self.steps_done == self.last_step
                if self.steps_done % run.log_every == 0 or ends_epoch or ends_run:
                    self.write_row(step, bar)
                step_traced()
                self.past.train_seconds += self.pace.stop()
                evaluates = ends_run or (ends_epoch and self.epochs_done % run.evaluate_every == 0)
                if evaluates:
                    began = time.monotonic()
                    self.evaluate(step)
                    evaluated_in = time.monotonic() - began
                    self.past.evaluate_seconds += evaluated_in
                    bar.leave_out(evaluated_in)
                own_action = self.action(saved_at)
                if own_action == SAVE:
                    # The answer comes with the next step, which must not ask for a second save.
                    saved_at = time.monotonic()
                action = agreement.step(own_action)
                due = run.checkpoint_every and self.steps_done % run.checkpoint_every == 0
                if evaluates or ends_epoch or due or action != CONTINUE:
                    began = time.monotonic()
                    self.save()
                    saved_at = time.monotonic()
                    self.past.save_seconds += saved_at - began
                    bar.leave_out(saved_at - began)
                if action == EXIT and not ends_run:
                    reason = next(filter(None, self.world.gather_objects(self.stop.reason)), "a signal")
                    self.folder.log({"kind": "preempted", "step": self.steps_done, "world_size": self.world.size})
                    # Told before the tracker ends, which may wait for a server.
                    self.folder.tell("preempted", reason)
                    raise Preempted(reason)
                self.pace.go()

    def batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step that is left."""
        return train_batches(
            self.readers["train"],
            self.order,
            start_step=self.steps_done,
            stop_step=self.last_step,
            batch_size=self.config.steps.batch_size,
            micro_batch=int(self.config.steps.micro_batch),
            world_size=self.world.size,
            rank=self.world.rank,
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(
            self.config.optim,
            step=step,
            total_steps=self.total_steps,
            batch_size=self.config.steps.batch_size,
            epoch=self.epoch(step),
        )

    def train_on(self, step: int, micro_batches: list[Batch]) -> None:
        """One step. All ranks take part."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, self.norm_before_clipping = train_step(
            self.world,
            self.wrapped,
            self.optimizer,
            self.augment,
            micro_batches,
            image_size=self.image_size(self.epoch(step)),
            label_smoothing=self.config.optim.label_smoothing,
            clip_norm=self.config.optim.max_grad_norm,
        )
        if self.average:
            self.average.update(self.model, step)
        self.window.add(step, losses)
        self.steps_done = self.folder.steps_done = step + 1

    def write_row(self, step: int, bar: Bar) -> None:
        """A row of the log, of the steps since the last one. All ranks take part, since the losses are all ranks'."""
        # It waits for the device, so that the seconds are those of the steps.
        self.fetch_losses()
        steps, seconds = self.pace.lap(step)
        epoch, rate = self.epoch(step), self.learning_rate(step)
        speed, image_size = steps * self.config.steps.batch_size / seconds, self.image_size(epoch)
        self.train_loss = self.window.take()
        norm = gradient_norm(self.model) if self.norm_before_clipping is None else float(self.norm_before_clipping)
        row: dict[str, Any] = {
            "train/loss": self.train_loss,
            "train/learning_rate": rate,
            "train/images_per_second": speed,
            # None: it overflowed fp16, and the step was left out.
            "train/gradient_norm": norm if math.isfinite(norm) else None,
            "train/image_size": image_size,
        }
        self.folder.log({"kind": "train", "step": self.steps_done, "epoch": epoch, **row})
        self.tracker.log({name: value for name, value in row.items() if value is not None}, step=self.steps_done)
        bar.update(
            self.steps_done,
            epoch=epoch,
            loss=self.train_loss,
            lr=rate,
            images_per_second=speed,
            image_size=image_size,
        )

    @property
    def epochs_done(self) -> int:
        """Whole epochs trained."""
        return epochs_done(self.steps_done, size=self.size, batch_size=self.config.steps.batch_size)

    def action(self, saved_at: float) -> int:
        """What this rank candidates: to leave after a signal, to save when rank 0's clock says so."""
        if self.stop.reason is not None:
            return EXIT
        minutes = self.config.run.checkpoint_minutes
        return SAVE if self.world.is_main and minutes and time.monotonic() - saved_at > 60 * minutes else CONTINUE

    def fetch_losses(self) -> None:
        """Reads the losses that wait on the device. All ranks take part; one that is no number ends the run on all."""
        try:
            self.window.fetch()
        except NonFiniteLoss as error:
            raise self.explain(error) from error

    def explain(self, error: NonFiniteLoss) -> UserError:
        """A loss that is no number, with the images of its step and the last good checkpoint."""
        positions = step_positions(error.step, batch_size=self.config.steps.batch_size)
        keys = self.shards.keys("train", self.order.ids(positions))
        good = checkpoints.latest(self.folder.path, self.console.line) if self.world.is_main else None
        kept = self.world.broadcast_object(str(good.path) if good else "none")
        return UserError(
            f"{error}; keys of its batch: {' '.join(keys[:16])}{' ...' if len(keys) > 16 else ''} "
            f"(python -m mnistm_dist.plan --run {self.folder.path} --step {error.step} shows all); "
            f"last good checkpoint: {kept}; a resume repeats it: start a new run with a smaller --learning-rate or "
            "--precision fp32"
        )

    def evaluate(self, step: int) -> None:
        """Scores val at the size of the step's epoch; rank 0 notes whether it is the best. All ranks take part."""
        split = self.manifest.splits.get("val")
        if split is None:
            return
        epoch = self.epoch(step)
        image_size = self.image_size(epoch)
        with self.console.progress("evaluating val", split.count) as bar:
            predictions = predict_split(
                self.world,
                self.evaluated,
                self.preprocess,
                self.readers["val"],
                image_size=image_size,
                progress=bar,
            )
        if predictions is None:
            return
        metrics = measure(predictions.labels, predictions.probabilities, self.manifest.classes, predictions.predicted)
        best = self.past.best is None or metrics.accuracy > self.past.best["accuracy"]
        if best:
            self.past.best = {"step": self.steps_done, "accuracy": metrics.accuracy, "image_size": image_size}
        scores = {"val/loss": metrics.log_loss, "val/accuracy": metrics.accuracy}
        row = {"step": self.steps_done, "epoch": epoch, "split": "val", **scores, "image_size": image_size}
        self.folder.log({"kind": "evaluation", **row})
        self.tracker.log(scores, step=self.steps_done)
        full_size = max(self.config.steps.image_size)
        self.console.evaluation({**row, "train/loss": self.train_loss, "full_image_size": full_size, "best": best})

    def save(self) -> None:
        """Writes a checkpoint, then prunes old ones. All ranks take part; rank 0 writes."""
        # A state that was stepped with a loss that is no number is never saved.
        self.fetch_losses()
        self.past.pending = list(self.window.read)
        self.world.run_on_main(self._write)

    def _write(self) -> None:
        scaler = self.world.accelerator.scaler
        checkpoints.save(
            self.folder.path,
            step=self.steps_done,
            model=self.model,
            averaged=self.average.model if self.average else None,
            optimizer=self.optimizer,
            scalars={
                "past": asdict(self.past),
                "shards": self.manifest.identity,
                "micro_batch": self.config.steps.micro_batch,
                "threads": self.config.machine.threads,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "averaged": self.average is not None,
                "image_size": self.image_size(self.epoch(self.steps_done - 1)),
                "mean": self.manifest.splits["train"].mean,
                "std": self.manifest.splits["train"].std,
            },
        )
        best = checkpoints.checkpoint_dir(self.folder.path, self.past.best["step"]).name if self.past.best else None
        checkpoints.prune(self.folder.path, keep=self.config.run.keep_checkpoints, best=best)


def header_rows(trainer: Trainer) -> dict[str, str]:
    """What a run says of itself before it begins."""
    config, manifest = trainer.config, trainer.manifest
    k = accumulation(
        batch_size=config.steps.batch_size,
        world_size=trainer.world.size,
        micro_batch=int(config.steps.micro_batch),
    )
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    steps = f"{trainer.total_steps:,} of {config.steps.epochs} epochs"
    if trainer.last_step < trainer.total_steps:
        steps = f"{trainer.last_step:,} of {steps}"
    if trainer.steps_done:
        steps += f", going on after {trainer.steps_done:,}"
    return {
        "run": str(trainer.folder.path),
        "recipe": config.recipe,
        "world size": str(trainer.world.size),
        "device": device_name(trainer.world.device),
        "precision": f"{config.machine.precision}, {config.machine.memory_format}",
        "threads": f"{config.machine.threads} per process",
        "model": f"pruned ResNet18, {count_parameters(trainer.model):,} parameters",
        "shards": f"{trainer.shards.root} ({manifest.lineage}: {counts})",
        "reading": f"{config.data.reader}, order {config.data.order}",
        "batch": f"{config.steps.batch_size} = {trainer.world.size} x {k} x {config.steps.micro_batch}"
        " (processes x micro-batches x images)",
        "image size": ", ".join(f"{size} px" for size in dict.fromkeys(config.steps.image_size)),
        "steps": steps,
    }


def summary_fields(trainer: Trainer) -> dict[str, Any]:
    """What ``summary.json`` says of the training; the splits' numbers come beside it."""
    config, images = trainer.config, trainer.steps_done * trainer.config.steps.batch_size
    counts = {name: split.count for name, split in trainer.manifest.splits.items()}
    return {
        "recipe": config.recipe,
        "world_size": trainer.world.size,
        "micro_batch": config.steps.micro_batch,
        "batch_size": config.steps.batch_size,
        "precision": config.machine.precision,
        "threads": config.machine.threads,
        "device": trainer.world.device.type,
        "seed": config.steps.seed,
        "steps": trainer.steps_done,
        "epochs": round(images / trainer.size, 4),
        "train_seconds": round(trainer.past.train_seconds, 3),
        "evaluate_seconds": round(trainer.past.evaluate_seconds, 3),
        "save_seconds": round(trainer.past.save_seconds, 3),
        "images_per_second": round(images / trainer.past.train_seconds, 2) if trainer.past.train_seconds else None,
        "parameters": count_parameters(trainer.model),
        "data": {
            "path": str(trainer.shards.root),
            "lineage": trainer.manifest.lineage,
            "identity": trainer.manifest.identity,
            "counts": counts,
            "pixels_sha256": trainer.manifest.pixels_sha256,
        },
    }
