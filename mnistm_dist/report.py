"""Write the report of a run, or the comparison of several, as one HTML file.

python -m mnistm_dist.report runs/NAME                           writes runs/NAME/report.html
python -m mnistm_dist.report runs/A runs/B --out compare.html
"""

from __future__ import annotations

import sys
from pathlib import Path

from mnistm_dist.cli import ArgumentParser
from mnistm_dist.errors import run_cli

SEVERAL = Path("report.html")
"""Default path of the comparison of several runs."""


def main(argv: list[str]) -> int:
    """Write the report and return the exit code: 0 even if parts of a run are missing, which are named."""
    parser = ArgumentParser(prog="python -m mnistm_dist.report", description=__doc__)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="a run folder; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where to write (default: RUN/report.html; of several: {SEVERAL})"
    )
    flags = parser.parse_args(argv)
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.html import write_report

    out = flags.out or (flags.run[0] / "report.html" if len(flags.run) == 1 else SEVERAL)
    missing = write_report(flags.run, out)
    console = Console()
    for line in missing:
        console.warn(line)
    console.line(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
