"""What a run reports: its header, and the results of a checkpoint: predictions, figures, ``summary.json``.

`train` writes results at the end of a run, `evaluate` at any time after it.
"""

import functools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnistm_dist.data.loader import Reader
from mnistm_dist.data.transforms import Preprocess
from mnistm_dist.errors import UserError, escape_control
from mnistm_dist.files import write_atomic
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.describe import describe, describe_failure
from mnistm_dist.reporting.predictions import Predictions, mistakes, read_predictions
from mnistm_dist.reporting.run_logger import log_results
from mnistm_dist.reporting.tracking import Tracker
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.environment import device_name
from mnistm_dist.training.evaluation import SplitOutputs, predict_split, write_predictions
from mnistm_dist.training.hardware import peak_memory_gb
from mnistm_dist.training.models import count_parameters, create_model, to_device
from mnistm_dist.training.run_dir import SUMMARY_NAME, RunDir, writing
from mnistm_dist.training.schedule import Schedule
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.train_state import TrainState


def choose_checkpoint(run_dir: Path, which: str, *, has_test: bool) -> tuple[checkpoints.Checkpoint, dict[str, Any]]:
    """Return a checkpoint and the entry ``checkpoint`` of ``summary.json``.

    ``which`` is best, last, a path, or chosen: the best on val if there is a test split to give an unbiased result,
    else the last. Raise `UserError` if there is no such checkpoint.
    """
    if which not in ("best", "last", "chosen"):
        checkpoint, chosen = checkpoints.open_checkpoint(Path(which)), "named"
    else:
        warnings: list[str] = []
        last = checkpoints.latest(run_dir, warnings.append)
        if last is None:
            reason = f" ({warnings[0]})" if warnings else ""
            raise UserError(
                f"{run_dir}: no complete checkpoint{reason}; train with --resume {shlex.quote(str(run_dir))}"
            )
        checkpoint, chosen, best = last, "last", last.scalars.history.best
        if which == "best" and best is None:
            raise UserError(
                f"{run_dir}: val was never evaluated, so there is no best checkpoint; use --checkpoint last"
            )
        if best is not None and (which == "best" or (which == "chosen" and has_test)):
            chosen = "best on val"
            if best.step != last.step:
                checkpoint = checkpoints.open_checkpoint(checkpoints.checkpoint_dir(run_dir, best.step))
    entry = {
        "step": checkpoint.step,
        "chosen": chosen,
        "averaged": checkpoint.scalars.averaged,
        "image_size": checkpoint.scalars.image_size,
    }
    return checkpoint, entry


def evaluate_checkpoint(run: RunSetup, checkpoint: checkpoints.Checkpoint, console: Console) -> dict[str, Predictions]:
    """Evaluate a checkpoint on every split of ``run.readers`` but train; write predictions and figures.

    Return the predictions of each split on rank 0, nothing elsewhere. All ranks take part.
    """
    config, world, scalars = run.config, run.world, checkpoint.scalars
    initial = create_model(len(run.shards.manifest.classes), config.steps.seed)
    model = to_device(initial, world.device, config.machine.memory_format)
    # Only rank 0 reads it: on a network file system other nodes may see a new file a minute later.
    world.run_on_main(lambda: checkpoints.load_model(checkpoint.path, model))
    world.broadcast(model.parameters())
    # Normalised as in training, also if another set is evaluated.
    preprocess = Preprocess(scalars.mean, scalars.std, world.device)
    results: dict[str, Predictions] = {}
    for split, reader in run.readers.items():
        if split == "train":
            continue
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
    from mnistm_dist.reporting.pictures import write_pictures
    from mnistm_dist.reporting.style import save

    wrong = mistakes(predictions)
    shown = wrong[: figures.MOST_MISTAKES]
    images = list(reader.gather(np.array([m.id for m in shown], dtype=np.int64))[0].cpu().numpy()) if shown else []
    matrix = figures.confusion_matrix(predictions.metrics, f"Confusion matrix, {split}")
    with writing(run_dir):
        save(matrix, run_dir / f"confusion_matrix_{split}.png")
        save(figures.mistakes(images, shown, len(wrong), f"Mistakes, {split}"), run_dir / f"mistakes_{split}.png")
        write_pictures(run_dir / "mistakes" / f"{split}.png", images, [m.key for m in shown])


def finish(run: RunSetup, run_dir: RunDir, state: TrainState, console: Console, tracker: Tracker) -> None:
    """Evaluate the chosen checkpoint on val and test; write figures, summary, report and state, then print the result.

    All ranks take part.
    """
    # matplotlib and Jinja2 take a second to import, and a prediction does not need them.
    from mnistm_dist.reporting.curves import learning_curve
    from mnistm_dist.reporting.html import write_report
    from mnistm_dist.reporting.style import save

    has_test = "test" in run.readers
    checkpoint, entry = run.world.run_on_main(lambda: choose_checkpoint(run.path, "chosen", has_test=has_test))
    predictions = evaluate_checkpoint(run, checkpoint, console)
    if not run.world.is_main:
        return
    summary = write_summary(run.path, {**summary_fields(run, state), "checkpoint": entry}, predictions)
    if run.config.run.report:
        curve = learning_curve(run_dir.rows, f"Learning curve, {escape_control(run.path.name)}")
        with writing(run.path):
            save(curve, run.path / "learning_curve.png")
        write_report([run.path], run.path / "report.html", predictions)
    log_results(tracker, summary, sorted(run.path.glob("*.png")), predictions, state.steps_done)
    if run.config.run.upload_checkpoint:
        tracker.log_checkpoint(checkpoint.path, [str(entry["chosen"]).split()[0]])
    run_dir.set_state("finished")
    print_result(console, run.path, summary, predictions, next_commands(run), report=run.config.run.report)
    losses = [row["train/loss"] for row in run_dir.rows if row["kind"] == "train"]
    failures = (describe_failure(results.metrics, losses) for results in predictions.values())
    if failure := next(filter(None, failures), ""):
        console.warn(failure)


def header_rows(run: RunSetup, state: TrainState, schedule: Schedule, tracker: str) -> dict[str, str]:
    """Return the rows of the header that the console shows before training."""
    config, world, manifest = run.config, run.world, run.shards.manifest
    batch_size, micro_batch, optim = config.steps.batch_size, int(config.steps.micro_batch), config.optim
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    steps = f"{schedule.total_steps:,} steps, {config.steps.epochs} epochs"
    if schedule.last_step < schedule.total_steps:
        steps = f"{schedule.last_step:,} of {steps}"
    # cuDNN's default.
    in_tf32 = world.device.type == "cuda" and config.machine.precision == "fp32" and torch.backends.cudnn.allow_tf32
    tf32 = " (convolutions in TF32)" if in_tf32 else ""
    if state.steps_done:
        steps = f"resuming at step {state.steps_done:,} of {steps}"
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
        "model": f"pruned ResNet18, {count_parameters(state.model):,} parameters",
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
        "peak_memory_gb": peak_memory_gb(run.world.device),
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


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of ``summary.json``, empty if it is missing or damaged."""
    try:
        summary = json.loads((run_dir / SUMMARY_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_summary(run_dir: Path, summary: dict[str, Any], results: dict[str, Predictions]) -> dict[str, Any]:
    """Write ``summary.json`` with the metrics of the splits; return its content."""
    summary = summary | {split: predictions.metrics.to_json() for split, predictions in results.items()}
    with writing(run_dir):
        write_atomic(run_dir / SUMMARY_NAME, json.dumps(summary, indent=1))
    return summary


def next_commands(run: RunSetup) -> dict[str, str]:
    """Return what can be done with a finished run, as commands for a shell."""
    folder, python = shlex.quote(str(run.path)), "python -m mnistm_dist"
    compared = f"{folder} OTHER_RUN" if run.config.run.report else folder
    commands = {"predict": f"{python}.predict {folder} IMAGE", "report": f"{python}.report {compared}"}
    if run.config.run.max_steps:
        last = checkpoints.checkpoint_dir(run.path, run.config.run.max_steps)
        commands["resume"] = f"{python}.train --resume {shlex.quote(str(last))}"
    return commands


def print_result(
    console: Console,
    folder: Path | None,
    summary: dict[str, Any],
    results: dict[str, Predictions],
    commands: dict[str, str],
    *,
    report: bool,
) -> None:
    """Print accuracy, the most common confusions, if there is a ``folder`` what was written there, and what is next."""
    text = "\n\n".join(f"{split}: {describe(predictions.metrics)}" for split, predictions in results.items())
    files = {f"predictions, {split}": f"predictions_{split}.csv" for split in results}
    if report:
        files = {"report": "report.html", **files}
    console.result(summary, text, {name: folder / file for name, file in files.items()} if folder else {}, commands)
