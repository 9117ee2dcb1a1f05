"""A checkpoint of a run: chosen, scored on the splits, its figures drawn, the result written and told."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from mnistm_dist.config import Config
from mnistm_dist.data.loader import Reader
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.transforms import Preprocess
from mnistm_dist.errors import UserError
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.describe import describe
from mnistm_dist.reporting.metrics import Metrics
from mnistm_dist.reporting.predictions import mistakes, read_predictions
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Checkpoint, check_state, write_durably
from mnistm_dist.training.distributed import World
from mnistm_dist.training.evaluation import Predictions, predict_split, write_predictions
from mnistm_dist.training.models import create_model, to_device
from mnistm_dist.training.run_dir import writing


def choose_checkpoint(run_dir: Path, which: str, *, has_test: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint and, for ``summary.json``, which one it is.

    ``which`` is best, last, a path, or chosen: the best on val where a test split gives an honest result, else the
    last. Raises `UserError` where there is no such checkpoint.
    """
    if which not in ("best", "last", "chosen"):
        found, chosen = checkpoints.open_checkpoint(Path(which)), "named"
    else:
        complaints: list[str] = []
        last = checkpoints.latest(run_dir, complaints.append)
        if last is None:
            told = f" ({complaints[0]})" if complaints else ""
            raise UserError(f"{run_dir}: no whole checkpoint in it{told}; train --resume {run_dir} makes one")
        check_state(last)
        best = last.state["past"]["best"]
        found, chosen = last, "last"
        if which == "best" and best is None:
            raise UserError(
                f"{run_dir}: nothing was evaluated on val, so there is no best checkpoint; use --checkpoint last"
            )
        if best is not None and (which == "best" or (which == "chosen" and has_test)):
            chosen = "best on val"
            if best["step"] != last.step:
                found = checkpoints.open_checkpoint(checkpoints.checkpoint_dir(run_dir, best["step"]))
    check_state(found)
    how = {
        "step": found.step,
        "chosen": chosen,
        "averaged": found.state["averaged"],
        "image_size": found.state["image_size"],
    }
    return found, how


def evaluate_checkpoint(
    run_dir: Path,
    checkpoint: Checkpoint,
    config: Config,
    world: World,
    console: Console,
    shards: ShardSet,
    readers: dict[str, Reader],
) -> dict[str, Any]:
    """Predicts every split that has a reader and writes what it shows; gives the splits' numbers on rank 0. All ranks
    take part."""
    classes = shards.manifest.classes
    model = to_device(create_model(len(classes), config.steps.seed), world.device, config.machine.memory_format)
    # Rank 0 alone reads it: on a network's file system another node may see what was just written a minute later.
    world.run_on_main(lambda: checkpoints.load_model(checkpoint.path, model))
    world.broadcast(model.parameters())
    # Normalised as in training, also where the images of another set are scored.
    preprocess = Preprocess(checkpoint.state["mean"], checkpoint.state["std"], world.device)
    results: dict[str, Any] = {}
    for split, reader in readers.items():
        with console.progress(f"evaluating {split}", reader.size) as bar:
            predictions = predict_split(
                world,
                model,
                preprocess,
                reader,
                image_size=checkpoint.state["image_size"],
                progress=bar,
            )
        metrics = world.run_on_all_ranks(functools.partial(write_split, run_dir, split, predictions, shards))
        if metrics is not None:
            results[split] = metrics.to_json()
        if config.run.report:
            world.run_on_all_ranks(functools.partial(draw_split, run_dir, split, metrics, reader))
    return results


def write_split(run_dir: Path, split: str, predictions: Predictions | None, shards: ShardSet) -> Metrics | None:
    """A split's ``predictions_SPLIT.csv`` and the metrics of it; nothing on other ranks than 0, which hold none.

    Raises `UserError` where the run folder cannot be written.
    """
    if predictions is None:
        return None
    classes = shards.manifest.classes
    path = run_dir / f"predictions_{split}.csv"
    with writing(run_dir):
        write_predictions(path, shards.keys(split, np.arange(len(predictions.labels))), predictions, classes)
    # Every number and figure comes from the file that was written.
    return read_predictions(path, classes).measure()


def draw_split(run_dir: Path, split: str, metrics: Metrics | None, reader: Reader) -> None:
    """The figures of a split from its predictions file; nothing on other ranks than 0, which hold no metrics.

    Raises `UserError` where the run folder cannot be written.
    """
    if metrics is None:
        return
    # They bring matplotlib, which a prediction does not need.
    from mnistm_dist.reporting import figures
    from mnistm_dist.reporting.style import save

    wrong = mistakes(read_predictions(run_dir / f"predictions_{split}.csv", metrics.classes))
    shown = wrong[: figures.MOST_MISTAKES]
    images = list(reader.gather(np.array([m.id for m in shown], dtype=np.int64))[0].cpu().numpy()) if shown else []
    with writing(run_dir):
        save(figures.confusion_matrix(metrics, f"Confusion matrix, {split}"), run_dir / f"confusion_matrix_{split}.png")
        save(figures.mistakes(images, shown, len(wrong), f"Mistakes, {split}"), run_dir / f"mistakes_{split}.png")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """``summary.json``, or nothing where there is none yet."""
    try:
        found = json.loads((run_dir / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """``summary.json``, whole or not at all."""
    with writing(run_dir):
        write_durably(run_dir / "summary.json", json.dumps(summary, indent=1).encode())


def tell_result(
    console: Console, run_dir: Path, summary: dict[str, Any], splits: list[str], *, report: bool = False
) -> None:
    """The result on the console: accuracy, the worst confusions in words, the paths, the report's if it was written."""
    words = "\n\n".join(f"{split}: {describe(Metrics.from_json(summary[split]))}" for split in splits)
    paths = {f"predictions, {split}": str(run_dir / f"predictions_{split}.csv") for split in splits}
    if report:
        paths = {"report": str(run_dir / "report.html"), **paths}
    console.result(summary, words, {"run folder": str(run_dir), **paths})
