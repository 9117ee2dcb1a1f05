"""``report.html``: everything that run folders tell, on one page that needs nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from mnistm_dist import __version__
from mnistm_dist.errors import UserError
from mnistm_dist.reporting import markup, page_run, page_runs
from mnistm_dist.reporting.runs import read_runs


def write_report(run_dirs: Sequence[Path], out: Path) -> list[str]:
    """Writes the report of one run, or of several beside one another; whole or not at all.

    Args:
        run_dirs: run folders.
        out: the file to write.

    Returns:
        What was missing, a line each; the page says it too.

    Raises:
        UserError: a folder is no run, or `out` cannot be written.
    """
    runs = read_runs(run_dirs, __version__)
    foot = f"Written by mnistm_dist {__version__}. This page is one file and loads nothing."
    if len(runs) == 1:
        page = markup.document(runs[0].name, page_run.top(runs[0]), page_run.sections(runs[0]), foot)
    else:
        title = " and ".join(run.name for run in runs[:2]) + (f" and {len(runs) - 2} more" if len(runs) > 2 else "")
        page = markup.document(title, page_runs.top(runs), page_runs.sections(runs), foot)
    temporary = out.with_name(f".{out.name}.part")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); make room there, or name another place with --out"
        ) from None
    return [f"{run.name}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing]
