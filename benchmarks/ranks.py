"""``bench ranks``: the trainer at one process and at several, and what of the time goes to communication.

Each round launches each world size anew, as a person does, with the same global batch. Every process runs
`benchmarks.ranks_worker`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

import torch

from benchmarks.launches import last_words
from benchmarks.loops import PlainScript
from benchmarks.rounds import Contender, Measured, Result, choose, interleave, result
from benchmarks.setting import Setting, device_here, open_set, open_train
from mnistm_dist import config as configuration
from mnistm_dist.config import Config
from mnistm_dist.errors import UserError

STEPS = {"cpu": 5, "cuda": 500}
"""Steps of a block, by device."""
LAUNCH_SECONDS = 3600


def bench(setting: Setting, config: Config, *, world_sizes: tuple[int, ...], steps: int | None) -> Result:
    """Rounds of the trainer at each of ``world_sizes``, and of the report's plain script on as many threads as the
    largest of them has.

    ``steps``: of a block (None: `STEPS`). Raises `UserError`, and `RuntimeError` where a launch gave another world
    size than it was asked for.
    """
    shards, device = open_set(setting), device_here()
    # Decoded before the first launch is timed; the launches find it in the cache.
    data = open_train(setting, shards, device)
    steps = steps or STEPS[device.type]
    batch_size = setting.batch_size
    largest = max(world_sizes)
    torch.set_num_threads(largest * setting.threads)
    image_size = config.steps.image_size[0]
    plain = PlainScript(shards.manifest, data, batch_size=batch_size, image_size=image_size)
    plain_name = f"plain script, {largest * setting.threads} threads" if device.type == "cpu" else "plain script"
    names = {size: "1 process" if size == 1 else f"{size} processes" for size in world_sizes}

    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as temporary:
        numbers = count()

        def launched(world_size: int) -> Measured:
            asked = configuration.replace(config, shards=str(shards.root), expect_world_size=world_size)
            return run_worker(asked, Path(temporary) / f"{next(numbers)}", world_size=world_size, steps=steps)

        contenders = [Contender(name=plain_name, measure=partial(plain.steps, steps), against=(plain_name,))]
        for size in world_sizes:
            against = (plain_name,) if size == world_sizes[0] else (names[world_sizes[0]], plain_name)
            contenders.append(Contender(name=names[size], measure=partial(launched, size), against=against))
        chosen = choose(contenders, setting.only)
        # Its first step costs more; the processes have a block of their own for that.
        plain.steps(1)
        with setting.console.progress("ranks", None, "measurements") as bar:
            measured = interleave(chosen, rounds=setting.rounds, warm_up=0, tell=bar)
    return result(
        chosen,
        measured,
        batch_size=setting.batch_size,
        recipe=config.recipe,
        device=device.type,
        backend="nccl" if device.type == "cuda" else "gloo",
        image_size=image_size,
        threads_per_process=setting.threads,
        steps_per_block=steps,
        images_per_second="of the processes: train/images_per_second of their own log",
        communication_share="1 - seconds without the gradients' all-reduce / seconds with it: what of it is not "
        "hidden behind the backward pass, and waiting for the slower process",
    )


def run_worker(config: Config, folder: Path, *, world_size: int, steps: int) -> Measured:
    """Launches the worker at ``world_size`` and gives what its rank 0 wrote.

    Raises `UserError` with its own words where it fails, `RuntimeError` for another world size.
    """
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    worker = ["-m", "benchmarks.ranks_worker", str(folder), str(steps)]
    several = ["--multi_gpu", "--num_processes", str(world_size), "--num_machines", "1", "--main_process_port", "0"]
    launcher = [] if world_size == 1 else ["-m", "accelerate.commands.launch", *several]
    done = subprocess.run(
        [sys.executable, *launcher, *worker], capture_output=True, text=True, timeout=LAUNCH_SECONDS, env=environment()
    )
    found = folder / "result.json"
    if done.returncode or not found.is_file():
        raise UserError(f"ranks: {world_size} processes ended with {done.returncode}: {last_words(done.stderr)}")
    told = json.loads(found.read_bytes())
    if told["world_size"] != world_size:
        raise RuntimeError(f"asked for {world_size} processes, the launcher started {told['world_size']}")
    return Measured(images=told["images"], seconds=told["seconds"], more=told["more"])


def environment() -> dict[str, str]:
    """This process's environment without what a launcher would have left in it."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in left}
