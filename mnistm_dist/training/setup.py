"""What a run works with, built once: its data, its configuration with every ``auto`` resolved, its folder.

1. `open_run`: the packed set, a reader of each split, and every ``auto`` resolved, once; the result is written to the
   run's ``config.yaml`` and kept at a resume.
2. `acquire_run_dir`, `write_start`: the run folder, locked, with the files that it has from the start.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mnistm_dist.config import Config, DataConfig, dump, replace
from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.fetch import is_address, open_shards
from mnistm_dist.data.loader import Batch, Reader, open_reader, train_batches
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import Order, choose_micro_batch, choose_reading, create_order, micro_batch_share
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.parallel import Progress
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError
from mnistm_dist.files import FolderBusy
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.distributed import World
from mnistm_dist.training.environment import DECIDES_BITS, describe_environment
from mnistm_dist.training.hardware import check_compile, check_cuda_graph
from mnistm_dist.training.models import find_model
from mnistm_dist.training.run_dir import ARCHITECTURE_NAME, CONFIG_NAME, ENVIRONMENT_NAME, RunDir
from mnistm_dist.training.schedule import Schedule
from mnistm_dist.training.train_state import TrainState

# Where the bundled sample is packed to, and looked for, if no shards are named.
SAMPLE = Path("shards/sample")
EVALUATED_SPLITS = ("val", "test")
# Interval at which a process looks whether another one has packed the sample.
SAMPLE_POLL_SECONDS = 1.0


class ProgressBars(Protocol):
    """Where slow steps of the setup report to: the console, or nothing."""

    def progress(self, description: str, total: int | None, unit: str = "images") -> AbstractContextManager[Progress]:
        """Show a progress bar while the block runs."""

    def warn(self, text: str) -> None:
        """Show a line that needs attention."""


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """What a training or an evaluation works with."""

    config: Config
    """Without ``auto``."""
    world: World
    shards: ShardSet
    readers: dict[str, Reader]
    """By split."""
    path: Path
    """The run folder."""

    @functools.cached_property
    def order(self) -> Order:
        """The training order."""
        return create_order(self.config.data, self.config.steps, self.shards.manifest)

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Return this rank's micro-batches of each step from ``start_step`` up to ``stop_step``."""
        return train_batches(
            self.readers["train"],
            self.order,
            start_step=start_step,
            stop_step=stop_step,
            batch_size=self.config.steps.batch_size,
            micro_batch=int(self.config.steps.micro_batch),
            world_size=self.world.size,
            rank=self.world.rank,
        )

    @functools.cached_property
    def shares(self) -> list[range]:
        """The micro-batches of a step that each rank computes."""
        size, steps = self.world.size, self.config.steps
        sizes = {"batch_size": steps.batch_size, "micro_batch": int(steps.micro_batch), "world_size": size}
        return [micro_batch_share(**sizes, rank=rank) for rank in range(size)]

    @functools.cached_property
    def schedule(self) -> Schedule:
        """What each step trains."""
        return Schedule(config=self.config, train_size=self.shards.split("train").count)


def open_run(config: Config, world: World, bars: ProgressBars) -> RunSetup:
    """Open the data of a training, resolve every ``auto`` and choose the run folder. All ranks take part.

    Raise `UserError`.
    """
    # Before the set is fetched, which may take long.
    world.run_on_all_ranks(lambda: find_model(config.network.model))
    shards = open_set(config.data, world, bars)
    config = world.run_on_all_ranks(lambda: resolve(config, world, shards.manifest))
    readers = open_readers(shards, config.data, shards.manifest.splits, world, bars)
    path = world.run_on_main(lambda: choose_run_dir(config))
    return RunSetup(config=config, world=world, shards=shards, readers=readers, path=path)


def open_evaluation(config: Config, world: World, bars: ProgressBars, path: Path, split: str | None) -> RunSetup:
    """Open the data to evaluate the run at ``path`` on ``split``, or on val and test if it is None. All ranks take
    part. Raise `UserError`.
    """
    shards = open_set(config.data, world, bars)
    splits = [name for name in EVALUATED_SPLITS if name in shards.manifest.splits] if split is None else [split]
    # Only a configuration that no training has resolved has auto; val and test are small.
    data = replace(config, reader="resident").data if config.data.reader == "auto" else config.data
    readers = open_readers(shards, data, splits, world, bars)
    return RunSetup(config=config, world=world, shards=shards, readers=readers, path=path)


def open_set(data: DataConfig, world: World, bars: ProgressBars) -> ShardSet:
    """Open the packed set; fetch it into the node's cache if it is remote, pack the bundled sample if none is named.

    All ranks take part. The processes of a node wait for each other at a lock, never in a collective operation.
    """
    if data.shards is None:
        world.run_on_all_ranks(lambda: pack_sample(bars) if world.local_rank == 0 else None)
    shards, cache_dir = data.shards or str(SAMPLE), choose_cache_dir(data.cache_dir)

    def open_here() -> ShardSet:
        if not is_address(shards):
            return open_shards(shards, cache_dir=cache_dir)
        with bars.progress(f"fetching {shards}", None, "bytes") as bar:
            return open_shards(shards, cache_dir=cache_dir, progress=bar, say=bars.warn)

    return world.run_on_all_ranks(open_here)


def open_readers(
    shards: ShardSet, data: DataConfig, splits: Iterable[str], world: World, bars: ProgressBars
) -> dict[str, Reader]:
    """Check the shards of each split and open a reader; the resident reader decodes them first. All ranks take part.

    From here on, no wait for a peer is longer than the collective timeout.
    """
    cache_dir = choose_cache_dir(data.cache_dir)

    def open_here(split: str) -> Reader:
        with bars.progress(f"opening {split}", shards.split(split).count) as bar:
            return open_reader(
                shards, split, data, cache_dir=cache_dir, device=world.device, threads=world.threads, progress=bar
            )

    readers = {split: world.run_on_all_ranks(functools.partial(open_here, split)) for split in splits}
    world.limit_waits(world.collective_timeout)
    return readers


def pack_sample(bars: ProgressBars) -> None:
    """Pack the bundled sample to `SAMPLE` unless it is there; wait if another node or another run is packing it."""
    while not (SAMPLE / "manifest.json").exists():
        try:
            with bars.progress("packing the bundled sample", None) as bar:
                pack(open_source("sample"), SAMPLE, progress=bar)
        except FolderBusy:
            time.sleep(SAMPLE_POLL_SECONDS)
        except UserError as error:
            if not (SAMPLE / "manifest.json").exists():
                raise UserError(f"{error}, or use --shards with a packed set") from error


def resolve(config: Config, world: World, manifest: Manifest) -> Config:
    """Return the configuration without ``auto``. Raise `UserError` if batch, micro-batch, streams and world size do not
    fit."""
    if config.machine.compile:
        check_compile(world.device)
    batch_size, reproducible = config.steps.batch_size, config.machine.reproducible
    micro_batch = choose_micro_batch(config.steps, world_size=world.size, reproducible=reproducible)
    share = micro_batch_share(batch_size=batch_size, micro_batch=micro_batch, world_size=world.size, rank=world.rank)
    if micro_batch < 2:
        raise UserError(
            f"micro_batch: {micro_batch} image per forward; BatchNorm needs at least 2: use a larger --batch-size or "
            "--micro-batch"
        )
    if config.machine.cuda_graph:
        check_cuda_graph(config.machine, world.precision, world.device, len(share))
    order, reader, streams = choose_reading(
        config.data, manifest, batch_size=batch_size, world_size=1 if reproducible else world.size
    )
    memory_format, shards, network = config.machine.memory_format, config.data.shards or str(SAMPLE), config.network
    return replace(
        config,
        # Absolute: a resume, an evaluation and a plan find it from another folder, too.
        shards=shards if is_address(shards) else str(Path(shards).absolute()),
        order=order,
        reader=reader,
        shuffle_streams=streams,
        micro_batch=micro_batch,
        init_sha256=network.init_sha256 or (network.init_from and checkpoints.find_weights(network.init_from)[1]),
        precision=world.precision,
        threads=world.threads,
        memory_format="channels_last" if memory_format == "auto" else memory_format,
    )


def choose_run_dir(config: Config) -> Path:
    """Return the run folder: the one that is named, else runs/RECIPE-TIME. Rank 0 only, since it reads the clock."""
    if config.run.run_dir is not None:
        return Path(config.run.run_dir)
    name = f"{Path(config.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def acquire_run_dir(run: RunSetup, checkpoint: checkpoints.Checkpoint | None) -> RunDir:
    """Lock the run folder on rank 0 and return it.

    Raise `UserError` if it cannot be written, is held, or another job has trained in it since `choose_start` read it
    (while this one waited for its data): its progress would be lost.
    """
    run_dir, resume = RunDir(run.path, active=run.world.is_main), run.config.run.resume
    if not run_dir.active or (resume is not None and checkpoints.is_checkpoint_dir(Path(resume))):
        return run_dir
    latest = checkpoints.latest(run.path, lambda _: None)
    before, now = (found.step if found else 0 for found in (checkpoint, latest))
    if before != now:
        run_dir.lock.release()
        raise UserError(
            f"run folder {run.path}: another job has trained in it since this one started (step {before} then, "
            f"{now} now); start this one again with --resume auto, or choose another --run-dir"
        )
    return run_dir


def write_start(
    run: RunSetup,
    run_dir: RunDir,
    state: TrainState,
    print_line: Callable[[str], None],
    *,
    resumed: bool,
    argv: list[str],
) -> None:
    """Write the files that a run folder has from the start; set aside the checkpoints of later steps. Rank 0 writes.

    ``argv``: the flags of this launch.
    """
    if run_dir.active and (later := checkpoints.checkpoint_dirs(run.path, after=state.steps_done)):
        names = ", ".join(path.name for path in later)
        print_line(f"set aside: {names} and any results were moved to {run_dir.set_aside(later)}")
    run_dir.open_log(state.steps_done)
    if run_dir.active:
        environment = describe_environment(run.world, argv)
        run_dir.write(CONFIG_NAME, dump(run.config))
        run_dir.write(ENVIRONMENT_NAME, environment)
        run_dir.write(ARCHITECTURE_NAME, list(state.layers))
        run_dir.set_state("running")
        facts = {name: environment[name] for name in DECIDES_BITS}
        run_dir.log({"kind": "resume" if resumed else "start", "step": state.steps_done, **facts})
