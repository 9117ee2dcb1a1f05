"""Which images a training step sees, on which rank, without training.

    python -m mnistm_dist.plan --run runs/NAME --step 1234                       the step of a run
    python -m mnistm_dist.plan --shards shards/official --step 0 --world-size 4  of a run that is not begun yet
    python -m mnistm_dist.plan --run runs/NAME --step 1234 --save batch.png      the images, as the model gets them

--json prints {"step": S, "epoch": E, "ranks": [[key, ...], ...]}, E being the epoch of the step's first position.
The global batch of a step is the same at every world size.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mnistm_dist import config as configuration
from mnistm_dist.cli import ArgumentParser, integer, write_result
from mnistm_dist.config import Config
from mnistm_dist.errors import UserError, run_cli

if TYPE_CHECKING:
    import numpy as np

    from mnistm_dist.data.shards import ShardSet

FIGURES = (".png", ".svg", ".pdf")
"""What --save can write."""


def main(argv: list[str]) -> int:
    """Runs the door; returns the exit code. Raises `UserError`."""
    parser = create_parser()
    args = parser.parse_args(argv)
    flags = {"batch_size": args.batch_size, "seed": args.seed, "order": args.order}
    given = {name: value for name, value in flags.items() if value is not None}
    config = settings(args.run, args.shards, given, parser.error)

    import numpy as np

    from mnistm_dist.data.cache import choose_cache_dir
    from mnistm_dist.data.fetch import open_shards
    from mnistm_dist.data.order import choose_reading, create_order, step_positions, steps_for

    shards = open_shards(str(config.data.shards), cache_dir=choose_cache_dir(config.data.cache_dir))
    batch_size, world_size = config.steps.batch_size, args.world_size
    order_name, data, streams = choose_reading(
        config.data, shards.manifest, batch_size=batch_size, world_size=world_size
    )
    config = configuration.replace(config, order=order_name, reader=data, shuffle_streams=streams)
    steps = steps_for(config.steps.epochs, size=shards.split("train").count, batch_size=batch_size)
    if args.run and args.step >= steps:
        raise UserError(f"--step {args.step}: {args.run} has {steps:,} steps; use 0 to {steps - 1}")
    order = create_order(config.data, config.steps, shards.manifest)
    shares = [
        step_positions(args.step, batch_size=batch_size, world_size=world_size, rank=rank) for rank in range(world_size)
    ]
    ids = [order.ids(share) for share in shares]
    ranks = [shards.keys("train", of_rank) for of_rank in ids]
    epoch = int(order.epoch(shares[0][:1])[0])
    title = f"step {args.step} of epoch {epoch}: {batch_size} images, {order_name} order, seed {config.steps.seed}"
    if args.save:
        save_images(args.save, config, shards, np.concatenate(shares), np.concatenate(ids), title)
    if args.json:
        write_result(json.dumps({"step": args.step, "epoch": epoch, "ranks": ranks}) + "\n")
        return 0
    lines = [title]
    for rank, keys in enumerate(ranks):
        lines.append(textwrap.fill(" ".join(keys), width=80, initial_indent=f"rank {rank}: ", subsequent_indent="    "))
    if args.save:
        lines.append(f"images: {args.save}")
    write_result("\n".join(lines) + "\n")
    return 0


def create_parser() -> ArgumentParser:
    """The flags."""
    parser = ArgumentParser(prog="python -m mnistm_dist.plan", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="RUN", help="a run folder: its shards, order, batch and seed")
    which.add_argument("--shards", metavar="DIR|URL", help="a packed set")
    parser.add_argument(
        "--step", type=integer(0, 2**40), required=True, metavar="S", help="counted from 0, as its epoch is"
    )
    parser.add_argument("--world-size", type=integer(1, 2**20), default=1, metavar="W", help="default: 1")
    parser.add_argument(
        "--batch-size", type=integer(1, 2**20), metavar="B", help="with --shards: images per step (fast's)"
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), metavar="N", help="with --shards: the run's seed")
    parser.add_argument("--order", choices=("auto", "full", "windowed"), help="with --shards: the training order")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", type=figure_path, metavar="FILE.png", help="the images as the model gets them")
    return parser


def settings(run: str | None, shards: str | None, given: dict[str, Any], refuse: Callable[[str], NoReturn]) -> Config:
    """The configuration of a run, or of one that the default recipe would begin with these shards and fields."""
    if run is None:
        recipe = configuration.DEFAULT_RECIPE
        return configuration.build(recipe, {**configuration.read_recipe(recipe), "shards": shards, **given})
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        refuse(f"{flags}: a run has its own; leave it out, or give --shards instead of --run")
    if not Path(run).is_dir():
        raise UserError(f"run {run}: no such folder; name the folder that training wrote, or --shards")
    return configuration.load(Path(run) / "config.yaml")


def save_images(
    path: Path, config: Config, shards: ShardSet, positions: np.ndarray, ids: np.ndarray, title: str
) -> None:
    """Writes a figure of the samples ``ids`` at training ``positions``, augmented, with key and label under each.

    Raises `UserError` for a damaged shard and a place that cannot be written.
    """
    import numpy as np
    import torch

    from mnistm_dist.data.image_io import decode_png
    from mnistm_dist.data.order import part_of_run
    from mnistm_dist.data.transforms import Augment, Preprocess
    from mnistm_dist.files import explain_os_errors
    from mnistm_dist.reporting.figures import batch_grid
    from mnistm_dist.reporting.style import save

    split, schedule = shards.split("train"), config.steps
    keys, labels = shards.keys("train", ids), shards.labels("train")[ids]
    pngs = zip(shards.read("train", ids), keys, strict=True)
    images = np.stack([decode_png(png, f"{shards.root}: {key}.png", shards.manifest.image_size) for png, key in pngs])
    sizes = schedule.image_size
    epoch = int(positions[0]) // split.count
    size = sizes[part_of_run(epoch, epochs=schedule.epochs, parts=len(sizes))]
    floats = Augment(config.augment, Preprocess(split.mean, split.std), schedule.seed)(
        torch.from_numpy(images), positions, size
    )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (split.mean, split.std))
    seen = (255 * (floats * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    captions = [f"{key}\n{shards.manifest.classes[label]}" for key, label in zip(keys, labels, strict=True)]
    with explain_os_errors(path):
        save(batch_grid(list(seen), captions, title), path)


def figure_path(text: str) -> Path:
    """An argparse type: a file that a figure can be written to."""
    path = Path(text)
    if path.suffix not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; use a file name that ends in {', '.join(FIGURES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}; make it first")
    return path


if __name__ == "__main__":
    sys.exit(run_cli(main))
