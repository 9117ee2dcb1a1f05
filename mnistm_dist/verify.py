"""Says of each file of a packed set whether it is whole, and compares all images with the manifest's sums.

    python -m mnistm_dist.verify shards/official

A line for each file: whole, cut, changed, missing, extra (a tar or index that the manifest does not list) or foreign
(any other file, which does no harm). Exit code 0: the set is whole; 2: it is not.
"""

from __future__ import annotations

import sys

from mnistm_dist.cli import ArgumentParser
from mnistm_dist.errors import UserError, run_cli


def main(argv: list[str]) -> int:
    """Runs the door; returns the exit code. Raises `UserError` where the set is not whole."""
    parser = ArgumentParser(prog="python -m mnistm_dist.verify", description=__doc__)
    parser.add_argument("shards", metavar="SHARDS", help="the folder of a packed set")
    args = parser.parse_args(argv)

    from mnistm_dist.data.packing.verify import inspect
    from mnistm_dist.data.progress import AGAIN
    from mnistm_dist.data.shards import ShardSet
    from mnistm_dist.reporting.console import Console

    shards = ShardSet.open(args.shards)
    manifest = shards.manifest
    console = Console()
    count = sum(split.count for split in manifest.splits.values())
    with console.progress("verify", count, "images") as bar:
        findings = inspect(shards, bar)
    for finding in findings:
        console.line(f"{finding.status:<8} {finding.name}: {finding.detail}")
    damaged = [finding for finding in findings if finding.damaged]
    if damaged:
        first = damaged[0]
        raise UserError(
            f"{shards.root}: {len(damaged)} of {len(findings)} files are damaged, the first is {first.name} "
            f"({first.status}: {first.detail}): {AGAIN}"
        )
    splits = ", ".join(f"{split.count:,} {split.name}" for split in manifest.splits.values())
    console.line(f"{shards.root} is whole: {splits}; lineage {manifest.lineage}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
