"""The command line: tyro reads the flags, pydantic converts and checks their values, results go to stdout."""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import ValidationError, validate_call
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mnistm_dist.config import (
    DEFAULT_RECIPE,
    MAY_CHANGE_AT_RESUME,
    RECIPES,
    SECTIONS,
    Config,
    LocalPath,
    build,
    checked,
    fields_of,
    flag_error,
    read_recipe,
    replace,
)
from mnistm_dist.errors import UserError, errors_once_per_node, is_first

TRAIN_HELP = f"""Train an image classifier on packed shards.

    python -m mnistm_dist.train --shards shards/official
    accelerate launch --config_file accelerate_config.yaml --num_processes 8 \\
        -m mnistm_dist.train
    python -m mnistm_dist.train --resume runs/NAME

Recipes: {", ".join(RECIPES)}, or a YAML file.
Without --recipe it is {DEFAULT_RECIPE}. A flag overrides the recipe. A value of auto is
resolved at the first launch and written to RUN/config.yaml. The result is in
RUN: report.html, summary.json.

Exit codes: 0 finished; 2 user error; 75 saved and stopped at a signal, resume
with --resume RUN; 130 a second Ctrl-C; 1 anything else. A launcher replaces
these by its own."""

SHELLS = ("bash", "zsh", "fish")
_REGISTRY = ConstructorRegistry()
# Of all commands but train: flags without the name of a section, and switches without --no-.
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
# Stands for the commas of a default value in --help, at which tyro would break a line.
_COMMA = "\N{SINGLE LOW-9 QUOTATION MARK}"
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", type(None): "none"}


@checked
@dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """The flags of ``mnistm_dist.train``: the configuration of a run, and what else one launch may do."""

    print_config: bool = False
    """Print the configuration of the run as YAML, and exit."""
    seeds: str = "none"
    """Train one run after another with these seeds, such as 0,1,2, in RUN/seed-N, and compare them."""
    dry_run: bool = False
    """Print configuration, steps, memory and time, estimated from ten discarded steps per image size, and exit."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The command line of one launch of ``mnistm_dist.train``."""

    argv: list[str]
    """The flags, as `_plain` returns them."""
    recipe: str | None
    """The recipe that ``--recipe`` names."""
    config: Config
    """The configuration of a new run: defaults, recipe, flags."""
    flags: TrainFlags
    seeds: tuple[int, ...]

    def of_seed(self, seed: int) -> "TrainRequest":
        """Return the request of one of the `seeds`: a run of its own in ``RUN/seed-N``."""
        run_dir = f"{self.config.run.run_dir}/seed-{seed}"
        recipe, argv = _tyro(_only_recipe, self.argv, "train", return_unknown_args=True, add_help=False)
        return dataclasses.replace(
            self,
            argv=[*argv, *(["--recipe", recipe] if recipe else []), "--seed", str(seed), "--run-dir", run_dir],
            config=replace(self.config, seed=seed, run_dir=run_dir),
        )

    def resumed(self, stored: Config) -> Config:
        """Return the configuration to resume a run with: its ``stored`` one, with the changes that a resume may make.

        A value of auto keeps what the first launch resolved. Raises `UserError`, which shows both values, if the recipe
        or a flag asks for another order, model or schedule.
        """
        # These hold for one launch only.
        before = replace(stored, resume=None, expect_world_size=None, profile_steps=0)
        recipe = read_recipe(self.recipe) if self.recipe is not None else {}
        flags = _train_flags(self.argv, replace(before, **recipe))
        asked = fields_of(build(flags.recipe, fields_of(flags)))
        kept = fields_of(before)
        changed = {name: value for name, value in asked.items() if value not in ("auto", kept[name])}
        # Only a flag may change the micro-batch.
        refused = [name for name in changed if name not in MAY_CHANGE_AT_RESUME - ({"micro_batch"} & recipe.keys())]
        if refused:
            differences = (f"{name} was {flag_text(kept[name])}, now {flag_text(changed[name])}" for name in refused)
            raise UserError(f"resume: {'; '.join(differences)}; leave these out, or start a new run with --run-dir")
        return build(self.recipe or stored.recipe, kept | changed)


def parse_train_flags(argv: list[str]) -> TrainRequest:
    """Parse the flags of ``mnistm_dist.train``: one for each field of the configuration.

    Raises `UserError` for what is not accepted, `SystemExit` at ``--help``.
    """
    argv = _plain(argv)
    named = _tyro(_only_recipe, argv, "train", return_unknown_args=True, add_help=False)[0]
    recipe = named or DEFAULT_RECIPE
    with errors_once_per_node():
        base = build(recipe, read_recipe(recipe))
    flags = _train_flags(argv, base)
    seeds = [] if flags.seeds == "none" else flags.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds) or (seeds and flags.run.run_dir is None):
        raise UserError(f"--seeds: found {flags.seeds!r}; should be numbers such as 0,1,2, with --run-dir RUN")
    return TrainRequest(
        argv=argv,
        recipe=named or None,
        config=build(recipe, fields_of(flags)),
        flags=flags,
        seeds=tuple(dict.fromkeys(map(int, seeds))),
    )


def command(function: Callable[..., int]) -> Callable[[list[str]], int]:
    """Make the ``main(argv)`` of a command from a function whose parameters are its flags.

    The docstring of the function explains the flags, that of its module is the head of ``--help``. ``main`` returns the
    exit code. It raises `UserError` for flags that are not accepted, `SystemExit` at ``--help``.
    """

    @functools.wraps(function)
    def collect(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def main(argv: list[str]) -> int:
        name, head = Path(inspect.getfile(function)).stem, inspect.getdoc(inspect.getmodule(function)) or ""
        try:
            args, kwargs = _tyro(validate_call(collect), argv, name, head, config=_MARKERS)
        except ValidationError as error:
            raise flag_error(error) from error
        return function(*args, **kwargs)

    # For `completion`: the function whose parameters are the flags.
    return functools.update_wrapper(main, function, assigned=())


def completion(commands: Mapping[str, Callable[..., Any]], shell: str) -> str:
    """Return the script that completes ``mnistm-dist``: the commands, by name, and their flags.

    Raises `UserError` for a shell that is not supported.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion: found {shell!r}; should be one of {', '.join(SHELLS)}")
    functions = {
        name: TrainFlags if name == "train" else tyro.conf.configure(*_MARKERS)(inspect.unwrap(main))
        for name, main in commands.items()
    }
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            functions,
            prog="mnistm-dist",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes,),
            registry=_REGISTRY,
        )
    return out.getvalue()


def write_result(text: str) -> None:
    """Write text to stdout. A reader that closes the pipe (``| head``) is no error.

    Raises `UserError` if the disk is full.
    """
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as error:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(
                f"standard output: cannot be written ({error.strerror}), so it is incomplete; free some space"
            ) from error


def _only_recipe(*, recipe: str = "", seeds: str = "none") -> str:
    """The target of the first pass over the flags of training, which takes these two out."""
    return recipe


def _train_flags(argv: list[str], base: Config) -> TrainFlags:
    """Return ``base`` with the fields that flags set, as text."""
    return _tyro(TrainFlags, argv, "train", TRAIN_HELP, default=TrainFlags(**vars(base)))


def _plain(argv: list[str]) -> list[str]:
    """Return the flags of training as tyro has them: --optim.learning_rate=0.01 without its section, and
    --compile=true and --compile=false, which W&B's agent writes, as --compile and --no-compile."""
    values = {**fields_of(Config()), **vars(TrainFlags())}
    switches = "|".join(name.replace("_", "[-_]") for name, value in values.items() if isinstance(value, bool))
    argv = [re.sub(rf"^--({'|'.join(SECTIONS)})\.", "--", word) for word in argv]
    argv = [re.sub(rf"(?i)^--({switches})=true$", r"--\1", word) for word in argv]
    return [re.sub(rf"(?i)^--({switches})=false$", r"--no-\1", word) for word in argv]


def _tyro(target: Any, argv: list[str], name: str, head: str = "", **options: Any) -> Any:
    """Return what tyro reads from the command line. Raises `UserError`, in place of its box, and prints ``--help``."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(
                target,
                args=argv,
                prog=f"python -m mnistm_dist.{name}",
                description="",
                registry=_REGISTRY,
                **{"config": (tyro.conf.OmitArgPrefixes,), **options},
            )
    except SystemExit as stop:
        if stop.code:
            _, *lines = re.sub("[│╰╯]", " ", err.getvalue()).split("\n")  # a title, then parts between rules
            message = re.sub(r"\.? ?[-─]{3,}", ";", " ".join(" ".join(lines).split()))
            raise UserError(message.strip("; ")) from None
        # tyro quotes them, too.
        text = re.sub(f"'(\\S*{_COMMA}\\S*)'", r"\1", out.getvalue()).replace(_COMMA, ",")
        if text.startswith("usage: "):
            # tyro would join the lines of the head, and does not wrap the usage.
            usage, *rest = map(str.rstrip, text.splitlines())
            usage = textwrap.fill(usage, 80, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False)
            text = "\n".join([head, "", usage, *rest, ""])
        if is_first():
            write_result(text)
        raise


@_REGISTRY.primitive_rule
def _text_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Keep a value as text, so that pydantic converts and checks it like one of YAML.

    Switches, plain choices and lists of positional arguments are left to tyro.
    """
    metavar = _metavar(info.type)
    if not metavar or info.type_origin is Literal or info.type == tuple[LocalPath, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: args[0],
        is_instance=lambda _: True,
        str_from_instance=lambda value: [flag_text(value).replace(",", _COMMA)],
    )


def _metavar(kind: Any) -> str:
    """Return the values of a type as ``--help`` shows them, such as ``auto|INT``. Empty for a type of no values."""
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(members)
    if origin in (Annotated, tuple):
        return _metavar(members[0]) + (",..." if origin is tuple else "")
    parts = [_metavar(member) for member in members]
    return _METAVARS.get(kind) or ("|".join(parts) if all(parts) else "")


def flag_text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else "none" if value is None else str(value)
