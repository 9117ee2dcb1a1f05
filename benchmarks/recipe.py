"""``bench recipe``: time and images until a recipe reaches an accuracy on val, by seed.

Trainings live in a folder of their own, a run for each recipe and seed, and are taken up where they stand: one that
has reached the accuracy is read and not run again, one that was cut short goes on. The seconds are those of a run's own
log, from its start to the evaluation that reached the accuracy, with evaluations and checkpoints and without the pauses
between launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.launches import LogRow, launch, train_command
from benchmarks.rounds import Result, Row, relative_range
from benchmarks.setting import Setting, open_set
from mnistm_dist import config as configuration
from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import UserError
from mnistm_dist.training.run_dir import read_log

LOOK_EVERY = 1.0
"""Seconds between two looks at a training's log."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run reached the accuracy, or how far it came."""

    recipe: str
    seed: int
    reached: bool
    seconds: float
    """Of the run's log until then; of the whole log where it was not reached."""
    images: int
    """Trained on until then."""
    epochs: float
    accuracy: float
    """On val: the one that reached it, else the best."""
    image_size: int | None
    """At which val was scored then, pixels."""
    threads: int
    """Of each process of the run."""

    def to_json(self) -> dict[str, Any]:
        """For ``details``."""
        return {**vars(self), "seconds": round(self.seconds, 1), "epochs": round(self.epochs, 2)}


def bench(
    setting: Setting,
    recipes: Sequence[str],
    *,
    against: str | None,
    seeds: Sequence[int],
    accuracy: float,
    to_end: bool,
    runs: Path,
) -> Result:
    """Trains every one of ``recipes`` with every one of ``seeds``, and ``against`` with the first, to ``accuracy`` on
    val, in ``runs``; ``to_end``: and beyond, to the recipe's end.

    Without ``against`` the first of ``recipes`` is compared with. Raises `UserError`.
    """
    shards = open_set(setting)
    shards.split("val")
    wanted = {name: tuple(seeds) for name in recipes}
    if against is not None:
        wanted.setdefault(against, tuple(seeds[:1]))
    reference = against or recipes[0]
    found: dict[str, list[Reached]] = {name: [] for name in wanted}
    pairs = [(name, seed) for name, its_seeds in wanted.items() for seed in its_seeds]
    with setting.console.progress("recipe", len(pairs), "runs") as bar:
        for done, (name, seed) in enumerate(pairs, start=1):
            run_dir = runs / f"{Path(name).stem}-seed{seed}"
            train(setting, shards, name, seed, run_dir, accuracy=None if to_end else accuracy)
            found[name].append(read_run(run_dir, shards, accuracy=accuracy))
            setting.console.line(words(found[name][-1]))
            bar.update(done)
    return Result(
        rows=[row(name, found[name], found[reference], reference) for name in wanted],
        conditions={
            "accuracy": accuracy,
            "seeds": {name: list(its_seeds) for name, its_seeds in wanted.items()},
            "ratio": "median seconds of `against` to the accuracy / median seconds of the recipe, over their seeds",
            "spread": "(largest - smallest) / median of the seconds over the seeds",
            "images_per_second": "images until the accuracy was reached, over the seconds, both medians over the seeds",
            "details": {name: {"runs": [one.to_json() for one in ones]} for name, ones in found.items()},
        },
    )


def train(setting: Setting, shards: ShardSet, recipe: str, seed: int, run_dir: Path, *, accuracy: float | None) -> None:
    """A run of ``recipe``, begun or gone on with, until it reaches ``accuracy`` or, without one, its end.

    Raises `UserError` where the folder holds another run.
    """
    if (run_dir / "config.yaml").is_file():
        held = configuration.load(run_dir / "config.yaml")
        identity = open_shards(str(held.data.shards), cache_dir=setting.cache_dir).manifest.identity
        if (held.recipe, held.steps.seed, identity) != (recipe, seed, shards.manifest.identity):
            raise UserError(
                f"{run_dir}: holds a run of {held.recipe}, seed {held.steps.seed}, on {held.data.shards}; "
                f"{recipe}, seed {seed}, on {shards.root} was asked for: name another folder with --runs"
            )
    if accuracy is None or not reaches(read_log(run_dir / "log.jsonl"), accuracy):
        flags = ["--recipe", recipe, "--seed", seed, "--threads", setting.threads, "--resume", "auto"]
        command = train_command(setting, run_dir, *flags)
        launch(command, run_dir, lambda rows: accuracy is not None and reaches(rows, accuracy), every=LOOK_EVERY)


def reaches(rows: Sequence[LogRow], accuracy: float) -> bool:
    """Whether an evaluation of the log has the accuracy on val."""
    return any(row["kind"] == "evaluation" and row["val/accuracy"] >= accuracy for row in rows)


def read_run(run_dir: Path, shards: ShardSet, *, accuracy: float) -> Reached:
    """What the folder of a run on ``shards`` says of it."""
    config = configuration.load(run_dir / "config.yaml")
    seconds, before, best, last = 0.0, None, None, None
    for row in read_log(run_dir / "log.jsonl"):
        # Between the last row of a launch and the first one of the next the run stood still.
        if before is not None and row["kind"] not in ("start", "resume"):
            seconds += row["time"] - before
        before, last = row["time"], row
        if row["kind"] != "evaluation":
            continue
        if best is None or row["val/accuracy"] > best["val/accuracy"]:
            best = row
        if row["val/accuracy"] >= accuracy:
            break
    reached = best is not None and best["val/accuracy"] >= accuracy
    images = int(last["step"]) * config.steps.batch_size if last else 0
    assert config.machine.threads != "auto"
    return Reached(
        recipe=config.recipe,
        seed=config.steps.seed,
        reached=reached,
        seconds=seconds,
        images=images,
        epochs=images / shards.split("train").count,
        accuracy=best["val/accuracy"] if best else 0.0,
        image_size=best["image_size"] if best else None,
        threads=config.machine.threads,
    )


def row(name: str, runs: Sequence[Reached], reference: Sequence[Reached], against: str) -> Row:
    """The comparison of one recipe; no numbers where one of its seeds did not reach the accuracy."""
    seconds = [run.seconds for run in runs]
    reached, theirs = all(run.reached for run in runs), all(run.reached for run in reference)
    ratio = median(run.seconds for run in reference) / median(seconds) if reached and theirs else None
    rate = median(run.images for run in runs) / median(seconds) if reached else None
    return Row(
        name=name,
        output="model-ready",
        images_per_second=None if rate is None else round(rate, 2),
        ratio=None if ratio is None else round(ratio, 4),
        against=against,
        spread=round(relative_range(seconds), 4),
    )


def words(run: Reached) -> str:
    """A run in one line."""
    how = "reached" if run.reached else "did not reach it; the best was"
    at = "" if run.image_size is None else f" at {run.image_size} px"
    return (
        f"{run.recipe}, seed {run.seed}: {how} {100 * run.accuracy:.2f} %{at} "
        f"after {run.seconds:,.0f} s, {run.images:,} images, {run.epochs:.1f} epochs"
    )
