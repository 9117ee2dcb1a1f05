"""Trainings in processes of their own, launched by the command line and followed by their log; and the benchmarks of
such runs: ``startup``, from the launch to the first step, and ``recipe``, time and images to an accuracy."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median

import torch
import yaml

from benchmarks.measure import (
    STEPS,
    Contender,
    Measurement,
    Result,
    default_device,
    default_precision,
    machine,
    open_set,
    run,
    spread,
)
from benchmarks.options import Options, Recipe, Startup, Training
from mnistm_dist.errors import EXIT_PREEMPTED, UserError


def train(
    options: Options,
    run_dir: Path,
    *flags: object,
    world_size: int = 1,
    until: Callable[[list[Result]], bool],
    every: float = 0.2,
) -> Measurement:
    """Train until ``until`` is true of the log, read ``every`` so many seconds; then stop the training with SIGTERM.

    Return the largest memory: of the launched process, resident; and of the GPU, beyond that in use before. Raises
    `UserError` with the training's own message if it fails.
    """
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1, "--main_process_port", 0)
    arguments = [
        *((*launcher, "--num_processes", world_size) if world_size > 1 else ()),
        *("-m", "mnistm_dist.train", "--shards", options.shards, "--cache-dir", options.cache_dir),
        *("--run-dir", run_dir, "--threads", options.threads, "--tracker", "none", *flags),
    ]
    command, before = [sys.executable, *map(str, arguments)], memory_megabytes(0)
    resident, on_gpu = before
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None and not until(read_log(run_dir)):
                resident, on_gpu = map(max, (resident, on_gpu), memory_megabytes(process.pid))
                time.sleep(every)
        finally:
            process.terminate()
        # A launcher of several processes exits with 1 after any signal.
        if process.wait() not in (0, EXIT_PREEMPTED) and not until(read_log(run_dir)):
            output.seek(0)
            lines = output.read().splitlines() or ["no output"]
            message = next((line for line in lines if line.startswith("error: ")), lines[-1])
            raise UserError(f"{' '.join(command)}: exit code {process.returncode}: {message}")
    return {"peak_megabytes": resident, **({"gpu_peak_megabytes": on_gpu - before[1]} if on_gpu else {})}


def read_log(run_dir: Path) -> list[Result]:
    """Return the complete rows of a run's log; none if it has not begun."""
    path = run_dir / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def memory_megabytes(pid: int) -> tuple[float, float]:
    """Return the largest resident memory of a process until now, and the memory in use on the GPU, by all processes; 0
    if there is no such process, or no GPU.

    getrusage(2) would begin with the memory of the parent.
    """
    status = Path(f"/proc/{pid}/status")
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text() if status.exists() else "", re.MULTILINE)
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return int(match[1]) * 1.024e-3 if match else 0.0, (total - free) / 1e6


def train_steps(options: Training, world_size: int = 1, *extra: object) -> Measurement:
    """Measure the training steps of ``python -m mnistm_dist.train`` by its own log, after a fifth more for warm-up.

    Evaluations and checkpoints do not count. ``extra``: further flags of the training.
    """
    steps = options.steps or STEPS[default_device().type]
    warm_up = max(1, steps // 5)
    flags = [
        *("--recipe", options.recipe, "--batch-size", options.batch_size, "--expect-world-size", world_size),
        *(("--image-size", options.image_size) if options.image_size else ()),
        *("--reader", "resident", "--order", "full", "--precision", default_precision()),
        *("--no-sanity-checks", "--no-report", "--checkpoint-every", 0, "--checkpoint-minutes", 0),
        # More epochs and steps than are trained, whatever the recipe has.
        *("--epochs", 10**6, "--max-steps", 10**9, "--evaluate-every", 10**6, "--log-every", min(10, warm_up)),
    ]
    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as folder:
        run_dir = Path(folder) / "run"
        memory = train(
            options,
            run_dir,
            *flags,
            *extra,
            world_size=world_size,
            until=lambda rows: any(row["step"] >= warm_up + steps for row in rows),
        )
        trained = [row for row in read_log(run_dir) if row["kind"] == "train" and row["step"] > warm_up]
    return {"images_per_second": harmonic_mean([row["train/images_per_second"] for row in trained]), **memory}


def startup(options: Startup) -> Result:
    """Measure from the launch of a training to the end of its first step, by the first rows of its log.

    The first launch has an empty cache: it hashes and decodes. The second one has a full cache. Raises `UserError`.
    """
    shards, first, second = open_set(options), "first launch", "second launch"
    images = sum(split.count for split in shards.manifest.splits.values())
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    # Beside the real cache: on the same disk.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.cache_dir) as folder:
        own = dataclasses.replace(options, shards=str(shards.root), cache_dir=Path(folder) / "cache")

        def launch(empty: bool) -> Measurement:
            if empty:
                shutil.rmtree(own.cache_dir, ignore_errors=True)
            run_dir, start = Path(tempfile.mkdtemp(dir=folder)) / "run", time.time()
            memory = train(
                own,
                run_dir,
                *("--recipe", options.recipe, "--batch-size", options.batch_size, "--log-every", 1),
                until=lambda rows: any(row["kind"] == "train" for row in rows),
                every=0.05,
            )
            seconds = {row["kind"]: row["time"] - start for row in reversed(read_log(run_dir))}
            return {
                "images_per_second": images / seconds["train"],
                "seconds_to_the_first_step": seconds["train"],
                "seconds_to_the_run_folder": seconds["start"],
                **memory,
            }

        return run(
            options,
            [
                Contender(name=first, measure=partial(launch, True), against=(first,)),
                Contender(name=second, measure=partial(launch, False), against=(first,)),
            ],
            # The second launch alone needs a full cache.
            warm_up=1 if options.only else 0,
            images_per_second="images of all splits / seconds from the launch to the end of the first step",
            files="in the page cache",
        )


def recipe(options: Recipe) -> Result:
    """Train every recipe with every seed, and ``--against`` with the first seed. Raises `UserError`.

    Each recipe and seed has a run folder. Existing runs are used: one that has reached the accuracy is read and not
    trained again, one that was stopped continues.
    """
    shards, reference = open_set(options), options.against or options.recipe[0]
    shards.split("val")
    seeds = {reference: options.seeds[:1], **dict.fromkeys(options.recipe, options.seeds)}
    runs: dict[str, list[Result]] = {name: [] for name in seeds}
    for name, results in runs.items():
        for seed in seeds[name]:
            run_dir = options.runs / f"{Path(name).stem}-seed{seed}"
            train_to_accuracy(options, name, seed, run_dir)
            results.append(read_run(run_dir, accuracy=options.accuracy, epoch_images=shards.split("train").count))
            print(f"{run_dir}: {results[-1]}", file=sys.stderr, flush=True)
    return {
        "rows": [compare_recipes(name, results, runs[reference], reference) for name, results in runs.items()],
        "conditions": {
            **machine(options),
            "ratio": "median seconds of `against` to the accuracy / median seconds of the recipe, over their seeds",
            "spread": "(largest - smallest) / median of the seconds over the seeds",
            "seconds": "of the run's log, from its start to the evaluation that reached the accuracy, with evaluations "
            "and checkpoints and without the pauses between launches",
            "images_per_second": "images until the accuracy was reached / seconds, both medians over the seeds",
            "details": {name: {"runs": results} for name, results in runs.items()},
        },
    }


def train_to_accuracy(options: Recipe, name: str, seed: int, run_dir: Path) -> None:
    """Train, or continue, a run until it reaches the accuracy (``--to-end``: to its end).

    Raises `UserError` if the folder holds another run.
    """
    if (run_dir / "config.yaml").is_file():
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        asked, held = open_set(options), open_set(dataclasses.replace(options, shards=config["data"]["shards"]))
        before = (config["recipe"], config["steps"]["seed"], held.manifest.identity)
        if before != (name, seed, asked.manifest.identity):
            raise UserError(
                f"{run_dir}: holds a run of {before[0]}, seed {before[1]}, on {held.root}; asked for {name}, "
                f"seed {seed}, on {asked.root}: choose another folder with --runs"
            )

    def is_done(rows: list[Result]) -> bool:
        reached = (row["kind"] == "evaluation" and row["val/accuracy"] >= options.accuracy for row in rows)
        return not options.to_end and any(reached)

    if not is_done(read_log(run_dir)):
        train(options, run_dir, "--recipe", name, "--seed", seed, "--resume", "auto", until=is_done, every=1.0)


def read_run(run_dir: Path, *, accuracy: float, epoch_images: int) -> Result:
    """Return when a run reached the accuracy, or how far it came."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    best: Result = {"val/accuracy": 0.0, "image_size": None}
    seconds, before = 0.0, None
    for row in read_log(run_dir):
        # Between the last row of a launch and the first one of the next the run did not train.
        if before is not None and row["kind"] not in ("start", "resume"):
            seconds += row["time"] - before["time"]
        before = row
        if row["kind"] == "evaluation":
            best = max(best, row, key=lambda row: row["val/accuracy"])
        if best["val/accuracy"] >= accuracy:
            break
    images = before["step"] * config["steps"]["batch_size"] if before else 0
    return {
        "recipe": config["recipe"],
        "seed": config["steps"]["seed"],
        "reached": best["val/accuracy"] >= accuracy,
        "seconds": round(seconds, 1),
        "images": images,
        "epochs": round(images / epoch_images, 2),
        "accuracy": best["val/accuracy"],
        "image_size": best["image_size"],
        "threads": config["machine"]["threads"],
    }


def compare_recipes(name: str, runs: Sequence[Result], reference: Sequence[Result], against: str) -> Result:
    """Return the row of a recipe; without a rate or ratio if a seed did not reach the accuracy."""
    seconds, other = (median(run["seconds"] for run in each) for each in (runs, reference))
    reached, comparable = (all(run["reached"] for run in each) for each in (runs, [*runs, *reference]))
    return {
        "name": name,
        "output": "model-ready",
        "images_per_second": round(median(run["images"] for run in runs) / seconds, 2) if reached else None,
        "ratio": round(other / seconds, 4) if comparable else None,
        "against": against,
        "spread": spread([run["seconds"] for run in runs]),
    }
