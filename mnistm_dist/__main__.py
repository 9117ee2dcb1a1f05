"""``mnistm-dist COMMAND`` and ``python -m mnistm_dist COMMAND``: the same as ``python -m mnistm_dist.COMMAND``."""

from __future__ import annotations

import runpy
import sys

from mnistm_dist import __version__
from mnistm_dist.errors import UserError, did_you_mean, run_cli

COMMANDS = {
    "pack": "pack images with labels into shards",
    "verify": "check the files of a packed set",
    "plan": "show which images a training step uses",
    "train": "train a model, with any number of processes",
    "evaluate": "evaluate a trained run",
    "predict": "classify image files",
    "export": "write a trained model as one file",
    "report": "write the report of a run, or compare runs",
    "cache": "list or clear the cache",
}


def main() -> int:
    """Run the command that the first argument names, with the others, and return the exit code."""
    return run_cli(run)


def run(argv: list[str]) -> int:
    """Run a command. Raises `UserError`, which lists the commands, if there is none of that name."""
    name, *arguments = argv or ["--help"]
    lines = "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: mnistm-dist COMMAND ...\n\n{lines}\n\nFor the flags of a command: mnistm-dist COMMAND --help")
    elif name == "--version":
        print(f"mnistm-dist {__version__}")
    elif name not in COMMANDS:
        print(lines, file=sys.stderr)
        raise UserError(f"{name}: no such command{did_you_mean(name, COMMANDS)}; choose one of those above")
    else:
        sys.argv = [name, *arguments]
        runpy.run_module(f"mnistm_dist.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
