"""What to train: frozen dataclasses, and their form in YAML.

A recipe (``recipes/NAME.yaml`` or a file of one's own) names only what differs from the defaults below; a flag beats
it (flags.py). Each field's docstring is its line in ``--help``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mnistm_dist.errors import UserError, escape_control, os_error_reason

Auto = Literal["auto"]
LARGEST_IMAGE_SIZE = 1024
"""Of a training, pixels."""


def _number(default: Any, *, low: float, high: float = math.inf) -> Any:
    """A field whose numbers lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which order, read how."""

    shards: str | None = None
    """Packed set: a folder, or an https:// or s3:// address. None: the bundled sample, in shards/sample."""
    order: Auto | Literal["full", "windowed"] = "auto"
    """full: any image can follow any; windowed: for sets too large to hold. auto: by the manifest's size."""
    shuffle_streams: Auto | int = _number("auto", low=1)
    """Canonical streams of the windowed order: the world size divides it, it divides the batch. auto: the largest <=
    16."""
    shuffle_window: int = _number(1024, low=1)
    """Images in a shuffle window of the windowed order, per stream."""
    reader: Auto | Literal["resident", "streaming"] = "auto"
    """resident: decoded once per node, then mapped; streaming: shards read in order, in bounded memory (windowed order
    only)."""
    workers: Auto | int = _number("auto", low=0)
    """Decoding threads. auto: all cores of the node while a resident set is decoded; while streaming, ``threads``."""
    cache_dir: str | None = None
    """Folder of decoded and fetched sets. None: $MNISTM_DIST_CACHE, a node-local folder under Slurm, else the user's
    cache."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images, drawn from (seed, position)."""

    shift: float = _number(0.0, low=0)
    """Largest translation on each axis, pixels of the stored image."""
    rotate: float = _number(0.0, low=0, high=180)
    """Largest rotation either way, degrees."""
    scale: float = _number(0.0, low=0, high=0.9)
    """Largest relative change of size: 0.1 draws from 0.9 to 1.1."""
    shear: float = _number(0.0, low=0, high=60)
    """Largest slant of upright lines either way, degrees."""
    elastic: float = _number(0.0, low=0)
    """Largest displacement on each axis of the 5 x 5 points that bend the image smoothly, pixels of the stored
    image."""
    invert: float = _number(0.0, low=0, high=1)
    """Probability of inverted colours (255 - image)."""
    permute_channels: float = _number(0.0, low=0, high=1)
    """Probability of a random permutation of the colour channels."""
    cutout: float = _number(0.0, low=0)
    """Side of a square set to the mean colour, pixels of the stored image. 0: none."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Loss, optimizer and learning rate."""

    optimizer: Literal["adam", "adamw", "muon", "sgd"] = "adamw"
    """adam: L2 in the gradient; adamw: decoupled decay; muon: adamw, convolutions by orthogonal steps; sgd: Nesterov
    momentum."""
    learning_rate: float = _number(4e-3, low=0)
    """Peak learning rate, at the base batch size if scaled."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with batch_size / base_batch_size."""
    base_batch_size: int = _number(256, low=1)
    """Global batch at which learning_rate was chosen, images."""
    momentum: float = _number(0.9, low=0, high=0.9999)
    """SGD's and Muon's momentum; Adam's beta1."""
    beta2: float = _number(0.999, low=0, high=0.99999)
    """Adam's beta2."""
    weight_decay: float = _number(0.05, low=0)
    """Weight decay of all parameters with two or more dimensions; with adam, L2 of all parameters."""
    label_smoothing: float = _number(0.0, low=0, high=0.99)
    """Share of the target spread evenly over the classes."""
    max_grad_norm: float = _number(0.0, low=0)
    """Largest norm of the gradient. 0: not clipped."""
    lr_schedule: Literal["constant", "exponential", "one-cycle"] = "one-cycle"
    """constant; exponential: x decay after every epoch; one-cycle: linear up, cosine down to zero."""
    decay: float = _number(0.911, low=0, high=1)
    """Factor per epoch of the exponential schedule."""
    warmup: float = _number(0.25, low=0, high=0.9)
    """Share of the steps in which one-cycle rises."""
    ema_decay: float = _number(0.0, low=0, high=0.99999)
    """Decay per step of the exponential moving average of the weights that is evaluated. 0: none."""


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """How long, in which steps, at which size."""

    epochs: int = _number(10, low=1)
    """Passes over the training set."""
    batch_size: int = _number(256, low=1)
    """Images per step, over all processes."""
    micro_batch: Auto | int = _number("auto", low=1)
    """Images per forward (BatchNorm's batch). auto: batch_size / world size at the first launch, kept at a resume."""
    image_size: tuple[int, ...] = _number((64,), low=16, high=LARGEST_IMAGE_SIZE)
    """Training sizes of equal parts of the run, pixels: 32,48,64 trains a third of the epochs at each."""
    seed: int = _number(0, low=0, high=2**63 - 1)
    """Decides the initial weights, the order and every augmentation."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """How the numbers are computed: at equal values, and on one kind of device, the bits are the same."""

    precision: Auto | Literal["fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where native, else fp32; fp16 where the launcher names it and it is native."""
    memory_format: Auto | Literal["channels_last", "contiguous"] = "auto"
    """Memory format of convolutions. auto: channels_last, which measured faster."""
    threads: Auto | int = _number("auto", low=1)
    """CPU threads of each process. auto: the cores over the local processes."""
    compile: bool = False
    """Compile the training step's model with torch.compile."""
    sync_batchnorm: bool = False
    """BatchNorm's batch over all processes (GPUs only; the micro-batch then no longer bounds it)."""
    deterministic: bool = False
    """Only deterministic kernels: slower on GPUs, no change on CPU."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it tells. Nothing here changes what is learnt."""

    run_dir: str | None = None
    """Run folder. None: runs/RECIPE-TIME."""
    resume: str | None = None
    """auto: go on from the newest whole checkpoint of --run-dir, or start; PATH: a run folder or one of its
    checkpoints."""
    max_steps: int | None = _number(None, low=1)
    """Stop after this many steps; the schedule stays that of the full run."""
    checkpoint_every: int = _number(500, low=0)
    """Steps between checkpoints. 0: only at the end of each epoch."""
    checkpoint_minutes: float = _number(10.0, low=0)
    """Minutes after which a checkpoint is due too. 0: never."""
    keep_checkpoints: int = _number(2, low=1)
    """Newest checkpoints that are kept, beside the best."""
    evaluate_every: int = _number(1, low=1)
    """Epochs between evaluations on val."""
    log_every: int = _number(10, low=1)
    """Steps between rows of log.jsonl."""
    tracker: Auto | Literal["wandb", "none"] = "auto"
    """W&B. auto: where an API key or a mode is set."""
    report: bool = True
    """Draw the figures and write report.html at the end; the numbers are written all the same."""
    upload_checkpoint: bool = False
    """Upload the checkpoint of the result to W&B as an artifact."""
    expect_world_size: int | None = _number(None, low=1)
    """Stop with an error unless there are this many processes."""
    sanity_checks: bool = False
    """Before the first step, check that the first loss is that of a guess and that one batch can be learnt by heart."""
    profile_steps: int = _number(0, low=0)
    """Steps to trace with torch.profiler, after a warm-up; the trace goes to RUN/profile/."""
    signals: str = "SIGTERM,SIGUSR1"
    """Signals after which the run saves and leaves with exit code 75, comma-separated. Ctrl-C does so too."""
    collective_timeout: float = _number(600.0, low=1)
    """Seconds after which a collective operation that waits for a lost process fails."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole."""

    recipe: str = "fast"
    """Name of the recipe, or its file."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    steps: StepsConfig = StepsConfig()
    machine: MachineConfig = MachineConfig()
    run: RunConfig = RunConfig()


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "optim": OptimConfig,
    "steps": StepsConfig,
    "machine": MachineConfig,
    "run": RunConfig,
}
RECIPES = ("baseline", "fast", "best", "debug")
DEFAULT_RECIPE = "fast"

MAY_CHANGE_AT_RESUME = {
    *(f.name for f in dataclasses.fields(RunConfig)),
    *("shards", "reader", "workers", "cache_dir", "micro_batch", "threads"),
}
"""Fields that a resume may set anew (shards: to another place of the same set). All others decide what is learnt."""


def field_types() -> dict[str, tuple[str, dataclasses.Field[Any], Any]]:
    """Every field by name: its section, its dataclass field, its resolved type. Names are unique over the sections."""
    table = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.name not in table, f"two fields are named {f.name}"
            table[f.name] = (section, f, hints[f.name])
    return table


def read_recipe(recipe: str) -> dict[str, Any]:
    """The fields that a recipe sets, by name.

    ``recipe`` is one of `RECIPES` or a YAML file. Raises `UserError` for one that is not there, or holds what it may
    not.
    """
    path = Path(__file__).with_name("recipes") / f"{recipe}.yaml" if recipe in RECIPES else Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = f"known recipes are {', '.join(RECIPES)}; or name a .yaml file"
        reason = (
            "no such recipe" if isinstance(error, FileNotFoundError) else f"cannot be read ({os_error_reason(error)})"
        )
        raise UserError(f"recipe {recipe}: {reason}; {known}") from error
    return flatten(read_yaml(text, f"recipe {path}"), str(path))


_MOST_NESTED = 20
"""Lists and mappings in one another; a recipe has three."""


def read_yaml(text: str, origin: str) -> Any:
    """What a YAML document says, none of it run. Raises `UserError`, naming ``origin``, where it is none."""
    import yaml

    try:
        # Looked at one by one, since a few lines can ask for more than any memory holds, or for hours.
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{origin}: holds an alias (*NAME), which is not accepted; write its value out")
            if depth > _MOST_NESTED:
                raise UserError(f"{origin}: nested more than {_MOST_NESTED} deep, which is not accepted; write it flat")
        return yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Beside its own errors it lets through those of Python at a date, a number or a truth that is none.
        reason = str(error).splitlines()[0] if str(error) else "nested too deep"
        if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise UserError(f"{origin}: not YAML ({reason}); correct it, or start from a recipe that is") from error


def flatten(document: Any, origin: str) -> dict[str, Any]:
    """A nested YAML document as field -> checked value. Raises `UserError` naming the file and the field."""
    if not isinstance(document, dict):
        raise UserError(f"{origin}: found {type(document).__name__}; a recipe is a mapping of {', '.join(SECTIONS)}")
    table, given = field_types(), {}
    for section, fields in document.items():
        if section == "recipe":
            continue
        if section not in SECTIONS:
            raise UserError(
                f"{origin}: unknown section {shown(section)}{_nearest(section, SECTIONS)}; known: {', '.join(SECTIONS)}"
            )
        if not isinstance(fields, dict | None):
            raise UserError(f"{origin}: section {section} holds {type(fields).__name__}; it is a mapping of fields")
        for name, value in (fields or {}).items():
            if name not in table or table[name][0] != section:
                known = [n for n, (s, _, _) in table.items() if s == section]
                field_name = f"{section}.{escape_control(str(name)[:80])}{_nearest(name, known)}"
                raise UserError(f"{origin}: unknown field {field_name}; known: {', '.join(known)}")
            _, f, kind = table[name]
            try:
                given[name] = parse_value(f"{section}.{name}", value, kind, f.metadata)
            except UserError as error:
                raise UserError(f"{origin}: {error}") from error
    return given


def _nearest(name: Any, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def build(recipe: str, given: dict[str, Any]) -> Config:
    """A configuration from the defaults and the fields that are given."""
    table = field_types()
    sections = {
        section: cls(**{name: value for name, value in given.items() if table[name][0] == section})
        for section, cls in SECTIONS.items()
    }
    return Config(recipe=recipe, **sections)


def replace(config: Config, **values: Any) -> Config:
    """``config`` with fields, named without their section, set anew."""
    given = {**fields_of(config), **values}
    return build(config.recipe, given)


def fields_of(config: Config) -> dict[str, Any]:
    """Every field by name, without its section."""
    return {name: getattr(getattr(config, section), name) for name, (section, _, _) in field_types().items()}


def dump(config: Config) -> str:
    """The configuration as YAML, which `load` reads back as an equal one."""
    import yaml

    document: dict[str, Any] = {"recipe": config.recipe}
    for section in SECTIONS:
        values = dataclasses.asdict(getattr(config, section))
        document[section] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(document, sort_keys=False)


def load(path: Path | str) -> Config:
    """The configuration in a run's ``config.yaml``. Raises `UserError` where it is missing or damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a run's configuration ({os_error_reason(error)}); name another run"
        ) from error
    document = read_yaml(text, str(path))
    given = flatten(document, str(path))
    recipe = document.get("recipe", DEFAULT_RECIPE)
    if not isinstance(recipe, str):
        raise UserError(f"{path}: recipe is {shown(recipe)}; accepted is the name of a recipe or of its file")
    return build(recipe, given)


def parse_value(name: str, value: Any, kind: Any, metadata: Any) -> Any:
    """A YAML value or a flag's text as ``kind``; raises `UserError` naming the field and what is accepted."""
    parsed = _convert(value, kind)
    if parsed is _NO:
        raise UserError(f"{name}: {shown(value)} is not accepted; use {_accepted(kind)}")
    low, high = metadata.get("low", -math.inf), metadata.get("high", math.inf)
    for number in parsed if isinstance(parsed, tuple) else (parsed,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not low <= number <= high:
            bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{name}: {shown(value)} is not accepted; use a number {bound}")
    return parsed


def shown(value: Any) -> str:
    """A value as a message shows it: a few lines of YAML can stand for more than any memory holds."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxstring, short.maxlong, short.maxother = 2, 3, 120, 40, 120
    return short.repr(value)


_NO = object()


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or `_NO`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        # None and literals first, so that "auto" is never read as a path.
        for arm in sorted(
            typing.get_args(kind), key=lambda a: (a is not type(None), typing.get_origin(a) is not Literal)
        ):
            found = _convert(value, arm)
            if found is not _NO:
                return found
        return _NO
    if origin is Literal:
        return value if value in typing.get_args(kind) else _NO
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        found = tuple(_convert(item, typing.get_args(kind)[0]) for item in items)
        return _NO if not found or _NO in found else found
    if kind is type(None):
        return None if value is None or value == "none" else _NO
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower(), _NO)
    if kind is str:
        return value if isinstance(value, str) and value else _NO
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _NO
    if isinstance(number, float) and not math.isfinite(number):
        return _NO
    return number if kind is float or not isinstance(value, float) or number == value else _NO


def _accepted(kind: Any) -> str:
    """The values of a type, in words."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_accepted(arm) for arm in typing.get_args(kind))
    if origin is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind))
    if origin is tuple:
        return "whole numbers with commas between"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[kind]
