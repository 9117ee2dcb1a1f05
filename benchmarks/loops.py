"""The loops that ``bench step`` and ``bench ranks`` compare, each driven a few steps at a time.

`PlainScript` is the source report's training as one would first write it; `BareLoop` is the trainer's work and
nothing around it; `TrainerInRounds` is the trainer itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.clock import Gaps, Stopwatch
from benchmarks.rounds import ENDLESS, Measured
from mnistm_dist.config import Config
from mnistm_dist.data.loader import Batch, train_batches
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import create_order
from mnistm_dist.data.resident import Resident
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.transforms import Augment, Preprocess
from mnistm_dist.reporting.console import Console
from mnistm_dist.training.distributed import World
from mnistm_dist.training.hardware import Precision
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import create_optimizer
from mnistm_dist.training.preemption import StopRequest
from mnistm_dist.training.run_dir import RunDir
from mnistm_dist.training.trainer import Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loop(Protocol):
    """A training that goes on a few steps at a time."""

    def steps(self, count: int) -> Measured:
        """Trains ``count`` steps."""


class PlainScript:
    """The report's recipe as a script of some 20 lines has it: NCHW, float32, Adam, images in memory."""

    def __init__(self, manifest: Manifest, data: Resident, *, batch_size: int, image_size: int) -> None:
        """``image_size``: what the model sees, pixels; 64 in the report."""
        self.data, self.batch_size, self.device = data, batch_size, data.labels.device
        self.size, split = (image_size, image_size), manifest.splits["train"]
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (split.mean, split.std)
        )
        self.model = create_model(len(manifest.classes), seed=0).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=5e-4)
        self.generator = torch.Generator().manual_seed(0)

    def steps(self, count: int) -> Measured:
        """Trains ``count`` steps."""
        watch = Stopwatch(self.device)
        for _ in range(count):
            ids = torch.randint(self.data.size, (self.batch_size,), generator=self.generator).to(self.device)
            images = self.data.images[ids].permute(0, 3, 1, 2).contiguous().float() / 255
            images = functional.interpolate(images, self.size, mode="bilinear", align_corners=False)
            loss = functional.cross_entropy(self.model((images - self.mean) / self.std), self.data.labels[ids])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return Measured(images=count * self.batch_size, seconds=watch.stop())


class BareLoop:
    """The trainer's work without the trainer: its batches, augmentation, model, loss and optimizer, one process.

    ``prepared``: one batch, read and augmented once, again and again: what the data costs is the difference.
    """

    def __init__(
        self,
        config: Config,
        shards: ShardSet,
        data: Resident,
        *,
        channels_last: bool,
        precision: Precision,
        compiled: bool = False,
        prepared: bool = False,
    ) -> None:
        """``config`` holds no ``auto``."""
        schedule, split = config.steps, shards.manifest.splits["train"]
        self.device, self.config, self.precision = data.labels.device, config, precision
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = create_model(len(shards.manifest.classes), schedule.seed)
        model = model.to(self.device).to(memory_format=layout).train()
        self.optimizer = create_optimizer(model, config.optim)
        self.model: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        self.layout = layout
        self.augment = Augment(config.augment, Preprocess(split.mean, split.std, self.device), schedule.seed)
        batches = train_batches(
            data,
            create_order(config.data, schedule, shards.manifest),
            batch_size=schedule.batch_size,
            micro_batch=schedule.batch_size,
            stop_step=ENDLESS,
        )
        self.inputs = self._again_and_again(next(batches)[0]) if prepared else self._read(batches)
        self.gaps = Gaps(self.device)

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = self.augment(batch.images, batch.positions, self.config.steps.image_size[0])
        # The augmentation gives what the trainer's layout wants; for the other one it has to be laid out anew.
        return images.contiguous(memory_format=self.layout), batch.labels

    def _read(self, batches: Iterator[list[Batch]]) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in batches:
            # The data is there: from here on the GPU has work.
            self.gaps.begin_step()
            yield self._prepare(batch)

    def _again_and_again(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        inputs = self._prepare(batch)
        while True:
            self.gaps.begin_step()
            yield inputs

    def steps(self, count: int) -> Measured:
        """Trains ``count`` steps."""
        self.gaps = Gaps(self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        watch = Stopwatch(self.device)
        for _ in range(count):
            images, labels = next(self.inputs)
            with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
                logits = self.model(images)
            smoothing = self.config.optim.label_smoothing
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.gaps.end_step()
        seconds, more = watch.stop(), {}
        if on_gpu:
            more = {"gpu_waits_share": self.gaps.seconds() / seconds, **gpu_memory(self.device)}
        return Measured(images=count * self.config.steps.batch_size, seconds=seconds, more=more)


class TrainerInRounds:
    """The trainer of `mnistm_dist.train`, stopped after some steps and sent on again, by the training split alone.

    Its seconds are those that it counts itself: steps, log and progress, without evaluation and saving.
    """

    def __init__(self, config: Config, world: World, shards: ShardSet, data: Resident, run_dir: Path) -> None:
        """``config`` holds no ``auto``. All ranks take part."""
        train_alone = dataclasses.replace(shards.manifest, splits={"train": shards.manifest.splits["train"]})
        self.folder = RunDir(run_dir, active=world.is_main)
        self.trainer = Trainer(
            config,
            world,
            Console(enabled=False),
            self.folder,
            ShardSet(root=shards.root, manifest=train_alone),
            {"train": data},
            StopRequest(),
        )
        self.trainer.begin(None)

    def __enter__(self) -> TrainerInRounds:
        return self

    def __exit__(self, *error: Any) -> None:
        self.trainer.tracker.finish(0, "finished")
        self.folder.__exit__(*error)

    def steps(self, count: int) -> Measured:
        """Trains ``count`` steps. All ranks take part."""
        trainer, device = self.trainer, self.trainer.world.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = trainer.past.train_seconds
        trainer.last_step = trainer.steps_done + count
        trainer.train()
        more = gpu_memory(device) if device.type == "cuda" else {}
        images = count * trainer.config.steps.batch_size
        return Measured(images=images, seconds=trainer.past.train_seconds - before, more=more)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most that torch held on the GPU since its count was reset."""
    return {"gpu_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6}
