"""The memory and the time of a run, estimated before it (``train --dry-run``), and the work that is left during it."""

import time
from statistics import median

from mnistm_dist.config import dump
from mnistm_dist.data.transforms import create_augment
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.describe import duration
from mnistm_dist.reporting.time_left import TimeLeft
from mnistm_dist.results import header_rows
from mnistm_dist.training.hardware import CoreWatch, peak_memory_gb
from mnistm_dist.training.initial_state import create_train_state
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.step import create_step

STEPS, WARM_UP = 10, 2  # discarded steps at each image size, and those of them that are not timed


def print_estimate(run: RunSetup, console: Console, steps_done: int) -> None:
    """Train a few steps at each image size, discard them, and print what the run will be after ``steps_done``.

    All ranks take part.
    """
    config, world = run.config, run.world
    split = run.shards.split("train")
    schedule = run.schedule
    augment = create_augment(config, split, world.device)
    # Not resumed: the values of the weights do not change the time of a step.
    classes, left = run.shards.manifest.classes, TimeLeft()
    state = create_train_state(config, world, len(classes), run.shares, resumed=steps_done > 0)
    state.train_model.train()
    train_step = create_step(world, state, augment, config)
    watch = CoreWatch(seconds=0.0)
    for size in schedule.work_left(steps_done, config.run.evaluate_every)[0]:
        seconds = []
        for micro_batches in run.batches(0, STEPS):
            started = time.perf_counter()
            losses, _ = train_step(micro_batches, size, schedule.learning_rate(0))
            # Waits for the device.
            losses.mean().item()
            seconds.append(time.perf_counter() - started)
        # The first ones allocate memory.
        left.add("train", size, median(seconds[WARM_UP:]) / config.steps.batch_size)
    total = left.seconds(*images_left(run, steps_done))
    rows = header_rows(run, state, config.run.tracker)
    rows["peak memory"] = f"{peak_memory_gb(world.device):.2f} GB, of the first process in these steps"
    rows["time"] = f"about {duration(total or 0)} of training and evaluation"
    if watch.warning():
        rows["cores"] = "busy now; on idle ones it takes less time"
    console.line(dump(config))
    console.header(f"dry run: {run.path} is not written", rows)


def images_left(run: RunSetup, steps_done: int) -> tuple[dict[int, int], dict[int, int]]:
    """Return the images that are left to train and to evaluate after ``steps_done``, by image size in pixels.

    The evaluation of the result, on val and test, is one of them.
    """
    counts = {name: split.count for name, split in run.shards.manifest.splits.items()}
    schedule, batch_size = run.schedule, run.config.steps.batch_size
    steps, evaluations = schedule.work_left(steps_done, run.config.run.evaluate_every)
    images = {size: count * counts.get("val", 0) for size, count in evaluations.items()}
    last_size = schedule.image_size(schedule.last_step - 1)
    images[last_size] = images.get(last_size, 0) + counts.get("val", 0) + counts.get("test", 0)
    return {size: count * batch_size for size, count in steps.items()}, images
