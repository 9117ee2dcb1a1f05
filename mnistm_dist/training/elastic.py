"""Launches that torchrun may restart: when a node leaves or joins, all processes start again and resume their run."""

from pathlib import Path

from mnistm_dist.config import RunConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training.checkpoint import is_checkpoint_dir
from mnistm_dist.training.hardware import Environment


def start_of(run: RunConfig, environment: Environment) -> tuple[str | None, str | None]:
    """Return ``resume`` and ``run_dir`` of this launch; with restarts they are auto and runs/RDZV_ID if not given.

    Raise `UserError` if a restart would fail, or would not continue the run.
    """
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return run.resume, run.run_dir
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "--max-restarts: torchrun keeps the addresses of dead processes, so no restart would succeed; set the "
            "variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node before torchrun"
        )
    if run.resume is not None and is_checkpoint_dir(Path(run.resume)):
        raise UserError(f"--max-restarts: every restart would begin at {run.resume}; name the run folder with --resume")
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    if run.run_dir is not None or run.resume not in (None, "auto"):
        return run.resume or "auto", run.run_dir
    if run_id == "none":
        raise UserError("--max-restarts: a restart would begin a new run; use --run-dir, or --rdzv-id of torchrun")
    return "auto", str(Path("runs") / run_id)
