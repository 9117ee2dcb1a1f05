"""What a run says of itself: before it begins, on the console, and at its end, in ``summary.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mnistm_dist.data.order import accumulation
from mnistm_dist.training.environment import device_name
from mnistm_dist.training.model import count_parameters

if TYPE_CHECKING:
    from mnistm_dist.loop import Trainer


def header_rows(trainer: Trainer) -> dict[str, str]:
    """What a run says of itself before it begins."""
    config, manifest = trainer.config, trainer.manifest
    k = accumulation(
        batch_size=config.schedule.batch_size,
        world_size=trainer.world.size,
        micro_batch=int(config.schedule.micro_batch),
    )
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    steps = f"{trainer.total_steps:,} of {config.schedule.epochs} epochs"
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
        "reading": f"{config.data.data}, order {config.data.order}",
        "batch": f"{config.schedule.batch_size} = {trainer.world.size} x {k} x {config.schedule.micro_batch}"
        " (processes x micro-batches x images)",
        "image size": ", ".join(f"{size} px" for size in dict.fromkeys(config.schedule.image_size)),
        "steps": steps,
    }


def summary_fields(trainer: Trainer) -> dict[str, Any]:
    """What ``summary.json`` says of the training; the splits' numbers come beside it."""
    config, images = trainer.config, trainer.steps_done * trainer.config.schedule.batch_size
    counts = {name: split.count for name, split in trainer.manifest.splits.items()}
    return {
        "recipe": config.recipe,
        "world_size": trainer.world.size,
        "micro_batch": config.schedule.micro_batch,
        "batch_size": config.schedule.batch_size,
        "precision": config.machine.precision,
        "threads": config.machine.threads,
        "device": trainer.world.device.type,
        "seed": config.schedule.seed,
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
