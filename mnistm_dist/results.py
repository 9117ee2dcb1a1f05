"""What a run reports: its header, and the results of a checkpoint: predictions, figures, ``summary.json``.

`train` writes results at the end of a run, `evaluate` at any time after it.
"""

import dataclasses
import functools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mnistm_dist.config import Config
from mnistm_dist.data.loader import Reader
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.transforms import Preprocess, create_augment
from mnistm_dist.errors import escape_control
from mnistm_dist.files import explain_os_errors, write_atomic
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.describe import describe_failure, number, plural
from mnistm_dist.reporting.metrics import CustomMetrics, measure_custom
from mnistm_dist.reporting.predictions import Predictions, mistakes, read_predictions
from mnistm_dist.reporting.run_logger import log_results
from mnistm_dist.reporting.tracking import Tracker
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.environment import device_name
from mnistm_dist.training.evaluation import SplitOutputs, predict_split, write_predictions
from mnistm_dist.training.hardware import peak_memory_gb
from mnistm_dist.training.models import create_model, to_device
from mnistm_dist.training.run_dir import SUMMARY_NAME, RunDir, writing
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.train_state import TrainState


def evaluate_checkpoint(run: RunSetup, checkpoint: checkpoints.Checkpoint, console: Console) -> dict[str, Predictions]:
    """Evaluate a checkpoint on every split of ``run.readers`` but train; write predictions and figures.

    Return the predictions of each split on rank 0, nothing elsewhere. All ranks take part.
    """
    config, world, scalars = run.config, run.world, checkpoint.scalars
    classes, name = run.shards.manifest.classes, config.network.model
    initial = world.run_on_all_ranks(lambda: create_model(len(classes), config.steps.seed, name))
    model = to_device(initial, world.device, config.machine.memory_format)
    # Only rank 0 reads it: on a network file system other nodes may see a new file a minute later.
    world.run_on_main(lambda: checkpoints.load_model(checkpoint.path, model))
    world.broadcast(model.parameters())
    # Normalised as in training, also if another set is evaluated.
    preprocess = Preprocess(scalars.mean, scalars.std, world.device)
    results: dict[str, Predictions] = {}
    for split, reader in [(split, reader) for split, reader in run.readers.items() if split != "train"]:
        with console.progress(f"evaluating {split}", reader.size) as bar:
            outputs = predict_split(world, model, preprocess, reader, image_size=scalars.image_size, progress=bar)
        predictions = world.run_on_all_ranks(functools.partial(write_split, run, split, outputs))
        if predictions is not None:
            results[split] = predictions
    return results


def write_split(run: RunSetup, split: str, outputs: SplitOutputs | None) -> Predictions | None:
    """Write ``predictions_SPLIT.csv`` and the figures of a split on rank 0; return the predictions.

    Every number and figure comes from the file. Raise `UserError` if the run folder cannot be written.
    """
    if outputs is None:
        return None
    path, classes = run.path / f"predictions_{split}.csv", run.shards.manifest.classes
    with writing(run.path):
        write_predictions(path, run.shards.keys(split, np.arange(len(outputs.labels))), outputs, classes)
    predictions = read_predictions(path, classes)
    if run.config.run.report:
        draw_split(run.path, split, predictions, run.readers[split])
    return predictions


def draw_split(run_dir: Path, split: str, predictions: Predictions, reader: Reader) -> None:
    """Draw the figures of a split. Raise `UserError` if the run folder cannot be written."""
    from mnistm_dist.reporting import figures
    from mnistm_dist.reporting.style import save

    wrong = mistakes(predictions)
    shown = wrong[: figures.MOST_MISTAKES]
    images = list(reader.gather(np.array([m.id for m in shown], dtype=np.int64))[0].cpu().numpy()) if shown else []
    with writing(run_dir):
        matrix = figures.confusion_matrix(predictions.metrics, f"Confusion matrix, {split}")
        save(matrix, run_dir / f"confusion_matrix_{split}.png")
        save(figures.mistakes(images, shown, len(wrong), f"Mistakes, {split}"), run_dir / f"mistakes_{split}.png")
        folder = run_dir / "mistakes" / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for image, mistake in zip(images, shown, strict=True):
            Image.fromarray(image).save(folder / f"{mistake.key}.png")


def draw_batch(
    path: Path,
    config: Config,
    shards: ShardSet,
    positions: np.ndarray,
    ids: np.ndarray,
    image_size: int,
    title: str,
    captions: list[str],
) -> None:
    """Draw the samples ``ids`` at training ``positions``, augmented to ``image_size`` pixels, with their captions.

    Raise `UserError` if a shard is damaged or the file cannot be written.
    """
    from mnistm_dist.reporting.figures import batch_grid
    from mnistm_dist.reporting.style import save

    augment = create_augment(config, shards.split("train"))
    preprocess = augment.preprocess
    images = torch.from_numpy(shards.images("train", ids))
    floats = augment(images, positions, image_size) * preprocess.std + preprocess.mean
    pixels = (255 * floats).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    with explain_os_errors(path):
        save(batch_grid(list(pixels), captions, title), path)


def finish(
    run: RunSetup, run_dir: RunDir, state: TrainState, console: Console, tracker: Tracker, metrics: CustomMetrics
) -> None:
    """Evaluate the chosen checkpoint on val and test; write figures, summary, report and state, then print the result.

    All ranks take part.
    """
    # matplotlib and Jinja2 take a second to import, and a prediction does not need them.
    from mnistm_dist.reporting.curves import learning_curve
    from mnistm_dist.reporting.html import write_report
    from mnistm_dist.reporting.style import save

    checkpoint, entry = run.world.run_on_main(
        lambda: checkpoints.choose_checkpoint(run.path, "chosen", has_test="test" in run.readers)
    )
    predictions = evaluate_checkpoint(run, checkpoint, console)
    if not run.world.is_main:
        return
    summary = write_summary(run.path, {**summary_fields(run, state), "checkpoint": entry}, predictions, metrics)
    if run.config.run.report:
        curve = learning_curve(run_dir.rows, f"Learning curve, {escape_control(run.path.name)}")
        with writing(run.path):
            save(curve, run.path / "learning_curve.png")
        write_report([run.path], run.path / "report.html", predictions)
    log_results(tracker, summary, sorted(run.path.glob("*.png")), predictions, state.steps_done)
    if run.config.run.upload_checkpoint:
        tracker.log_checkpoint(checkpoint.path, [str(entry["chosen"]).split()[0]])
    run_dir.set_state("finished")
    console.result(run.path, summary, predictions, next_commands(run), report=run.config.run.report)
    losses = [row["train/loss"] for row in run_dir.rows if row["kind"] == "train"]
    failures = (describe_failure(results.metrics, losses) for results in predictions.values())
    if failure := next(filter(None, failures), ""):
        console.warn(failure)


def header_rows(run: RunSetup, state: TrainState, tracker: str) -> dict[str, str]:
    """Return the rows of the header that the console shows before training."""
    config, world, manifest, schedule = run.config, run.world, run.shards.manifest, run.schedule
    batch_size, micro_batch, optim = config.steps.batch_size, int(config.steps.micro_batch), config.optim
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    steps = f"{plural(schedule.total_steps, 'step')}, {plural(config.steps.epochs, 'epoch')}"
    if schedule.last_step < schedule.total_steps:
        steps = f"{schedule.last_step:,} of {steps}"
    # cuDNN's default.
    in_tf32 = world.device.type == "cuda" and config.machine.precision == "fp32" and torch.backends.cudnn.allow_tf32
    tf32 = " (convolutions in TF32)" if in_tf32 else ""
    if state.steps_done:
        steps = f"resuming at step {state.steps_done:,} of {steps}"
    network = config.network
    parameters, flops = (sum(layer[column] for layer in state.layers) for column in ("parameters", "flops"))
    new = f" (new, since the classes differ: {', '.join(state.new_tensors)})" if state.new_tensors else ""
    inverts = config.augment.invert and manifest.lineage == "unknown"
    hint = "it inverts colours, which suits MNIST-M; photos: --recipe images, other images: --invert 0"
    averaged = f", averaged weights ({optim.ema_decay})" if optim.ema_decay else ""
    return {
        **({"augmentation": hint} if inverts else {}),
        # The first line of a new run has named it.
        **({"recipe": config.recipe} if config.run.resume else {}),
        "world size": str(world.size),
        "device": device_name(world.device),
        "precision": f"{config.machine.precision}{tf32}, {config.machine.memory_format}",
        "threads": f"{config.machine.threads} per process",
        "model": f"{network.model}, {parameters:,} parameters",
        "FLOPs": f"{number(flops / 1e6)} million per image, forward at {config.steps.image_size[-1]} px",
        **({"initial weights": f"{network.init_from}{new}"} if network.init_from else {}),
        "shards": f"{run.shards.root} ({manifest.lineage}: {counts})",
        "data": f"{config.data.reader} reader, {config.data.order} order",
        "batch": f"{batch_size} = {batch_size // micro_batch} x {micro_batch} (micro-batches x images)",
        "image size": ", ".join(f"{size} px" for size in dict.fromkeys(config.steps.image_size)),
        "optimizer": f"{optim.optimizer}{averaged}",
        "learning rate": f"{schedule.peak_learning_rate:g}, {optim.lr_schedule}",
        "training": steps,
        "seed": str(config.steps.seed),
        "tracker": tracker,
    }


def summary_fields(run: RunSetup, state: TrainState) -> dict[str, Any]:
    """Return the fields of ``summary.json`` that describe the training; those of the splits are added to them."""
    config, manifest = run.config, run.shards.manifest
    images, seconds = state.steps_done * config.steps.batch_size, state.history.train_seconds
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
        "evaluate_seconds": round(state.history.evaluate_seconds, 3),
        "save_seconds": round(state.history.save_seconds, 3),
        "peak_memory_gb": peak_memory_gb(run.world.device),
        "images_per_second": round(images / seconds, 2) if seconds else None,
        "model": config.network.model,
        "parameters": sum(layer["parameters"] for layer in state.layers),
        "flops_per_image": sum(layer["flops"] for layer in state.layers),
        "data": {
            "path": str(run.shards.root),
            "lineage": manifest.lineage,
            "identity": manifest.identity,
            "counts": {name: split.count for name, split in manifest.splits.items()},
            "pixels_sha256": manifest.pixels_sha256,
        },
    }


def write_summary(
    run_dir: Path, summary: dict[str, Any], results: dict[str, Predictions], metrics: CustomMetrics
) -> dict[str, Any]:
    """Write ``summary.json`` with the metrics of the splits; return its content.

    Without custom ``metrics``, those that ``summary`` has, of the same checkpoint, are kept.
    """
    for split, predictions in results.items():
        custom = measure_custom(metrics, predictions.probabilities, predictions.labels)
        custom = custom or summary.get(split, {}).get("custom", {})
        summary = summary | {split: dataclasses.replace(predictions.metrics, custom=custom).to_json()}
    with writing(run_dir):
        write_atomic(run_dir / SUMMARY_NAME, json.dumps(summary, indent=1))
    return summary


def next_commands(run: RunSetup) -> dict[str, str]:
    """Return what can be done with a finished run, as commands for a shell."""
    folder, python = shlex.quote(str(run.path)), "python -m mnistm_dist"
    compared = f"{folder} OTHER_RUN" if run.config.run.report else folder
    commands = {"predict": f"{python}.predict {folder} IMAGE", "report": f"{python}.report {compared}"}
    if run.config.run.max_steps and not (run.path / checkpoints.MODEL).exists():
        commands["resume"] = f"{python}.train --resume {folder} --max-steps none"
    return commands
