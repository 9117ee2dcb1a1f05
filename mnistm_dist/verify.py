"""Check each file of a packed set, and all images against the manifest's sums.

    python -m mnistm_dist.verify shards/official

Prints one line if the set is intact (exit code 0), otherwise a line for each
file that is truncated, changed, missing or extra: a tar or index that the
manifest does not list (exit code 2).
"""

import sys
from typing import Annotated

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalPath
from mnistm_dist.errors import UserError, run_cli


@command
def main(shards: Annotated[LocalPath, arg(metavar="SHARDS")], /) -> int:
    """Check a packed set. Raises `UserError` if it is damaged.

    Args:
        shards: folder of a packed set.
    """
    from mnistm_dist.data.manifest import REPAIR
    from mnistm_dist.data.packing.verify import inspect
    from mnistm_dist.data.shards import OK, ShardSet
    from mnistm_dist.reporting.console import Console

    packed = ShardSet.open(shards)
    manifest = packed.manifest
    console = Console()
    count = sum(split.count for split in manifest.splits.values())
    with console.progress("verify", count, "images") as bar:
        findings = inspect(packed, bar)
    damaged = [finding for finding in findings if finding.status != OK]
    for finding in damaged:
        console.line(f"{finding.status:<9} {finding.name}: {finding.detail}")
    if damaged:
        first = damaged[0]
        raise UserError(
            f"{packed.root}: {len(damaged)} of {len(findings)} files are damaged, the first is {first.name} "
            f"({first.status}: {first.detail}); {REPAIR}"
        )
    splits = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    console.line(f"{packed.root} is intact: {splits}; lineage {manifest.lineage}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
