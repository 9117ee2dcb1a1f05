"""Which run to start or to resume, and from which checkpoint.

1. `choose_start`: the configuration, and the checkpoint to resume from.
2. `agree_on_start`: the same on every rank.
3. `restore_state`: the state of that checkpoint.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mnistm_dist import config as configuration
from mnistm_dist.config import Config
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Checkpoint
from mnistm_dist.training.distributed import World
from mnistm_dist.training.run_dir import CONFIG_NAME, read_state
from mnistm_dist.training.setup import RunSetup
from mnistm_dist.training.train_state import TrainState

if TYPE_CHECKING:
    from mnistm_dist.cli import TrainRequest


def choose_start(request: TrainRequest) -> tuple[Config, Checkpoint | None] | None:
    """Return the configuration to run with and the checkpoint to resume from, if any; None if the run is finished.

    Reads the run folder and changes nothing. Raise `UserError` if ``--resume`` and the folder do not fit.
    """
    resume, named = request.config.run.resume, request.config.run.run_dir
    if resume is None:
        if named is not None and Path(named).exists() and any(Path(named).iterdir()):
            raise UserError(
                f"run folder {named}: not empty; continue the run with --resume {named}, or choose another --run-dir"
            )
        return request.config, None
    if resume == "auto" and named is None:
        raise UserError("resume: auto needs --run-dir, the folder of the run to resume")
    target = Path(str(named) if resume == "auto" else resume)
    is_checkpoint = checkpoints.is_checkpoint_dir(target)
    run_dir = target.parents[1] if is_checkpoint else target
    if resume != "auto" and not (run_dir / CONFIG_NAME).is_file():
        raise UserError(
            f"resume {resume}: no run there (no {CONFIG_NAME}); name a run folder or one of its checkpoints, or auto"
        )
    if named is not None and Path(named).resolve() != run_dir.resolve():
        raise UserError(f"resume {resume}: not the run of --run-dir {named}; leave one of the two out")
    state = read_state(run_dir) or {}
    if state.get("state") == "finished" and not is_checkpoint:
        max_steps = configuration.load(run_dir / CONFIG_NAME).run.max_steps
        more = ""
        if max_steps is not None and max_steps == state.get("step"):
            more = f"; to train beyond its --max-steps: --resume {checkpoints.checkpoint_dir(run_dir, max_steps)}"
        print_on_main(f"{run_dir} is finished: nothing to do (report: python -m mnistm_dist.report {run_dir}){more}")
        return None
    checkpoint = checkpoints.open_checkpoint(target) if is_checkpoint else checkpoints.latest(run_dir, print_on_main)
    # A run that was killed before its first checkpoint is continued with its own configuration, too.
    is_run = (run_dir / CONFIG_NAME).is_file()
    config = request.resumed(configuration.load(run_dir / CONFIG_NAME)) if is_run else request.config
    return configuration.replace(config, run_dir=str(run_dir)), checkpoint


def agree_on_start(config: Config, checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """Return rank 0's ``checkpoint`` on every rank. All ranks take part.

    Raise `UserError` if a rank has another configuration or precision, or does not see that checkpoint, as when each
    node has the run folder on its own disk.
    """
    host = socket.gethostname()
    own = {**configuration.fields_of(config), "device": world.device.type, "precision": world.precision}
    main_host, main, main_checkpoint = world.broadcast_object((host, own, checkpoint))

    def compare() -> None:
        # Each node may have its own folder for its cache.
        different = [name for name in own if own[name] != main[name] and name != "cache_dir"]
        if different:
            raise UserError(
                f"configuration: {', '.join(different)} of rank {world.rank} on {host} differs from rank 0 on "
                f"{main_host}; start all ranks alike, on nodes of one kind, with the run folder on a file system that "
                "all nodes see"
            )
        if main_checkpoint is not None and not main_checkpoint.path.is_dir():
            raise UserError(
                f"checkpoint {main_checkpoint.path}: rank 0 on {main_host} sees it, rank {world.rank} on {host} does "
                "not; put the run folder on a file system that all nodes see"
            )

    world.run_on_all_ranks(compare)
    return main_checkpoint


def restore_state(state: TrainState, checkpoint: Checkpoint, run: RunSetup, warn: Callable[[str], None]) -> None:
    """Load the checkpoint into ``state``. ``warn`` is called if results may differ from here on.

    Raise `UserError` if the checkpoint is of another model or another packed set.
    """
    scalars, config = checkpoint.scalars, run.config
    if scalars.shards != run.shards.manifest.identity:
        raise UserError(
            f"shards {run.shards.root}: not the set that the run was started with; "
            "use --shards with the one in its config.yaml"
        )
    checkpoints.restore(checkpoint, state)
    if run.world.accelerator.scaler is not None and scalars.scaler is not None:
        run.world.accelerator.scaler.load_state_dict(scalars.scaler)
    best = state.history.best
    if best and not checkpoints.checkpoint_dir(run.path, best.step).is_dir():
        # It was removed for a better one, which is torn or of a later step than this checkpoint.
        state.history.best = None
    if scalars.micro_batch != config.steps.micro_batch:
        warn(
            f"micro_batch: {scalars.micro_batch} until now, {config.steps.micro_batch} from here on; "
            "BatchNorm normalises over another number of images"
        )
    if scalars.threads != config.machine.threads:
        warn(
            f"threads: {scalars.threads} until now, {config.machine.threads} from here on; "
            "results may differ in their last bits"
        )


def print_on_main(text: str) -> None:
    """Print a line to stderr on rank 0, before the processes have joined."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
