"""The flags of ``python -m benchmarks``: a class for each benchmark, the help of a flag beside its field.

Imports nothing heavy: ``--help`` answers at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnistm_dist.data.cache import choose_cache_dir

SAMPLE = "shards/sample"
# Smallest and largest value of a flag.
LIMITS = {
    "threads": (0, 4096),
    "rounds": (1, 1000),
    "batch_size": (2, 2**20),
    "seconds": (0.001, 3600),
    "images": (10, 10**9),
    "image_size": (16, 1024),
    "workers": (0, 4096),
    "steps": (1, 10**6),
    "accuracy": (0, 1),
}


def comma_separated(parse: Callable[[str], Any]) -> Any:
    """Return the type of a flag that takes values with commas between them. A repeated value counts once."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=lambda texts: tuple(dict.fromkeys(parse(part) for part in texts[0].split(",") if part)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Texts = Annotated[tuple[str, ...], comma_separated(str)]
Integers = Annotated[tuple[int, ...], comma_separated(int)]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Flags of every command."""

    json: Path | None = None  # Write the result to this file too.

    def __post_init__(self) -> None:
        """Raise `ValueError` for a value out of range, and for a result file that could not be written at the end."""
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')}: found {value}; use a number from {low} to {high}")
        if self.json and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ValueError(f"--json: {self.json} is not a file in an existing folder; create the folder first")


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """Flags of every benchmark of speed."""

    shards: str = SAMPLE  # Packed set: a folder or an address. The bundled sample is packed if it is not there.
    cache_dir: Path = field(default_factory=lambda: choose_cache_dir(None))  # Folder of decoded and fetched sets.
    threads: int = 0  # CPU threads of each process. 0: all cores.


@dataclass(frozen=True, kw_only=True)
class Rounds(Options):
    """Flags of the benchmarks that measure in interleaved rounds."""

    rounds: int = 3  # Interleaved rounds.
    batch_size: int = 256  # Images per batch; in training, over all processes.
    only: Texts = ()  # Measure only the rows whose name contains one of these texts.


@dataclass(frozen=True, kw_only=True)
class Loader(Rounds):
    """Readers on pinned cores: ours, WebDataset, ImageFolder, and LitData and MosaicML Streaming if installed."""

    threads: int = 1  # CPU threads, and cores that the process is pinned to. 0: all cores.
    seconds: float = 2.0  # Seconds per round and reader.
    images: int = 10_000  # Images that are written for readers of other formats.
    image_size: int = 64  # Size of the model-ready images, pixels.
    workers: int = 0  # Worker processes of the other readers. 0: none.


@dataclass(frozen=True, kw_only=True)
class Training(Rounds):
    """Flags of the benchmarks of training steps."""

    recipe: str = "baseline"  # Recipe to train: a name or a YAML file.
    steps: int | None = None  # Steps per round. None: 10 on a CPU, 500 on a GPU.
    image_size: int | None = None  # Pixels. None: the first size of the recipe.


@dataclass(frozen=True, kw_only=True)
class Step(Training):
    """The trainer against a bare loop and a plain script, and variants of the bare loop."""

    compile: bool = True  # Measure torch.compile if there is a C++ compiler.


@dataclass(frozen=True, kw_only=True)
class Logs(Training):
    """The trainer with its console in a terminal and TensorBoard, against one that logs nowhere."""

    log_every: int = 10  # Steps between rows of the log.


@dataclass(frozen=True, kw_only=True)
class Ranks(Training):
    """One process against several, and the share of communication."""

    threads: int = 1  # CPU threads of each process. 0: all cores.
    processes: Integers = ()  # World sizes, the reference first. Default: 1 and all GPUs, or 1 and 2 without a GPU.


@dataclass(frozen=True, kw_only=True)
class Startup(Rounds):
    """From the launch to the first step, with an empty and with a full cache."""

    recipe: str = "baseline"  # Recipe to train: a name or a YAML file.


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """Time and images to an accuracy on val, by recipe and seed."""

    recipe: Texts = ("fast",)  # Recipes to train: names or YAML files.
    against: str | None = None  # Recipe to compare with, trained with the first seed. None: the first recipe.
    accuracy: float = 0.975  # Accuracy on val to reach, from 0 to 1.
    seeds: Integers = (0,)  # Seeds of each recipe.
    to_end: bool = False  # Continue each training to its end after it has reached the accuracy.
    runs: Path = Path("runs/benchmarks")  # Folder of the run folders. Existing runs are continued.


@dataclass(frozen=True, kw_only=True)
class Faithful(Output):
    """Which samples do tools read: on several processes, after a kill, in evaluation?"""

    only: Texts = ()  # Measure only the tools whose name contains one of these texts.
    ranks: Integers = (1, 2, 3, 4)  # Numbers of processes. The batches of the first are the reference.

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number of processes that is not measured."""
        super().__post_init__()
        for ranks in self.ranks:
            if not 1 <= ranks <= 4:
                raise ValueError(f"--ranks: found {ranks}; use numbers from 1 to 4")
