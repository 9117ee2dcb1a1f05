"""``bench step``: the trainer against a bare loop, against the report's plain script, and what else could be faster."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks.launches import launch, train_command, whole_run
from benchmarks.loops import BareLoop, Loop, PlainScript, TrainerInRounds
from benchmarks.rounds import Contender, Result, choose, interleave, result
from benchmarks.setting import Setting, has_compiler, open_set, open_train
from mnistm_dist.config import Config
from mnistm_dist.training import distributed
from mnistm_dist.training.hardware import native_precisions
from mnistm_dist.training.setup import resolve

PLAIN, BARE, TRAINER = "plain script", "bare loop", "trainer"
STEPS = {"cpu": 10, "cuda": 500}
"""Steps of a round, by device: seconds on either."""


def bench(setting: Setting, config: Config, *, steps: int | None, compiled: bool, memory: bool) -> Result:
    """Rounds of ``steps`` training steps (None: `STEPS`) of every loop, in this process.

    ``compiled``: torch.compile takes part, where there is a compiler; ``memory``: one whole training is launched for
    the peak memory of a process. Raises `UserError`.
    """
    world = distributed.start(config.machine, expect_world_size=1, collective_timeout=config.run.collective_timeout)
    shards = open_set(setting)
    config = resolve(config, world, shards.manifest)
    data = open_train(setting, shards, world.device)
    channels_last = config.machine.memory_format == "channels_last"
    steps = steps or STEPS[world.device.type]
    loop = partial(BareLoop, config, shards, data, channels_last=channels_last, precision=world.precision)
    other_layout = "contiguous" if channels_last else "channels_last"
    batch_size, image_size = config.steps.batch_size, config.steps.image_size[0]
    plain = PlainScript(shards.manifest, data, batch_size=batch_size, image_size=image_size)

    with (
        tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as temporary,
        TrainerInRounds(config, world, shards, data, Path(temporary) / "run") as trainer,
    ):
        loops: list[tuple[str, Loop, tuple[str, ...]]] = [
            (PLAIN, plain, (PLAIN,)),
            (BARE, loop(), (PLAIN,)),
            (TRAINER, trainer, (BARE, PLAIN)),
            (f"{BARE}, one prepared batch", loop(prepared=True), (BARE,)),
            (f"{BARE}, {other_layout}", loop(channels_last=not channels_last), (BARE,)),
            *(
                (f"{BARE}, {precision}", loop(precision=precision), (BARE,))
                for precision in native_precisions()
                # fp16 needs a loss scale.
                if precision not in (world.precision, "fp16")
            ),
        ]
        compiles = compiled and has_compiler()
        if compiles:
            loops.append((f"{BARE}, compiled", loop(compiled=True), (BARE,)))
        contenders = [Contender(name=n, measure=partial(one.steps, steps), against=a) for n, one, a in loops]
        chosen = choose(contenders, setting.only)
        with setting.console.progress("step", None, "measurements") as bar:
            measured = interleave(chosen, rounds=setting.rounds, warm_up=1, tell=bar)
        peak = peak_memory(setting, config, Path(temporary) / "memory", steps) if memory else None
    world.shutdown()
    return result(
        chosen,
        measured,
        batch_size=setting.batch_size,
        recipe=config.recipe,
        device=world.device.type,
        precision=world.precision,
        memory_format=config.machine.memory_format,
        image_size=image_size,
        steps_per_round=steps,
        compile="measured" if compiles else "not asked for" if not compiled else "there is no C++ compiler here",
        trainer_peak_megabytes=peak,
        training_set_megabytes=round(data.images.nbytes / 1e6, 1),
        memory="of a training of that many steps and its final evaluation, with the pages of the mapped training set "
        "that they touched; a whole epoch touches all of training_set_megabytes, once per node",
    )


def peak_memory(setting: Setting, config: Config, run_dir: Path, steps: int) -> float:
    """The largest resident memory of ``python -m mnistm_dist.train``, steps and final evaluation, in megabytes."""
    flags = ["--recipe", config.recipe, "--batch-size", config.steps.batch_size, "--threads", setting.threads]
    sizes = ",".join(map(str, config.steps.image_size))
    command = train_command(setting, run_dir, *flags, "--image-size", sizes, "--max-steps", steps)
    return round(launch(command, run_dir, whole_run, every=0.2).peak_megabytes, 1)
