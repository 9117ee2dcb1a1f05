"""Evaluate a trained run, exactly, at any number of processes.

    python -m mnistm_dist.evaluate runs/NAME
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 -m mnistm_dist.evaluate runs/NAME

Writes into the run: ``predictions_SPLIT.csv``, ``confusion_matrix_SPLIT.png``, ``mistakes_SPLIT.png`` and the split's
numbers in ``summary.json``; ``python -m mnistm_dist.report RUN`` then brings ``report.html`` up to date. On one kind of
device the predictions are the same, byte for byte, at every world size.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnistm_dist.errors import UserError, before_joining, run_door
from mnistm_dist.flags import ArgumentParser

if TYPE_CHECKING:
    from mnistm_dist.config import Config
    from mnistm_dist.data.loader import Reader
    from mnistm_dist.data.shards import ShardSet
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.metrics import Metrics
    from mnistm_dist.training.checkpoint import Checkpoint
    from mnistm_dist.training.distributed import World
    from mnistm_dist.training.evaluation import Predictions


def main(argv: list[str]) -> int:
    """Evaluates a run's checkpoint on its splits. Exit codes: 0, or 2 for a person's mistake."""
    parser = ArgumentParser(prog="python -m mnistm_dist.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--shards", metavar="DIR", help="the packed set (default: the run's)")
    parser.add_argument("--split", choices=["val", "test"], help="one split only (default: both)")
    parser.add_argument("--checkpoint", default="chosen", metavar="best|last|PATH", help="default: the run's choice")
    args = parser.parse_args(argv)

    from mnistm_dist import config as configuration
    from mnistm_dist.launch import open_readers, open_set
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.training import distributed
    from mnistm_dist.training.lost import lost_processes
    from mnistm_dist.training.resources import native_precisions
    from mnistm_dist.training.run_folder import is_held
    from mnistm_dist.training.signals import die_with_launcher

    run_dir = Path(args.run)
    with before_joining():
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir}: no run folder (no config.yaml); name one, such as runs/NAME")
        if is_held(run_dir):
            raise UserError(f"{run_dir}: a live run holds it; wait for its end")
        config = configuration.load(run_dir / "config.yaml")
        if args.shards:
            config = configuration.replace(config, shards=args.shards)
    machine = replace(config.machine, threads="auto")
    emulated = machine.precision not in ("auto", *native_precisions())
    if emulated:
        machine = replace(machine, precision="fp32")
    die_with_launcher()
    timeout = config.run.collective_timeout
    with distributed.joined(machine, expect_world_size=None, collective_timeout=timeout) as world:
        console = Console(enabled=world.is_main)
        if emulated:
            console.warn(f"precision: the run's {config.machine.precision} is not native here; scored in fp32")
        with console.library_warnings(), lost_processes(timeout):
            shards = open_set(config.data, world, console)
            splits = [split for split in ("val", "test") if split in shards.manifest.splits]
            if args.split is not None:
                shards.split(args.split)
                splits = [args.split]
            has_test = "test" in shards.manifest.splits
            checkpoint, how = world.on_main(lambda: choose_checkpoint(run_dir, args.checkpoint, has_test=has_test))
            readers = open_readers(shards, config.data, splits, world, console)
            world = world.set_up()
            results = evaluate_checkpoint(run_dir, checkpoint, config, world, console, shards, readers)
            if world.is_main:
                summary = read_summary(run_dir)
                if summary.get("checkpoint") != how or args.shards:
                    # The other split's numbers are another checkpoint's, or another set's.
                    summary = {name: value for name, value in summary.items() if name not in ("val", "test")}
                summary = summary | {"checkpoint": how} | results
                write_summary(run_dir, summary)
                tell_result(console, run_dir, summary, list(results))
    return 0


def choose_checkpoint(run_dir: Path, which: str, *, has_test: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint and, for ``summary.json``, which one it is.

    ``which`` is best, last, a path, or chosen: the best on val where a test split gives an honest result, else the
    last. Raises `UserError` where there is no such checkpoint.
    """
    from mnistm_dist.training import checkpoint as checkpoints
    from mnistm_dist.training.checkpoint_state import check_state

    if which not in ("best", "last", "chosen"):
        found, chosen = checkpoints.open_checkpoint(Path(which)), "named"
    else:
        complaints: list[str] = []
        last = checkpoints.newest(run_dir, complaints.append)
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
                found = checkpoints.open_checkpoint(checkpoints.folder_of(run_dir, best["step"]))
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
    from mnistm_dist.data.transforms import Preprocess
    from mnistm_dist.training import checkpoint as checkpoints
    from mnistm_dist.training.evaluation import predict_split
    from mnistm_dist.training.model import create_model, place

    classes = shards.manifest.classes
    model = place(create_model(len(classes), config.schedule.seed), world.device, config.machine.memory_format)
    # Rank 0 alone reads it: on a network's file system another node may see what was just written a minute later.
    world.on_main(lambda: checkpoints.load_model(checkpoint.path, model))
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
        metrics = world.together(functools.partial(write_split, run_dir, split, predictions, shards))
        if metrics is not None:
            results[split] = metrics.to_json()
        if config.run.report:
            world.together(functools.partial(draw_split, run_dir, split, metrics, reader))
    return results


def write_split(run_dir: Path, split: str, predictions: Predictions | None, shards: ShardSet) -> Metrics | None:
    """A split's ``predictions_SPLIT.csv`` and the metrics of it; nothing on other ranks than 0, which hold none.

    Raises `UserError` where the run folder cannot be written.
    """
    if predictions is None:
        return None
    import numpy as np

    from mnistm_dist.reporting.predictions import read_predictions
    from mnistm_dist.training.evaluation import write_predictions
    from mnistm_dist.training.run_folder import writing

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
    import numpy as np

    from mnistm_dist.reporting import figures
    from mnistm_dist.reporting.drawing import save
    from mnistm_dist.reporting.predictions import mistakes, read_predictions
    from mnistm_dist.training.run_folder import writing

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
    from mnistm_dist.training.checkpoint import write_durably
    from mnistm_dist.training.run_folder import writing

    with writing(run_dir):
        write_durably(run_dir / "summary.json", json.dumps(summary, indent=1).encode())


def tell_result(
    console: Console, run_dir: Path, summary: dict[str, Any], splits: list[str], *, report: bool = False
) -> None:
    """The result on the console: accuracy, the worst confusions in words, the paths, the report's if it was written."""
    from mnistm_dist.reporting.metrics import Metrics
    from mnistm_dist.reporting.words import describe

    words = "\n\n".join(f"{split}: {describe(Metrics.from_json(summary[split]))}" for split in splits)
    paths = {f"predictions, {split}": str(run_dir / f"predictions_{split}.csv") for split in splits}
    if report:
        paths = {"report": str(run_dir / "report.html"), **paths}
    console.result(summary, words, {"run folder": str(run_dir), **paths})


if __name__ == "__main__":
    sys.exit(run_door(main))
