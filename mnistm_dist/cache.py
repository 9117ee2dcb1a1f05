"""List or clear the cache: decoded splits, and files fetched from servers.

    python -m mnistm_dist.cache list            entries, their size and last use
    python -m mnistm_dist.cache clear           remove all entries
    python -m mnistm_dist.cache clear 1f0c22d9  those whose name begins so

Clearing only costs time: the next launch decodes or fetches again. Running
processes keep what they have opened.
"""

import json
import sys
import time
from typing import Annotated, Literal

from tyro.conf import arg

from mnistm_dist.cli import command, write_result
from mnistm_dist.config import OrNone
from mnistm_dist.errors import UserError, escape_control, run_cli


@command
def main(
    action: Literal["list", "clear"],
    names: Annotated[tuple[str, ...], arg(metavar="NAME")] = (),
    /,
    *,
    json_output: Annotated[bool, arg(name="json")] = False,
    cache_dir: OrNone[str] = None,
) -> int:
    """List or clear the cache.

    Args:
        action: What to do.
        names: Entries, or the beginnings of their names. The default is all.
        json_output: list: print a JSON array.
        cache_dir: Folder of the cache. none: the same as in training.
    """
    from mnistm_dist.data.cache import choose_cache_dir, clear, entries

    folder = choose_cache_dir(cache_dir)
    present = entries(folder)
    for name in names:
        if not any(entry.path.name.startswith(name) for entry in present):
            raise UserError(f"{name}: no such entry in {folder}; python -m mnistm_dist.cache list shows all")
    chosen = [e for e in present if not names or e.path.name.startswith(names)]

    if action == "list" and json_output:
        rows = [{"name": e.path.name, "kind": e.kind, "bytes": e.size, "used": e.used, **e.about} for e in chosen]
        write_result(json.dumps(rows) + "\n")
        return 0
    if action == "list":
        lines = [f"{folder}: {len(chosen)} entries, {sum(entry.size for entry in chosen) / 1e6:,.1f} MB"]
        for e in chosen:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used))
            source = escape_control(e.about.get("source", ""))
            lines.append(f"{e.path.name}  {e.kind:<9}  {e.size / 1e6:10,.1f} MB  {used}  {source}")
        write_result("\n".join(lines) + "\n")
        return 0
    removed = [entry for entry in chosen if clear(entry)]
    print(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e6:,.1f} MB")
    for entry in chosen:
        if entry not in removed:
            raise UserError(f"{entry.path}: a process is writing it; try again when it is done")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
