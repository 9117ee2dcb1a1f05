"""Which run to start or to resume, and from which checkpoint.

1. `choose_start`: the configuration, and the checkpoint to resume from; `start_of` for a launch that may be restarted.
2. `agree_on_start`: the same on every rank.
3. `check_resume`: whether the checkpoint fits the packed set and the configuration.
4. `checkpoint.restore`: the state of that checkpoint.
"""

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from mnistm_dist.cli import TrainRequest
from mnistm_dist.config import Config, RunConfig, fields_of, load, replace
from mnistm_dist.errors import UserError, is_first
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.distributed import World
from mnistm_dist.training.hardware import Environment
from mnistm_dist.training.run_dir import CONFIG_NAME, read_state
from mnistm_dist.training.setup import RunSetup

# What a resume may change although results depend on it; precision only together with the device.
CONSEQUENCES = {
    "micro_batch": "BatchNorm normalises over another number of images",
    "threads": "results may differ in their last bits",
    "cuda_graph": "results may differ in their last bits",
    "device": "results may differ in their last bits",
    "precision": "results differ slightly",
}


def start_of(run: RunConfig, environment: Environment) -> tuple[str | None, str | None]:
    """Return ``resume`` and ``run_dir`` of this launch; with restarts they are auto and runs/RDZV_ID if not given.

    torchrun restarts all processes when a node leaves or joins; they resume their run.

    Raise `UserError` if a restart would fail, or would not continue the run.
    """
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return run.resume, run.run_dir
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "--max-restarts: torchrun keeps the addresses of dead processes, so no restart would succeed; set the "
            "variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node before torchrun"
        )
    if run.resume is not None and checkpoints.is_checkpoint_dir(Path(run.resume)):
        raise UserError(f"--max-restarts: every restart would begin at {run.resume}; name the run folder with --resume")
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if run.run_dir is not None or run.resume not in (None, "auto"):
        return run.resume or "auto", run.run_dir
    if run_id == "none":
        raise UserError("--max-restarts: a restart would begin a new run; use --run-dir, or --rdzv-id of torchrun")
    return "auto", str(Path("runs") / run_id)


def choose_start(request: TrainRequest) -> tuple[Config, checkpoints.Checkpoint | None] | None:
    """Return the configuration to run with and the checkpoint to resume from, if any; None if the run is finished.

    Reads the run folder and changes nothing. Raise `UserError` if ``--resume`` and the folder do not fit.
    """
    resume, named = start_of(request.config.run, os.environ)
    if resume is None:
        if named is not None and Path(named).exists() and any(Path(named).iterdir()):
            raise UserError(
                f"run folder {named}: not empty; continue the run with --resume {shlex.quote(named)}, "
                "or choose another --run-dir"
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
    if (run_dir / checkpoints.MODEL).exists():
        raise UserError(
            f"resume {run_dir}: an exported model, which cannot be trained further; start a new run with --init-from "
            f"{shlex.quote(str(run_dir))}"
        )
    if named is not None and Path(named).resolve() != run_dir.resolve():
        raise UserError(f"resume {resume}: not the run of --run-dir {named}; leave one of the two out")
    # With its own configuration also if it is finished, or has no complete checkpoint.
    stored = load(run_dir / CONFIG_NAME) if (run_dir / CONFIG_NAME).is_file() else None
    config = request.resumed(stored) if stored else request.config
    state, max_steps = read_state(run_dir), config.run.max_steps
    finished = state.get("state") == "finished" and not is_checkpoint
    if stored and finished and max_steps == stored.run.max_steps:
        quoted = shlex.quote(str(run_dir))
        more = f"; to train beyond its --max-steps: --resume {quoted} --max-steps none" if max_steps else ""
        print_on_main(f"{run_dir} is finished: nothing to do (report: python -m mnistm_dist.report {quoted}){more}")
        return None
    checkpoint = checkpoints.open_checkpoint(target) if is_checkpoint else checkpoints.latest(run_dir, print_on_main)
    # A checkpoint that is named, or a finished run, must be trained further.
    if checkpoint and max_steps is not None and max_steps < checkpoint.step + (is_checkpoint or finished):
        raise UserError(
            f"max_steps: {max_steps}, but {checkpoint.path} has {checkpoint.step} steps; "
            "use a larger --max-steps, or none"
        )
    return replace(config, run_dir=str(run_dir)), checkpoint


def agree_on_start(
    config: Config, checkpoint: checkpoints.Checkpoint | None, world: World
) -> checkpoints.Checkpoint | None:
    """Return rank 0's ``checkpoint`` on every rank. All ranks take part.

    Raise `UserError` if a rank has another configuration or precision, or does not see that checkpoint, as when each
    node has the run folder on its own disk.
    """
    host = socket.gethostname()
    own = {**fields_of(config), "device": world.device.type, "precision": world.precision}
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


def check_resume(checkpoint: checkpoints.Checkpoint, run: RunSetup, warn: Callable[[str], None]) -> None:
    """Call ``warn`` if results may differ from here on; the run folder is not changed.

    Raise `UserError` if the checkpoint is of another packed set, or was trained with another configuration.
    """
    scalars = checkpoint.scalars
    if scalars.shards != run.shards.manifest.identity:
        raise UserError(
            f"shards {run.shards.root}: not the set that the run was started with; "
            "use --shards with the one in its config.yaml"
        )
    now = checkpoints.learning_values(run.config, run.world.device)
    changed = {name: (was, now[name]) for name, was in scalars.learning.items() if now.get(name, was) != was}
    kept = {"precision"} if "device" not in changed else set()
    accepted = CONSEQUENCES.keys() - (CONSEQUENCES.keys() if run.config.machine.reproducible else kept)
    refused = [f"{name} was {was}, now {value}" for name, (was, value) in changed.items() if name not in accepted]
    if refused:
        raise UserError(
            f"{run.path}: {'; '.join(refused)}; checkpoint {checkpoint.path.name} was trained with the first: change "
            f"{CONFIG_NAME} back or leave out the flag, or start a new run with --run-dir"
        )
    for name, (was, value) in changed.items():
        warn(f"{name}: {was} until now, {value} from here on; {CONSEQUENCES[name]}")


def print_on_main(text: str) -> None:
    """Print a line to stderr on rank 0, before the processes have joined."""
    if is_first():
        print(text, file=sys.stderr, flush=True)
