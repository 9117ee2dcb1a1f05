"""Makes each mistake for real and writes what the doors say.

PYTHONPATH=.:tests python tests/messages/listing.py > docs/messages.md
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistakes import ALL, CANNOT_BE_SHOWN
from places import Preparation, make

from mnistm_dist.errors import run_cli

HEAD = """# What the doors say to a mistake

Each line was printed by making the mistake, and a test makes them again. The exit code is always 2. Where a file was
wrong, what was wrong with it stands after the command. `PYTHONPATH=.:tests python tests/messages/listing.py >
docs/messages.md` writes this file.

Not in the list, since they need another machine, another process or chance:

"""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """In a folder, with a cache there and nothing of a launcher's or W&B's in the environment."""
    before, names = Path.cwd(), dict(os.environ)
    os.environ.update(MNISTM_DIST_CACHE="cache", WANDB_MODE="disabled", COLUMNS="100")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(names)


def say(command: str) -> tuple[int, str]:
    """The exit code of a door, and its line on stderr; what it said before of its progress is left out."""
    name, *arguments = shlex.split(command, comments=True)
    main = importlib.import_module(f"mnistm_dist.{name}").main
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = run_cli(main, arguments)
        except SystemExit as left:
            code = int(left.code or 0)
    return code, "".join(line for line in told.getvalue().splitlines() if line.startswith("error: "))


def messages(section: dict[str, Preparation | None], template: Path) -> Iterator[tuple[str, int, str]]:
    """Command, exit code and what was printed on stderr, of each mistake, in a fresh copy of a folder."""
    for command, prepare in section.items():
        with tempfile.TemporaryDirectory() as name:
            place = Path(shutil.copytree(template, Path(name, "place")))
            with working_in(place):
                if prepare is not None:
                    prepare()
                yield command, *say(command)


def render(template: Path) -> str:
    """The whole list in Markdown."""
    text = HEAD + "".join(f"- {line}\n" for line in CANNOT_BE_SHOWN)
    for title, section in ALL.items():
        text += f"\n## {title}\n"
        for command, code, told in messages(section, template):
            command, _, cause = command.partition("  #")
            text += (
                f"\n`{command}`{f', {cause.strip()}' if cause else ''}{'' if code == 2 else f' (EXIT CODE {code})'}\n"
            )
            text += f"> {told}\n"
    return text


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, working_in(Path(folder)):
        with contextlib.redirect_stdout(io.StringIO()):
            make(Path(folder))
        listed = render(Path(folder))
    sys.stdout.write(listed)
