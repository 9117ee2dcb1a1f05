"""``mnistm-dist COMMAND`` and ``python -m mnistm_dist COMMAND``: the same as ``python -m mnistm_dist.COMMAND``."""

import importlib
import runpy
import sys

from mnistm_dist import __version__
from mnistm_dist.errors import EXIT_USER_ERROR, did_you_mean, print_error, run_cli

COMMANDS = {
    "pack": "pack images with labels into shards",
    "verify": "check a packed set, or a run",
    "plan": "show which images a training step uses, and their losses",
    "train": "train a model, with any number of processes",
    "evaluate": "evaluate a trained run",
    "predict": "classify image files",
    "export": "write a trained model as one file, or a folder for the Hub",
    "report": "write the report of a run, or compare runs",
    "runs": "list runs, or free what they no longer need",
}


def main() -> int:
    """Run the command that the first argument names, with the other arguments, and return the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    listing = "\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: mnistm-dist COMMAND ...\n\n{listing}\n\nFor the flags of a command: mnistm-dist COMMAND --help")
        print('To complete commands and flags in bash (or zsh, fish):\neval "$(mnistm-dist --completion bash)"')
    elif name == "--version":
        print(f"mnistm-dist {__version__}")
    elif name == "--completion":
        return run_cli(print_completion, arguments)
    elif name in COMMANDS:
        sys.argv = [name, *arguments]
        runpy.run_module(f"mnistm_dist.{name}", run_name="__main__", alter_sys=True)
    else:
        print_error(f"{name}: no such command{did_you_mean(name, COMMANDS)}; choose one of these:", "RANK")
        print(listing, file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def print_completion(arguments: list[str]) -> int:
    """Print the script that completes commands and flags in a shell."""
    from mnistm_dist.cli import completion, write_result

    mains = {name: importlib.import_module(f"mnistm_dist.{name}").main for name in COMMANDS}
    write_result(completion(mains, " ".join(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
