"""Show which images a training step uses, on which rank, and their losses.

    python -m mnistm_dist.plan runs/NAME --step 1234
    python -m mnistm_dist.plan runs/NAME --step 1234 --save batch.png
    python -m mnistm_dist.plan runs/NAME --step 1234 --losses
    python -m mnistm_dist.plan --shards shards/official --step 0 --world-size 4

The second one draws the images as the model receives them. The third trains
from the last checkpoint before the step, in a temporary folder, up to it and
gives the loss of each of its images, the largest first: which made a spike. On
the machine and the number of processes (torchrun) of the run, the loss of the
step is that of the log, to the last bit. The fourth is for a run of the default
recipe that has not started.

--json prints {"step": S, "epoch": E, "ranks": [[key, ...], ...]}; E is the
epoch of the step's first image. Both count from 0, as --step does; the text and
log.jsonl count from 1. --losses adds "images": [{"key", "label", "loss"}, ...],
"mean", the loss of the step as training computes it, and "logged", null if the
log does not have it. The global batch of a step does not depend on the world
size, except in the windowed order of a run that has not started: its number of
streams does.
"""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.config import (
    DEFAULT_RECIPE,
    Config,
    LocalPath,
    OrNone,
    ShardsPath,
    build,
    checked,
    load,
    read_recipe,
    replace,
)
from mnistm_dist.errors import UserError, is_first, run_cli


@checked
@dataclass(frozen=True, kw_only=True)
class NewRun:
    """Instead of RUN: a run that has not started. none: the value of the default recipe.

    Args:
        shards: Packed set: a folder or a URL. With RUN: another copy of its set.
        batch_size: Images per step, over all processes.
        seed: Seed of the order and of augmentation.
        order: Training order.
    """

    shards: OrNone[ShardsPath] = None
    batch_size: OrNone[PositiveInt] = None
    seed: OrNone[NonNegativeInt] = None
    order: OrNone[Literal["auto", "full", "windowed"]] = None


@command
def main(
    run: Annotated[LocalPath | None, arg(metavar="RUN")] = None,
    /,
    *,
    step: Annotated[int, Field(ge=0, le=2**40)],
    world_size: PositiveInt = 1,
    json_output: Annotated[bool, arg(name="json")] = False,
    save: Annotated[Annotated[LocalPath, Field(pattern=r"\.(png|svg|pdf)$")] | None, arg(metavar="FILE.png")] = None,
    losses: bool = False,
    new_run: NewRun,
) -> int:
    """Show the images of a step.

    Args:
        run: A run folder: its shards, order, batch size and seed.
        step: The step, counted from 0.
        world_size: Number of processes.
        json_output: Print one JSON object.
        save: Draw the images, as the model receives them, to this file.
        losses: Train RUN again up to the step, and show the loss of each image.
    """
    config = choose_config(run, new_run)
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    import numpy as np

    from mnistm_dist.data.cache import choose_cache_dir
    from mnistm_dist.data.fetch import open_shards
    from mnistm_dist.data.order import choose_micro_batch, choose_reading, create_order, step_positions
    from mnistm_dist.training.schedule import Schedule

    shards = open_shards(str(config.data.shards), cache_dir=choose_cache_dir(config.data.cache_dir))
    batch_size = config.steps.batch_size
    order, reader, streams = choose_reading(config.data, shards.manifest, batch_size=batch_size, world_size=world_size)
    config = replace(config, order=order, reader=reader, shuffle_streams=streams)
    schedule = Schedule(config=config, train_size=shards.split("train").count)
    if run is not None and step >= schedule.total_steps:
        raise UserError(f"--step {step}: {run} has {schedule.total_steps:,} steps; use 0 to {schedule.total_steps - 1}")
    micro_batch = choose_micro_batch(config.steps, world_size=world_size, reproducible=config.machine.reproducible)
    sizes = {"batch_size": batch_size, "micro_batch": micro_batch, "world_size": world_size}
    shares = [step_positions(step, **sizes, rank=rank) for rank in range(world_size)]
    positions = np.concatenate(shares)
    ids = create_order(config.data, config.steps, shards.manifest).ids(positions)
    keys = shards.keys("train", ids)
    ranks = [keys[share[0] - positions[0] : share[-1] - positions[0] + 1] for share in shares]
    epoch = schedule.epoch(step)
    # As the console, the log and the report count them: from 1.
    title = f"step {step + 1:,} of {schedule.total_steps:,} (--step {step}), epoch {epoch + 1}: {batch_size} images"
    result = {"step": step, "epoch": epoch, "ranks": ranks}
    texts = [f"rank {rank}: {' '.join(of_rank)}" for rank, of_rank in enumerate(ranks)]
    names = [shards.manifest.classes[label] for label in shards.labels("train")[ids]]
    captions = [f"{key}\n{name}" for key, name in zip(keys, names, strict=True)]
    if losses:
        if run is None:
            raise UserError("--losses: trains a run again; name a run folder instead of --shards")
        from mnistm_dist.replay import losses_of_step

        of_images, mean, logged = losses_of_step(Path(run), config, step)
        if not is_first():
            return 0
        # The largest first, and NaN before all.
        largest = np.argsort(-np.nan_to_num(of_images, nan=np.inf), kind="stable")
        positions, ids = positions[largest], ids[largest]
        images = [{"key": keys[i], "label": names[i], "loss": of_images[i].item()} for i in largest]
        result |= {"images": images, "mean": mean, "logged": logged}
        captions = ["{key}\n{label}\nloss {loss:.4f}".format_map(image) for image in images]
        texts = [f"loss {mean!r}, in the log {'not found' if logged is None else repr(logged)}"]
        texts += ["{loss:10.4f}  label {label}  {key}".format_map(image) for image in images]
    if save:
        from mnistm_dist.results import draw_batch

        draw_batch(Path(save), config, shards, positions, ids, schedule.image_size(step), title, captions)
    if json_output:
        write_result(json.dumps(result) + "\n")
        return 0
    lines = [
        textwrap.fill(text, width=80, subsequent_indent="    ")
        for text in (f"{title}, {order} order, seed {config.steps.seed}", *texts)
    ]
    write_result("\n".join([*lines, *([f"images: {save}"] if save else [])]) + "\n")
    return 0


def choose_config(run: str | None, new_run: NewRun) -> Config:
    """Return the configuration of a run, or of a new one. Raises `UserError` if not exactly one of them is named."""
    given = {name: value for name, value in vars(new_run).items() if value is not None}
    if run is None and "shards" not in given:
        raise UserError("plan: name a run folder, or a packed set with --shards")
    if run is None:
        return build(DEFAULT_RECIPE, read_recipe(DEFAULT_RECIPE) | given)
    if own := [f"--{name.replace('_', '-')}" for name in given if name != "shards"]:
        raise UserError(f"{', '.join(own)}: {run} has its own; leave this out, or name --shards instead of a run")
    config = replace(load(Path(run) / "config.yaml"), **given)
    if config.data.shards is None:
        raise UserError(f"{run}: its config.yaml names no packed set; name it with --shards")
    return config


if __name__ == "__main__":
    sys.exit(run_cli(main))
