"""What to train: frozen dataclasses, one for each section, and their form in YAML.

A recipe (``recipes/NAME.yaml``, or a YAML file of your own) names only the fields that differ from the defaults below;
a file that begins with ``recipe: NAME`` inherits that recipe. A flag overrides the recipe (cli.py). The docstring under
a field is its text in ``--help``. Its type says which values are accepted: pydantic converts and checks them, whether
they come from YAML or from a flag.
"""

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)

from mnistm_dist.errors import UserError, did_you_mean, escape_control
from mnistm_dist.files import explain_os_errors, local_path

LARGEST_IMAGE_SIZE = 1024  # of a training, pixels
DEFAULT_MODEL = "pruned-resnet18"

# The types of the fields. Text is converted: "none" to None, "32,48" and "[32,48]" to image sizes.
T = TypeVar("T")
Auto = Literal["auto"]
TrackerName = Literal[
    "auto", "none", "wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "clearml", "aim", "dvclive", "swanlab"
]
OrNone = Annotated[T | None, BeforeValidator(lambda value: None if value in ("none", "None") else value)]
LocalPath = Annotated[str, AfterValidator(local_path)]
LocalFile = Annotated[Path, AfterValidator(local_path)]
ShardsPath = Annotated[str, AfterValidator(os.path.expanduser)]  # or a URL
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ImageSizes = Annotated[
    tuple[Annotated[int, Field(ge=16, le=LARGEST_IMAGE_SIZE)], ...],
    Field(min_length=1),
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")),
]
checked = with_config(ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=1, revalidate_instances="always"))


@checked
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, in which order, and how they are read."""

    shards: OrNone[ShardsPath] = None
    """Packed set: a folder, or an https:// or s3:// URL. none: the bundled sample, in shards/sample."""
    order: Literal["auto", "full", "windowed"] = "auto"
    """full: any image can follow any other; windowed: for large sets. auto: windowed above 8 GiB decoded."""
    shuffle_streams: Auto | PositiveInt = "auto"
    """Streams of the windowed order: divides batch_size. auto: the largest up to 16, a multiple of the world size."""
    shuffle_window: PositiveInt = 1024
    """Images in a shuffle window of the windowed order, per stream."""
    reader: Literal["auto", "resident", "streaming"] = "auto"
    """resident: decoded once per node, then memory-mapped; streaming: bounded memory, windowed order only."""
    workers: Auto | NonNegativeInt = "auto"
    """Decoding threads. auto: all cores of the node to decode a resident set; as many as threads while streaming."""
    cache_dir: OrNone[LocalPath] = None
    """Folder for decoded and fetched sets. none: $MNISTM_DIST_CACHE, node-local under Slurm, or the user's cache."""


@checked
@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images, drawn from (seed, position)."""

    shift: NonNegativeFloat = 0.0
    """Largest translation on each axis, pixels of the stored image."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in either direction, degrees."""
    scale: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest relative change of size: 0.1 draws from 0.9 to 1.1."""
    shear: Annotated[float, Field(ge=0, le=60)] = 0.0
    """Largest horizontal shear in either direction, degrees."""
    elastic: NonNegativeFloat = 0.0
    """Largest displacement of 5 x 5 control points of an elastic deformation, pixels of the stored image."""
    invert: Probability = 0.0
    """Probability of inverting the colours (255 - image)."""
    permute_channels: Probability = 0.0
    """Probability of a random permutation of the colour channels."""
    cutout: NonNegativeFloat = 0.0
    """Side of a square that is set to the mean colour, pixels of the stored image. 0: none."""
    flip: Probability = 0.0
    """Probability of mirroring left and right."""
    crop: Fraction = 0.0
    """Largest fraction of the area that a random crop cuts off. 0: none."""
    colour: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change of brightness, of contrast and of saturation: 0.2 draws each from 0.8 to 1.2."""
    ramp: Fraction = 0.0
    """Fraction of the run in which shift, rotate, scale, shear, elastic and colour grow from 0 to these values."""


@checked
@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The model and its initial weights."""

    model: str = DEFAULT_MODEL
    """pruned-resnet18, torchvision:NAME or package.module:function, which returns the model of a number of classes."""
    init_from: OrNone[LocalPath] = None
    """Run, checkpoint or .safetensors file with the first weights. With other classes, the last layer is new."""
    init_sha256: OrNone[str] = None
    """sha256 that the file of init_from must have. none: recorded at the first launch."""


@checked
@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Loss, optimizer and learning rate."""

    optimizer: Literal["adam", "adamw", "muon", "sgd"] = "adamw"
    """adam: with L2 penalty; adamw; muon: orthogonalised updates of convolutions, else adamw; sgd: with Nesterov."""
    learning_rate: NonNegativeFloat = 4e-3
    """Peak learning rate; with lr_scaling, at base_batch_size."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with batch_size / base_batch_size."""
    base_batch_size: PositiveInt = 256
    """Global batch size for which learning_rate was chosen, images."""
    momentum: Fraction = 0.9
    """Momentum of SGD and Muon; beta1 of Adam."""
    beta2: Fraction = 0.999
    """beta2 of Adam."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of all parameters with at least two dimensions; with adam, L2 penalty of all parameters."""
    label_smoothing: Fraction = 0.0
    """Fraction of the target that is spread evenly over the classes."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient; larger gradients are scaled down. 0: no clipping."""
    lr_schedule: Literal["constant", "exponential", "one-cycle"] = "one-cycle"
    """constant; exponential: multiplied by decay after every epoch; one-cycle: linear warmup, then cosine to zero."""
    decay: Probability = 0.911
    """Factor per epoch of the exponential schedule."""
    warmup: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    """Fraction of the steps in which the one-cycle schedule rises."""
    ema_decay: Fraction = 0.0
    """Decay per step of the exponential moving average of the weights, which is evaluated. 0: no averaging."""


@checked
@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """How many steps, of which batch and image size."""

    epochs: PositiveInt = 10
    """Passes over the training set."""
    batch_size: PositiveInt = 256
    """Images per step, over all processes."""
    micro_batch: Auto | PositiveInt = "auto"
    """Images per forward pass (the batch of BatchNorm). auto: batch_size / world size of the first launch."""
    max_world: OrNone[PositiveInt] = None
    """Choose an automatic micro_batch for up to this many processes. none: the first launch's; 8 if reproducible."""
    image_size: ImageSizes = (64,)
    """Image sizes of equal parts of the run, pixels: 32,48 trains half of the epochs at each."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order and every augmentation."""


@checked
@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """How the numbers are computed. Equal values give equal bits on one kind of CPU; on GPUs with deterministic."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where native (GPUs; CPUs with AMX or AVX-512 BF16), else fp32; fp16 if a launcher asks."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory format of convolutions. auto: channels_last, which was faster in measurements."""
    threads: Auto | PositiveInt = "auto"
    """CPU threads of each process. auto: cores of the node / processes on the node."""
    compile: bool = False
    """Compile the model of the training step with torch.compile."""
    cuda_graph: bool = False
    """Capture the training step in a CUDA graph at each image size (GPUs; not with fp16 or smaller micro-batches)."""
    sync_batchnorm: bool = False
    """Compute BatchNorm's statistics over all processes (GPUs only), no longer over one micro-batch."""
    deterministic: bool = False
    """Use deterministic kernels only: slower on GPUs, no difference on CPUs."""
    reproducible: bool = False
    """Train the same bits on any number of processes. auto then means one thread and a micro-batch for max_world."""


@checked
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, checkpoints and logs. Nothing here changes the trained weights."""

    run_dir: OrNone[LocalPath] = None
    """Run folder. none: runs/RECIPE-TIME."""
    resume: OrNone[LocalPath] = None
    """auto: resume the latest complete checkpoint of --run-dir, or start. Else a run folder or a checkpoint of it."""
    max_steps: OrNone[PositiveInt] = None
    """Stop after this many steps; the schedule stays that of the full run. A resume keeps it. none: no limit."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints, besides those at the end of each epoch and of checkpoint_minutes. 0: none."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Save a checkpoint at least this often, minutes. 0: no limit."""
    keep_checkpoints: Literal["all"] | PositiveInt = 2
    """How many of the latest checkpoints are kept, besides the best. all: each can be verified by a replay."""
    evaluate_every: PositiveInt = 1
    """Epochs between evaluations on val."""
    log_every: PositiveInt = 10
    """Steps between rows of log.jsonl."""
    tracker: TrackerName = "auto"
    """Experiment tracker; all but wandb by Accelerate, if installed. auto: wandb if an API key or a mode is set."""
    report: bool = True
    """Draw the figures and write report.html at the end. summary.json is written in any case."""
    upload_checkpoint: bool = False
    """Upload the checkpoint of the result to W&B as an artifact."""
    expect_world_size: OrNone[PositiveInt] = None
    """Stop with an error if the number of processes differs."""
    sanity_checks: bool = False
    """Before the first step, check that the initial loss is ln(classes) and that one batch can be overfitted."""
    profile_steps: NonNegativeInt = 0
    """Steps to trace with torch.profiler after a warm-up. The trace is written to RUN/profile/."""
    stop_signals: str = "SIGTERM,SIGUSR1,SIGHUP"
    """Signals at which the run saves and exits with code 75, separated by commas. Ctrl-C always does."""
    collective_timeout: Annotated[float, Field(ge=1)] = 600.0
    """Seconds after which a collective operation fails if another process does not take part."""


@checked
@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of one run."""

    recipe: str = "fast"
    """Name of a bundled recipe, or a YAML file."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    network: NetworkConfig = NetworkConfig()
    optim: OptimConfig = OptimConfig()
    steps: StepsConfig = StepsConfig()
    machine: MachineConfig = MachineConfig()
    run: RunConfig = RunConfig()


RECIPES = ("baseline", "fast", "best", "images", "debug")
DEFAULT_RECIPE = "fast"
SECTIONS = {name: [field.name for field in fields(value)] for name, value in vars(Config()).items() if name != "recipe"}
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}
assert len(SECTION_OF) == sum(map(len, SECTIONS.values())), "a field name is used in two sections"
# The fields that decide the trained weights. shards: another copy of the same set; its identity is checked.
LEARNING = SECTION_OF.keys() - SECTIONS["run"] - {"shards", "reader", "workers", "cache_dir", "max_world"}
# precision: on another kind of device only, which is not known before the processes join.
MAY_CHANGE_AT_RESUME = SECTION_OF.keys() - LEARNING | {"micro_batch", "threads", "precision", "cuda_graph"}
_ADAPTER = TypeAdapter(Config)


def fields_of(config: Config) -> dict[str, Any]:
    """Return every field by name, without its section."""
    return {name: getattr(getattr(config, section), name) for name, section in SECTION_OF.items()}


def build(recipe: str, given: dict[str, Any]) -> Config:
    """Return the defaults with some fields set, by name without section; text is converted to the field's type.

    Raises `UserError`, which names the field as a flag, for a value that is not accepted.
    """
    document: dict[str, Any] = {"recipe": recipe}
    for name, value in given.items():
        document.setdefault(SECTION_OF[name], {})[name] = value
    return _check(document)


def replace(config: Config, **given: Any) -> Config:
    """Return ``config`` with some fields changed, by name without section."""
    return build(config.recipe, {**fields_of(config), **given})


def dump(config: Config) -> str:
    """Return the configuration as YAML. `load` reads it back as an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def load(path: Path | str) -> Config:
    """Read a run's ``config.yaml``. Raises `UserError` if it is missing or damaged."""
    with explain_os_errors(path, verb="read", advice="name a run folder"):
        return _check(_read_yaml(Path(path)), str(path))


def read_recipe(recipe: str, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the fields that a recipe sets, inherited ones included, by name without section.

    Args:
        recipe: one of `RECIPES`, or a YAML file.
        heirs: the files that inherit from this recipe, its direct heir first.

    Raises:
        UserError: there is no such recipe, a field of it is not accepted, or it inherits from itself.
    """
    bundled, heir_dir = recipe in RECIPES, Path(*heirs[:1]).parent
    path = Path(__file__).with_name("recipes") / f"{recipe}.yaml" if bundled else heir_dir / local_path(recipe)
    origin = f"{heirs[0]}: recipe {recipe}" if heirs else f"recipe {recipe}"
    if path.resolve() in heirs:
        raise UserError(f"{origin}: inherits from itself; remove a recipe: line")
    known = f"use {', '.join(RECIPES)} or a YAML file{did_you_mean(recipe, RECIPES)}"
    with explain_os_errors(origin, verb="read", advice=known):
        document = _read_yaml(path)
    own = fields_of(_check(document, str(path)))
    inherited = read_recipe(document["recipe"], (path.resolve(), *heirs)) if "recipe" in document else {}
    return inherited | {name: own[name] for section in SECTIONS for name in document.get(section) or ()}


def _read_yaml(path: Path) -> Any:
    """Read a YAML file; nothing in it is executed. Raises `OSError`, and `UserError` if it is not valid."""
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError is a date that does not exist.
        reason = str(error).partition("\n")[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise UserError(f"{path}: not valid YAML ({reason}); correct the file") from error


def _check(document: Any, origin: str | None = None) -> Config:
    """Return a YAML document, or the fields that flags set, as a configuration.

    Raises `UserError`, which names the field and the file ``origin``, for a value that is not accepted.
    """
    if not isinstance(document, dict):
        raise UserError(f"{origin}: found {document!r:.120}; should be a mapping of {', '.join(SECTIONS)} to fields")
    try:
        # In YAML, a section without fields is None.
        return _ADAPTER.validate_python({section: {} if v is None else v for section, v in document.items()})
    except ValidationError as error:
        if origin is None:
            raise flag_error(error) from error
        path, problem = invalid_value(error)
        if "Unexpected" in problem:
            known = SECTIONS[path[0]] if len(path) > 1 else ("recipe", *SECTIONS)
            problem = f"unknown{did_you_mean(path[-1], known)}; known: {', '.join(known)}"
        raise UserError(f"{origin}: {escape_control('.'.join(path))}: {problem}") from error


def invalid_value(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """Return the path to the first invalid value, and ``found X; should be Y`` in one line."""
    first, *_ = errors = error.errors()
    path = first["loc"][:2]
    # A value that fits no member of a union has an error for each of them.
    messages = [e["msg"] for e in errors if e["loc"][:2] == path and e["input"] is first["input"]]
    noise = r"^(Input|String|Tuple|Value error, \S*:) |, (unable|got) .*|dictionary or an instance of "
    problem = " or ".join(re.sub(noise, "", message) for message in messages).replace(" or should be ", " or ")
    return tuple(map(str, path)), f"found {first['input']!r:.120}; {problem}"


def flag_error(error: ValidationError) -> UserError:
    """Return the first invalid value as an error that names its flag."""
    path, problem = invalid_value(error)
    # The last part may be a member of a union; an argument without a flag is a number.
    flags = [f"--{part.replace('_', '-')}" for part in path if part.isidentifier()]
    return UserError(f"{flags[-1] if flags else 'argument'}: {problem}")
