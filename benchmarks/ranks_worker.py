"""One process of ``bench ranks``: the trainer, in blocks of steps with and without communication of the gradients.

    accelerate launch ... -m benchmarks.ranks_worker FOLDER STEPS

reads ``FOLDER/config.yaml``; rank 0 writes ``FOLDER/result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.loops import TrainerInRounds
from mnistm_dist import config as configuration
from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.fetch import open_shards
from mnistm_dist.data.resident import open_resident
from mnistm_dist.errors import run_cli
from mnistm_dist.training import distributed
from mnistm_dist.training.preemption import die_with_launcher
from mnistm_dist.training.setup import resolve

BLOCKS = 2
"""Blocks of each kind, interleaved, after one that does not count."""


def main(argv: list[str]) -> int:
    """Measures, and returns the exit code. All ranks take part."""
    folder, steps = Path(argv[0]), int(argv[1])
    die_with_launcher()
    config = configuration.load(folder / "config.yaml")
    world = distributed.start(
        config.machine,
        expect_world_size=config.run.expect_world_size,
        collective_timeout=config.run.collective_timeout,
    )
    cache_dir = choose_cache_dir(config.data.cache_dir)
    shards = open_shards(str(config.data.shards), cache_dir=cache_dir)
    config = world.run_on_all_ranks(lambda: resolve(config, world, shards.manifest))
    data = world.run_on_all_ranks(
        lambda: open_resident(shards, "train", cache_dir=cache_dir, device=world.device, workers=world.threads)
    )
    with_gradients, without = [], []
    with TrainerInRounds(config, world, shards, data, folder / "run") as rounds:
        rounds.steps(steps)
        for _ in range(BLOCKS):
            with_gradients.append(rounds.steps(steps))
            if world.size > 1:
                # Around the whole step: no backward in it sends gradients.
                with world.accelerator.no_sync(rounds.trainer.wrapped):
                    without.append(rounds.steps(steps))
    if world.is_main:
        rates = [found.images / found.seconds for found in with_gradients]
        images = sum(found.images for found in with_gradients)
        more = {}
        if without:
            shares = [1 - b.seconds / a.seconds for a, b in zip(with_gradients, without, strict=True)]
            more = {"communication_share": median(shares)}
        told = {"world_size": world.size, "images": images, "seconds": images / median(rates), "more": more}
        (folder / "result.json").write_text(json.dumps(told), encoding="utf-8")
    world.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
