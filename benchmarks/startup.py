"""``bench startup``: from the launch of a training to the end of its first step, by the first row of its log.

The first launch finds an empty cache, hashes and decodes; the second one finds what it needs. Each is stopped as a
scheduler would stop it, by SIGTERM, once its first step is done.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path

from benchmarks.launches import has_trained, launch, train_command
from benchmarks.rounds import Contender, Measured, Result, choose, interleave, result
from benchmarks.setting import Setting, open_set

FIRST, SECOND = "first launch", "second launch"


def bench(setting: Setting, *, recipe: str) -> Result:
    """Rounds of a first and a second launch of ``recipe``. Raises `UserError`."""
    shards = open_set(setting)
    images = sum(split.count for split in shards.manifest.splits.values())

    with tempfile.TemporaryDirectory(prefix="mnistm_dist-bench-") as temporary:
        numbers = count()
        # Beside the real cache: on its disk.
        setting.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=setting.cache_dir) as cache:
            own = replace(setting, shards=str(shards.root), cache_dir=Path(cache) / "cache")

            def to_first_step(empty: bool) -> Measured:
                if empty:
                    shutil.rmtree(own.cache_dir, ignore_errors=True)
                run_dir = Path(temporary) / f"{next(numbers)}"
                flags = ["--recipe", recipe, "--batch-size", setting.batch_size, "--log-every", 1]
                command = train_command(own, run_dir, *flags, "--threads", setting.threads)
                found = launch(command, run_dir, has_trained, every=0.05)
                at = {
                    kind: next(row["time"] for row in found.rows if row["kind"] == kind) for kind in ("start", "train")
                }
                more = {"seconds_to_the_run_folder": at["start"] - found.launched}
                more["peak_megabytes"] = found.peak_megabytes
                seconds = at["train"] - found.launched
                return Measured(images=images, seconds=seconds, more={"seconds_to_the_first_step": seconds, **more})

            contenders = [
                Contender(name=FIRST, measure=lambda: to_first_step(True), against=(FIRST,)),
                Contender(name=SECOND, measure=lambda: to_first_step(False), against=(FIRST,)),
            ]
            chosen = choose(contenders, setting.only)
            if [contender.name for contender in chosen] == [SECOND]:
                to_first_step(True)
            with setting.console.progress("startup", None, "launches") as bar:
                measured = interleave(chosen, rounds=setting.rounds, warm_up=0, tell=bar)
    return result(
        chosen,
        measured,
        batch_size=setting.batch_size,
        recipe=recipe,
        images_per_second="images of all splits over the seconds from the launch to the end of the first step",
        files="in the page cache",
    )
