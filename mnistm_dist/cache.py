"""List or clear the cache: decoded splits, and files fetched from servers.

    python -m mnistm_dist.cache list                 entries, their size, and when they were last used
    python -m mnistm_dist.cache clear                remove all entries
    python -m mnistm_dist.cache clear 1f0c22d9       remove the entries whose name begins with this

Clearing only costs time: the next launch decodes or fetches again. Running processes keep what they have opened.
"""

from __future__ import annotations

import json
import sys
import time

from mnistm_dist.cli import ArgumentParser, write_result
from mnistm_dist.errors import UserError, escape_control, run_cli


def main(argv: list[str]) -> int:
    """Run the command and return its exit code. Raises `UserError`."""
    parser = ArgumentParser(prog="python -m mnistm_dist.cache", description=__doc__)
    parser.add_argument("action", choices=("list", "clear"), metavar="list|clear")
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help="names of entries, or how they begin (default: all)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="default: as in training")
    parser.add_argument("--json", action="store_true", help="list: print a JSON array")
    args = parser.parse_args(argv)

    from mnistm_dist.data.cache import choose_cache_dir, clear, entries

    cache_dir = choose_cache_dir(args.cache_dir)
    chosen = entries(cache_dir)
    for name in args.names:
        if not any(entry.path.name.startswith(name) for entry in chosen):
            raise UserError(f"{name}: no such entry in {cache_dir}; python -m mnistm_dist.cache list shows all")
    if args.names:
        chosen = [entry for entry in chosen if entry.path.name.startswith(tuple(args.names))]

    if args.action == "list" and args.json:
        rows = [{"name": e.path.name, "kind": e.kind, "bytes": e.size, "used": e.used, **e.about} for e in chosen]
        write_result(json.dumps(rows) + "\n")
        return 0
    if args.action == "list":
        lines = [f"{cache_dir}: {len(chosen)} entries, {sum(entry.size for entry in chosen) / 1e6:,.1f} MB"]
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
