"""List the runs in a folder, or free what they no longer need.

    python -m mnistm_dist.runs list
    python -m mnistm_dist.runs list --filter finished --sort val_accuracy
    python -m mnistm_dist.runs prune runs/old --yes

--json prints [{"name": ..., "recipe": ..., "state": ..., "step": S,
"val_accuracy": A, "seconds": T}, ...]. prune removes checkpoints of finished
runs, but the last one and that of the result, and run folders without a
checkpoint that nobody trains in. Without --yes it says what it would free. A
run is killed if its state is running and no live process holds its folder.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.errors import UserError, escape_control, near_path, run_cli
from mnistm_dist.files import FolderBusy, explain_os_errors

COLUMNS = ("name", "recipe", "state", "step", "val_accuracy", "seconds")


@command
def main(
    action: Annotated[Literal["list", "prune"], arg(metavar="list|prune")],
    folder: Annotated[Path, arg(metavar="FOLDER")] = Path("runs"),
    /,
    *,
    sort: Literal["name", "recipe", "state", "step", "val_accuracy", "seconds"] = "name",
    filter: str = "",
    json_output: Annotated[bool, arg(name="json")] = False,
    yes: bool = False,
) -> int:
    """List or prune runs.

    Args:
        action: What to do.
        folder: Folder of run folders, at any depth.
        sort: Column to sort a list by; numbers from the largest.
        filter: Only runs with this text in their name, recipe or state.
        json_output: Print the list as JSON.
        yes: Remove what prune names.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{near_path(folder)}; name one that holds run folders")
    from mnistm_dist.reporting.runs import overview
    from mnistm_dist.training.run_dir import CONFIG_NAME, LOG_NAME

    # A recipe, an exported model and other projects have a config.yaml, too.
    paths = sorted(path.parent for path in folder.rglob(CONFIG_NAME) if (path.parent / LOG_NAME).is_file())
    runs = [(path, {"name": str(path.relative_to(folder)), **overview(path)}) for path in paths]
    runs = [run for run in runs if any(filter in str(run[1][name]) for name in ("name", "recipe", "state"))]
    if action == "prune":
        return prune(runs, remove=yes)
    rows = [row for _, row in runs]
    is_number = sort in ("step", "val_accuracy", "seconds")
    rows.sort(key=lambda row: -(row[sort] or 0) if is_number else str(row[sort]))
    write_result(json.dumps(rows, indent=1) + "\n" if json_output else format_table(rows))
    return 0


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of text."""
    from mnistm_dist.reporting.describe import duration, percent

    forms: dict[str, Callable[[Any], str]] = {"step": "{:,}".format, "val_accuracy": percent, "seconds": duration}
    texts = [[name.replace("_", " ") for name in COLUMNS]]
    for row in rows:
        cells = ((forms.get(name, str), row[name]) for name in COLUMNS)
        texts.append(["" if value is None else escape_control(form(value)) for form, value in cells])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    aligned = (
        "  ".join(
            f"{cell:{'>' if name in forms else '<'}{width}}"
            for name, cell, width in zip(COLUMNS, line, widths, strict=True)
        )
        for line in texts
    )
    return "".join(f"{line.rstrip()}\n" for line in aligned)


def prune(runs: list[tuple[Path, dict[str, Any]]], *, remove: bool) -> int:
    """Print what can be removed of the runs and how much it frees; remove it if ``remove``. Return the exit code."""
    from mnistm_dist.run_lock import RunLock
    from mnistm_dist.training.checkpoint import checkpoint_dirs
    from mnistm_dist.training.run_dir import CONFIG_NAME, read_summary

    freed = 0
    for path, row in runs:
        try:
            with RunLock(path):
                saved, result = checkpoint_dirs(path), read_summary(path).get("checkpoint", {}).get("step")
                # A folder that holds other runs stays.
                doomed = [path] if not saved and len(list(path.rglob(CONFIG_NAME))) == 1 else []
                if row["state"] == "finished":
                    doomed = [one for one in saved[:-1] if int(one.name.removeprefix("step-")) != result]
                for target in doomed:
                    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
                    freed += size
                    write_result(f"{size / 1e6:9.1f} MB  {escape_control(str(target))}\n")
                    with explain_os_errors(target):
                        shutil.rmtree(target) if remove else None
        except FolderBusy:
            continue
    write_result(f"{freed / 1e6:9.1f} MB  {'freed' if remove else 'would be freed: run again with --yes'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
