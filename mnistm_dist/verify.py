"""Check a packed set, or a run: its files, and steps of it by training again.

    python -m mnistm_dist.verify shards/official
    python -m mnistm_dist.verify runs/NAME
    python -m mnistm_dist.verify runs/NAME --replay random
    torchrun --nproc-per-node 2 -m mnistm_dist.verify runs/NAME --replay 0:640

Of a packed set, each file and all images are compared with the manifest: one
line if it is intact (exit code 0), otherwise one for each file that is
truncated, changed, missing or extra (exit code 2).

Of a run, checkpoints, configuration, log, summary and predictions are compared
with one another and with the packed set. Then the steps between two kept
checkpoints are trained again in a temporary folder, and the results evaluated
again. With the same kind of CPU or GPU, torch, threads and number of processes
(any number for --reproducible runs; GPUs with --deterministic), losses, weights
and predictions must be the same to the last bit; elsewhere, mean losses must
agree within 5 %. One line for each finding; exit code 1 if there is any. RUN is
not written to.

A replay proves that the later checkpoint follows from the earlier one. Hashes
show damage, not origin. --replay 0:LAST proves all steps from the initial
weights; --keep-checkpoints all, in training, makes the stretches short.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt
from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalPath, OrNone, ShardsPath, load, replace
from mnistm_dist.errors import UserError, errors_once_per_node, near_path, run_cli


@command
def main(
    path: Annotated[LocalPath, arg(metavar="SHARDS|RUN")],
    /,
    *,
    shards: OrNone[ShardsPath] = None,
    replay: Annotated[str, Field(pattern=r"^(last|random|none|(\d+:)?\d+)$")] = "last",
    seed: OrNone[NonNegativeInt] = None,
) -> int:
    """Check a packed set or a run. Raises `UserError` for a set that is damaged.

    Args:
        path: folder of a packed set, or a run folder.
        shards: Of a run: another copy of its packed set. none: the one that it was trained on.
        replay: Steps of a run to train again: last or random, from one checkpoint to the next; STEP:STEP, between
            two that are named (0: the initial weights); STEP, up to this one; none.
        seed: Seed of the random choice. none: drawn, and told.
    """
    from mnistm_dist.training.run_dir import CONFIG_NAME, LOG_NAME

    folder = Path(path)
    if not any((folder / name).exists() for name in (CONFIG_NAME, LOG_NAME, "checkpoints")):
        if not (folder / "manifest.json").exists():
            near = near_path(folder)
            raise UserError(f"{folder}: neither a packed set (manifest.json) nor a run (config.yaml){near}; name one")
        return verify_set(folder)
    with errors_once_per_node():
        config = load(folder / CONFIG_NAME)
    from mnistm_dist.verify_run import verify_run

    return verify_run(folder, replace(config, shards=shards) if shards else config, replay, seed)


def verify_set(folder: Path) -> int:
    """Check a packed set. Raises `UserError` if it is damaged."""
    from mnistm_dist.data.manifest import REPAIR
    from mnistm_dist.data.packing.verify import inspect
    from mnistm_dist.data.shards import OK, ShardSet
    from mnistm_dist.reporting.console import Console

    packed, console = ShardSet.open(folder), Console()
    manifest = packed.manifest
    with console.progress("verify", sum(split.count for split in manifest.splits.values())) as bar:
        findings = inspect(packed, bar)
    damaged = [finding for finding in findings if finding.status != OK]
    for finding in damaged:
        console.line(f"{finding.status:<9} {finding.name}: {finding.detail}")
    if damaged:
        raise UserError(
            f"{packed.root}: {len(damaged)} of {len(findings)} files are damaged, the first is {damaged[0].name} "
            f"({damaged[0].status}: {damaged[0].detail}); {REPAIR}"
        )
    splits = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    console.line(f"{packed.root} is intact: {splits}; lineage {manifest.lineage}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
