"""The connection to Weights & Biases: whether there can be one, and how to get it within bounds."""

from __future__ import annotations

import netrc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    from accelerate.tracking import WandBTracker

PROJECT = "mnistm-dist"
"""W&B project, unless WANDB_PROJECT names another."""
STEP = "step"
"""Our own step metric: steps done, over all launches of a run. W&B's own counter drops what comes twice."""
PROBE_SECONDS = 5.0
"""How long the server may take to accept a connection."""
INIT_SECONDS = 10.0
"""How long W&B may take to answer before the run goes offline."""
FINISH_SECONDS = 8.0
"""How long the end of a run waits for uploads: a launcher or Slurm kills what takes 30 s to leave."""
Mode = Literal["none", "online", "offline"]


def choose_mode(track: Literal["auto", "wandb", "none"], environ: Mapping[str, str]) -> tuple[Mode, str]:
    """How to track, and in a few words why it is not as wished ('' where it is)."""
    wanted = environ.get("WANDB_MODE", "").lower()
    if track == "none" or wanted == "disabled":
        return "none", "WANDB_MODE is disabled" if track == "wandb" else ""
    if wanted in ("offline", "dryrun"):
        return "offline", ""
    if has_key(environ):
        return "online", ""
    if track == "auto" and not wanted:
        return "none", ""
    return "offline", "no API key: neither WANDB_API_KEY nor wandb login"


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B can log in without asking: a key or a token in the environment, or a password in ``.netrc``."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url(environ)).hostname or ""
    home = Path(environ.get("HOME", "~")).expanduser()
    for path in (Path(environ["NETRC"]),) if environ.get("NETRC") else (home / ".netrc", home / "_netrc"):
        try:
            found = netrc.netrc(str(path)).hosts.get(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def base_url(environ: Mapping[str, str]) -> str:
    """The address of the W&B server."""
    return environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def one_line(error: BaseException) -> str:
    """What an error says, on one short line, without W&B's advice to wait longer."""
    text = " ".join(str(error).split()).partition(" Consider increasing")[0]
    if text in ("", "<no message>"):
        text = type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def connect(
    mode: Mode, reason: str, run_dir: Path, config: dict[str, Any], name: str, group: str | None
) -> tuple[WandBTracker | None, str]:
    """Opens the run, offline where online fails; None where even that fails. Called in the tracker's thread.

    Gives in a few words why it is not as wished, too.
    """
    import wandb

    failures = (wandb.Error, OSError, ValueError, RuntimeError)
    try:
        # We say ourselves what is to be known; this silences what W&B says before it has a run.
        wandb.setup(wandb.Settings(silent=True))
    except failures as error:
        return None, one_line(error)
    if mode == "online":
        try:
            _probe(base_url(os.environ))
            # Without a mode W&B takes WANDB_MODE and its own settings, which an argument would beat.
            return _start(run_dir, config, name, group, {}), reason
        except failures as error:
            reason = one_line(error)
    try:
        return _start(run_dir, config, name, group, {"mode": "offline"}), reason
    except failures as error:
        return None, one_line(error)


def _probe(address: str) -> None:
    """Raises OSError at once where the server cannot be reached: W&B itself would try until `INIT_SECONDS` are over."""
    parts = urlsplit(address)
    if getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname or ""):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=PROBE_SECONDS).close()


def _start(
    run_dir: Path, config: dict[str, Any], name: str, group: str | None, more: Mapping[str, Any]
) -> WandBTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    settings = wandb.Settings(
        silent=True,
        console="off",  # our console is not W&B's: capturing it would cost time and log the bars' control codes
        save_code=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    wandb_tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or PROJECT,
        name=os.environ.get("WANDB_NAME") or name,
        group=os.environ.get("WANDB_RUN_GROUP") or group,
        dir=str(run_dir),
        job_type="train",
        settings=settings,
        **more,
    )
    wandb_tracker.start()
    run = wandb_tracker.tracker
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    wandb_tracker.store_init_configuration(config)
    return wandb_tracker
