"""The summary of a run: its header before the first step, and its part of ``summary.json`` at the end."""

from __future__ import annotations

from typing import Any

from mnistm_dist.data.order import accumulation
from mnistm_dist.training.environment import device_name
from mnistm_dist.training.models import count_parameters
from mnistm_dist.training.schedule import Schedule
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.train_state import TrainState


def header_rows(run: RunSetup, state: TrainState, schedule: Schedule) -> dict[str, str]:
    """Return the rows of the header that the console shows before training."""
    config, world, manifest = run.config, run.world, run.shards.manifest
    micro_batch = int(config.steps.micro_batch)
    k = accumulation(batch_size=config.steps.batch_size, world_size=world.size, micro_batch=micro_batch)
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    steps = f"{schedule.total_steps:,} steps, {config.steps.epochs} epochs"
    if schedule.last_step < schedule.total_steps:
        steps = f"{schedule.last_step:,} of {steps}"
    if state.steps_done:
        steps = f"resuming at step {state.steps_done:,} of {steps}"
    return {
        "run": str(run.path),
        "recipe": config.recipe,
        "world size": str(world.size),
        "device": device_name(world.device),
        "precision": f"{config.machine.precision}, {config.machine.memory_format}",
        "threads": f"{config.machine.threads} per process",
        "model": f"pruned ResNet18, {count_parameters(state.model):,} parameters",
        "shards": f"{run.shards.root} ({manifest.lineage}: {counts})",
        "data": f"{config.data.reader} reader, {config.data.order} order",
        "batch": f"{config.steps.batch_size} = {world.size} x {k} x {micro_batch} (processes x micro-batches x images)",
        "image size": ", ".join(f"{size} px" for size in dict.fromkeys(config.steps.image_size)),
        "training": steps,
    }


def summary_fields(run: RunSetup, state: TrainState) -> dict[str, Any]:
    """Return the fields of ``summary.json`` that describe the training; those of the splits are added to them."""
    config, manifest = run.config, run.shards.manifest
    history = state.history
    images, seconds = state.steps_done * config.steps.batch_size, history.train_seconds
    return {
        "recipe": config.recipe,
        "world_size": run.world.size,
        "micro_batch": config.steps.micro_batch,
        "batch_size": config.steps.batch_size,
        "precision": config.machine.precision,
        "threads": config.machine.threads,
        "device": run.world.device.type,
        "seed": config.steps.seed,
        "steps": state.steps_done,
        "epochs": round(images / run.shards.split("train").count, 4),
        "train_seconds": round(seconds, 3),
        "evaluate_seconds": round(history.evaluate_seconds, 3),
        "save_seconds": round(history.save_seconds, 3),
        "images_per_second": round(images / seconds, 2) if seconds else None,
        "parameters": count_parameters(state.model),
        "data": {
            "path": str(run.shards.root),
            "lineage": manifest.lineage,
            "identity": manifest.identity,
            "counts": {name: split.count for name, split in manifest.splits.items()},
            "pixels_sha256": manifest.pixels_sha256,
        },
    }
