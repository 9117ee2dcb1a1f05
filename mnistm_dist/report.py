"""Write the report of a run, or of several beside one another, as one HTML file.

python -m mnistm_dist.report runs/NAME                           writes runs/NAME/report.html
python -m mnistm_dist.report runs/A runs/B --out compare.html
"""

from __future__ import annotations

import sys
from pathlib import Path

from mnistm_dist.cli import ArgumentParser
from mnistm_dist.errors import run_cli

SEVERAL = Path("report.html")
"""Where the report of several runs goes, unless --out says otherwise."""


def main(argv: list[str]) -> int:
    """Writes the report and returns the exit code: 0, also where parts of a run are missing, which it names."""
    parser = ArgumentParser(prog="python -m mnistm_dist.report", description=__doc__)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="a run folder; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where to write (default: RUN/report.html; of several: {SEVERAL})"
    )
    flags = parser.parse_args(argv)
    # Heavy imports come after the flags, so that --help and a mistyped flag answer at once.
    from mnistm_dist.reporting.console import Console
    from mnistm_dist.reporting.page import write_report

    out = flags.out or (flags.run[0] / "report.html" if len(flags.run) == 1 else SEVERAL)
    missing = write_report(flags.run, out)
    console = Console()
    for line in missing:
        console.warn(line)
    console.line(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
