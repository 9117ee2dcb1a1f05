"""The command line of ``mnistm_dist.train``: a flag for every field; and what of it a resume may change."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from mnistm_dist import config as configuration
from mnistm_dist.config import (
    DEFAULT_RECIPE,
    MAY_CHANGE_AT_RESUME,
    RECIPES,
    SECTIONS,
    Config,
    build,
    field_types,
    fields_of,
    parse_value,
    read_recipe,
)
from mnistm_dist.errors import UserError, errors_once_per_node, print_error


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for, before any default."""

    recipe: str | None
    given: dict[str, Any]
    """Field name -> value, for every field that the named recipe or a flag sets."""
    flags: frozenset[str]
    """The fields that a flag set."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a mistake told in one line: ``error: ...``, exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see --help)")
        raise SystemExit(2)


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: whole numbers of a range."""

    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else low - 1
        if not low <= value <= high:
            bound = f"from {low} to {high}" if high < 2**63 - 1 else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not accepted; use a whole number {bound}")
        return value

    return parse


def train_parser() -> ArgumentParser:
    """The flags of ``mnistm_dist.train``: one for every field."""
    parser = ArgumentParser(
        prog="python -m mnistm_dist.train",
        description="Train the pruned ResNet18 on packed MNIST-M shards.\n\n"
        "    python -m mnistm_dist.train --shards shards/official             one GPU, or the CPU\n"
        "    accelerate launch --config_file accelerate_config.yaml --num_processes 8 -m mnistm_dist.train\n"
        "    python -m mnistm_dist.train --resume runs/NAME                   goes on where it was\n\n"
        f"A flag beats the recipe, which is {DEFAULT_RECIPE} where none is named; the default of a field holds\n"
        "where neither sets it.",
        epilog="A value of auto is resolved at the first launch and written to RUN/config.yaml.\n"
        "The result is in RUN, by default runs/RECIPE-TIME: report.html, summary.json.\n\n"
        "Exit codes: 0 finished; 2 a mistake, told in one line; 75 saved and left after a\n"
        "signal, --resume RUN goes on; 130 a second Ctrl-C; 1 anything else, and whatever\n"
        "a launcher says in place of these.",
    )
    recipe = read_recipe(DEFAULT_RECIPE)
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"one of {', '.join(RECIPES)}, or a YAML file (default: {DEFAULT_RECIPE})"
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(f"{section}: {str(cls.__doc__).rstrip('.')}")
        docs = field_docs(cls)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            default = f"default: {_shown(f.default)}"
            if f.name in recipe:
                default += f"; {DEFAULT_RECIPE}: {_shown(recipe[f.name])}"
            help_text = f"{docs[f.name]} ({default})".replace("%", "%%")
            flag = f"--{f.name.replace('_', '-')}"
            if hints[f.name] is bool:
                group.add_argument(
                    flag, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=help_text
                )
            else:
                group.add_argument(flag, dest=f.name, default=None, metavar=_metavar(hints[f.name]), help=help_text)
    return parser


def _metavar(kind: Any) -> str:
    """Short names of a type's values for ``--help``."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(arm) for arm in typing.get_args(kind) if arm is not type(None))
    if origin is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "N", float: "X", str: "TEXT"}.get(kind, "N,N,...")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass of config.py, read from its source."""
    tree = ast.parse(Path(configuration.__file__).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            docs[node.target.id] = ast.literal_eval(following.value)
    return docs


def parse_flags(argv: list[str]) -> Request:
    """The command line of ``mnistm_dist.train``. Raises `UserError` for a value that a field does not take."""
    flags = vars(train_parser().parse_args(argv))
    recipe = flags.pop("recipe")
    with errors_once_per_node():
        given = read_recipe(recipe) if recipe is not None else {}
    set_by_flag = set()
    for name, (_, f, kind) in field_types().items():
        if flags[name] is not None:
            given[name] = parse_value(f"--{name.replace('_', '-')}", flags[name], kind, f.metadata)
            set_by_flag.add(name)
    return Request(recipe=recipe, given=given, flags=frozenset(set_by_flag))


def from_request(request: Request) -> Config:
    """The configuration of a new run: defaults, the recipe (`DEFAULT_RECIPE` if none is named), the flags."""
    recipe = request.recipe or DEFAULT_RECIPE
    return build(recipe, {**(read_recipe(recipe) if request.recipe is None else {}), **request.given})


def at_resume(stored: Config, request: Request) -> Config:
    """The configuration with which a run goes on: the stored one, with what the command line may change.

    Raises `UserError`, showing the difference, where the command line asks for another order, model or schedule than
    the run began with. An ``auto`` on the command line keeps what was resolved at the first launch.
    """
    # What a launch asked of itself does not bind the next one, which may ask for the same again.
    launch = {**dict.fromkeys(("resume", "max_steps", "expect_world_size")), "profile_steps": 0}
    before = {**fields_of(stored), **launch}
    asked = {name: value for name, value in request.given.items() if value != "auto" and value != before[name]}
    refused = {
        name: value
        for name, value in asked.items()
        if name not in MAY_CHANGE_AT_RESUME or (name == "micro_batch" and name not in request.flags)
    }
    if refused:
        differences = "; ".join(
            f"{name} was {_shown(before[name])}, now {_shown(value)}" for name, value in refused.items()
        )
        raise UserError(f"resume: {differences}; a run goes on as it began: leave these out, or start a new --run-dir")
    recipe = stored.recipe if request.recipe is None else request.recipe
    return build(recipe, {**before, **asked})


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def write_result(text: str) -> None:
    """Text to stdout; a reader that has seen enough (``| head``) is no mistake. Raises `UserError` for a full disk."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as error:
        # Python flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(
                f"standard output: cannot be written ({error.strerror}), what is there is not whole; "
                "free some space, or send it elsewhere"
            ) from error
