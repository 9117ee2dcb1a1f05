"""From a request to what a run works with: which run to go on with, the data, every ``auto`` settled.

1. `choose_start`: the configuration, and the checkpoint to go on from; `agree`: the same on every rank.
2. `open_set`, `open_readers`: the shards, a reader of each split.
3. `resolve`: every ``auto``, once; the result is written to the run's ``config.yaml`` and kept at a resume.
4. `choose_run_dir`, `acquire_run_dir`: the run folder, held.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from mnistm_dist import config as configuration
from mnistm_dist.cli import Request, at_resume, from_request
from mnistm_dist.config import Config, DataConfig
from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.fetch import is_address, open_shards
from mnistm_dist.data.loader import Reader, open_reader
from mnistm_dist.data.manifest import Manifest
from mnistm_dist.data.order import accumulation, accumulation_share, choose_reading
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import UserError
from mnistm_dist.files import FolderBusy
from mnistm_dist.reporting.console import Console
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Checkpoint
from mnistm_dist.training.distributed import World
from mnistm_dist.training.run_dir import RunDir, read_state

SAMPLE = Path("shards/sample")
"""Where the bundled sample is packed to, and looked for, when no shards are named."""
SAMPLE_POLL_SECONDS = 1.0
"""Between two looks at whether another process has packed it."""


def choose_start(request: Request) -> tuple[Config | None, Checkpoint | None]:
    """The configuration to run with and the checkpoint to go on from, if any; no configuration where the run is
    finished.

    Reads the run folder, changes nothing. Raises `UserError` where ``--resume`` and the folder do not fit.
    """
    resume, named = request.given.get("resume"), request.given.get("run_dir")
    if resume is None:
        if named is not None and Path(named).exists() and any(Path(named).iterdir()):
            raise UserError(
                f"run folder {named}: holds files already; --resume {named} goes on, or choose another --run-dir"
            )
        return from_request(request), None
    if resume == "auto" and named is None:
        raise UserError("resume: auto needs --run-dir, to know which run to go on with")
    target = Path(str(named) if resume == "auto" else resume)
    one = checkpoints.is_checkpoint_dir(target)
    run_dir = target.parents[1] if one else target
    if resume != "auto" and not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"resume {resume}: no run there (no config.yaml); name a run folder or one of its checkpoints, or auto"
        )
    if named is not None and Path(named).resolve() != run_dir.resolve():
        raise UserError(f"resume {resume}: is not the run of --run-dir {named}; leave one of the two out")
    state = read_state(run_dir) or {}
    if state.get("state") == "finished" and not one:
        cut = configuration.load(run_dir / "config.yaml").run.max_steps
        more = ""
        if cut is not None and cut == state.get("step"):
            more = f"; --resume {checkpoints.checkpoint_dir(run_dir, cut)} goes on beyond its --max-steps"
        say_on_main(f"{run_dir} is finished: nothing to do (python -m mnistm_dist.report {run_dir} shows it){more}")
        return None, None
    found = checkpoints.open_checkpoint(target) if one else checkpoints.latest(run_dir, say_on_main)
    if found is None:
        return configuration.replace(from_request(request), run_dir=str(run_dir)), None
    config = at_resume(configuration.load(run_dir / "config.yaml"), request)
    return configuration.replace(config, run_dir=str(run_dir)), found


def agree(config: Config, checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """Rank 0's ``checkpoint``, on every rank. All ranks take part.

    Raises `UserError` where a rank has another ``config`` or precision, or does not see that checkpoint: a run folder
    on each node's own disk.
    """
    host = socket.gethostname()
    mine = {**configuration.fields_of(config), "device": world.device.type, "precision": world.precision}
    main_host, theirs, chosen = world.broadcast_object((host, mine, checkpoint))

    def compare() -> None:
        # Each node may have a folder of its own for its cache.
        others = [name for name in mine if mine[name] != theirs[name] and name != "cache_dir"]
        if others:
            raise UserError(
                f"configuration: {', '.join(others)} of rank {world.rank} on {host} is not that of rank 0 on "
                f"{main_host}; start all ranks alike, on nodes of one kind, with the run folder on a file system that "
                "all nodes see"
            )
        if chosen is not None and not chosen.path.is_dir():
            raise UserError(
                f"checkpoint {chosen.path}: rank 0 on {main_host} sees it, rank {world.rank} on {host} does not; put "
                "the run folder on a file system that all nodes see"
            )

    world.run_on_all_ranks(compare)
    return chosen


def say_on_main(text: str) -> None:
    """A line on stderr from rank 0, before the processes have joined."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def open_set(data: DataConfig, world: World, console: Console) -> ShardSet:
    """The packed set, fetched into the node's cache if it is remote; the bundled sample is packed where none is named.

    All ranks take part. Those of one node wait for one another at a lock, never in a collective.
    """
    if data.shards is None:
        world.run_on_all_ranks(lambda: pack_sample(console) if world.local_rank == 0 else None)
    shards, cache_dir = data.shards or str(SAMPLE), choose_cache_dir(data.cache_dir)

    def open_here() -> ShardSet:
        if not is_address(shards):
            return open_shards(shards, cache_dir=cache_dir)
        with console.progress(f"fetching {shards}", None, "bytes") as bar:
            return open_shards(shards, cache_dir=cache_dir, progress=bar)

    return world.run_on_all_ranks(open_here)


def open_readers(
    shards: ShardSet, data: DataConfig, splits: Iterable[str], world: World, console: Console
) -> dict[str, Reader]:
    """A reader of each split: every shard is checked, and decoded first where the reading is resident.

    All ranks take part.
    """
    cache_dir = choose_cache_dir(data.cache_dir)

    def open_here(split: str) -> Reader:
        with console.progress(f"opening {split}", shards.split(split).count) as bar:
            return open_reader(
                shards, split, data, cache_dir=cache_dir, device=world.device, threads=world.threads, progress=bar
            )

    return {split: world.run_on_all_ranks(functools.partial(open_here, split)) for split in splits}


def pack_sample(console: Console) -> None:
    """Packs the bundled sample to `SAMPLE` unless it is there; waits while another node, or another run, does."""
    while not (SAMPLE / "manifest.json").exists():
        try:
            with console.progress("packing the bundled sample", None) as bar:
                pack(open_source("sample"), SAMPLE, progress=bar)
        except FolderBusy:
            # Its lock is free when it has ended, well or not.
            time.sleep(SAMPLE_POLL_SECONDS)
        except UserError as error:
            if not (SAMPLE / "manifest.json").exists():
                raise UserError(f"{error}, or name a packed set with --shards") from error


def resolve(config: Config, world: World, manifest: Manifest) -> Config:
    """Every ``auto`` settled. Raises `UserError` where batch, micro-batch, streams and world size do not fit one
    another."""
    batch_size = config.steps.batch_size
    micro_batch = config.steps.micro_batch
    if micro_batch == "auto":
        micro_batch = accumulation_share(batch_size=batch_size, world_size=world.size)
    accumulation(batch_size=batch_size, world_size=world.size, micro_batch=micro_batch)
    if micro_batch < 2:
        raise UserError(
            f"micro_batch: {micro_batch} image per forward; BatchNorm needs at least 2: use a larger --batch-size or "
            "--micro-batch"
        )
    order, data, streams = choose_reading(config.data, manifest, batch_size=batch_size, world_size=world.size)
    return configuration.replace(
        config,
        shards=config.data.shards or str(SAMPLE),
        order=order,
        reader=data,
        shuffle_streams=streams,
        micro_batch=micro_batch,
        precision=world.precision,
        threads=world.threads,
        memory_format="channels_last" if config.machine.memory_format == "auto" else config.machine.memory_format,
    )


def choose_run_dir(config: Config) -> Path:
    """The run's folder: the one that is named, else runs/RECIPE-TIME. Rank 0 alone, since it reads the clock."""
    if config.run.run_dir is not None:
        return Path(config.run.run_dir)
    name = f"{Path(config.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in taken if not path.exists())


def acquire_run_dir(run_dir: Path, *, resume: str | None, checkpoint: Checkpoint | None, active: bool) -> RunDir:
    """The run's folder, held by the rank that is ``active``.

    Raises `UserError` where it cannot be written, is held, or another job has trained in it since `choose_start` looked
    (it waited for the data, say): what that job learnt would be thrown away.
    """
    folder = RunDir(run_dir, active=active)
    if not active or (resume is not None and checkpoints.is_checkpoint_dir(Path(resume))):
        return folder
    newest = checkpoints.latest(run_dir, lambda _: None)
    before, now = (found.step if found else 0 for found in (checkpoint, newest))
    if before != now:
        folder.release()
        raise UserError(
            f"run folder {run_dir}: another job has trained in it since this one started (step {before} then, "
            f"{now} now); start this one again with --resume auto, or choose another --run-dir"
        )
    return folder
