"""Write the report of a run, or a comparison of several runs, as one HTML file.

    python -m mnistm_dist.report runs/NAME          writes RUN/report.html
    python -m mnistm_dist.report runs/A runs/B --out compare.html

Missing parts of a run are named, and the report is written without them.
"""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from mnistm_dist.cli import command
from mnistm_dist.config import LocalFile, LocalPath, OrNone
from mnistm_dist.errors import UserError, run_cli


@command
def main(runs: Annotated[tuple[LocalPath, ...], arg(metavar="RUN")], /, *, out: OrNone[LocalFile] = None) -> int:
    """Write the report.

    Args:
        runs: Run folders; several are compared.
        out: File to write. none: RUN/report.html; for several runs, report.html in the current folder.
    """
    if not runs:
        raise UserError("RUN: at least one run folder is required")
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.html import write_report

    folders = [Path(run) for run in runs]
    out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    missing = write_report(folders, out)
    console = Console()
    for line in missing:
        console.warn(line)
    console.line(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
