"""Checkpoints: written under a temporary name, hashed, synced and renamed; only then are old ones removed.

``RUN/checkpoints/step-00000640/`` is the state after 640 steps::

    model.safetensors           the weights to evaluate and to use (the averaged weights if the recipe has them)
    training_state.safetensors  the optimizer's tensors by parameter name; with averaging, the trained weights too
    state.json                  step, scalars, and size and sha256 of the two files and of the run's own files

A checkpoint is complete if state.json exists and both files have their hashes. No random state is saved: the order and
every augmentation are functions of (seed, step).
"""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnistm_dist.config import LEARNING, Config, fields_of
from mnistm_dist.errors import UserError, near_path, os_error_reason
from mnistm_dist.files import explain_os_errors, fsync_path, write_atomic
from mnistm_dist.training.environment import device_name
from mnistm_dist.training.run_dir import RUN_FILES, read_summary, require_run
from mnistm_dist.training.train_state import Record, TrainingHistory, TrainState

MODEL, TRAINING, STATE = "model.safetensors", "training_state.safetensors", "state.json"


class Scalars(Record):
    """What a checkpoint holds beside its tensors."""

    # Checkpoints of earlier versions hold two of the values under names of their own.
    model_config = ConfigDict(extra="ignore")

    history: TrainingHistory
    shards: str
    """Identity of the packed set."""
    classes: list[str] = Field(min_length=1)
    """Names, in the order of the model's outputs."""
    learning: dict[str, Any] = Field(default_factory=dict)
    """What decides the trained weights: `learning_values`."""
    scaler: dict[str, Any] | None
    """State of the gradient scaler; None unless the precision is fp16."""
    averaged: bool
    """Whether model.safetensors holds the averaged weights."""
    image_size: int = Field(gt=0, le=1024)
    """Image size of the last step, pixels: evaluation uses it."""
    resize: int | None = None
    """``--resize`` with which the set was packed, pixels."""
    mean: list[float] = Field(min_length=3, max_length=3)
    """Per channel, for the normalisation, on a scale of 0 to 1."""
    std: list[float] = Field(min_length=3, max_length=3)


class Digest(Record):
    """Size and hash of a file."""

    size: int
    sha256: str


class Checkpoint(Record):
    """A complete checkpoint on disk; all but ``path`` is the content of ``state.json``."""

    path: Path = Field(exclude=True)
    format: Literal[1] = 1
    step: int = Field(ge=0)
    """Steps done."""
    files: dict[str, Digest]
    """The two files of tensors."""
    run_files: dict[str, Digest] = Field(default_factory=dict)
    """`RUN_FILES` as they were when it was saved; log.jsonl has grown since. Empty for an earlier version's."""
    scalars: Scalars


def learning_values(config: Config, device: torch.device) -> dict[str, Any]:
    """Return what decides the trained weights, as JSON has it: fields of the configuration, and the kind of device."""
    values = {name: value for name, value in fields_of(config).items() if name in LEARNING}
    return json.loads(json.dumps({**values, "device": "cpu" if device.type == "cpu" else device_name(device)}))


def save(run_dir: Path, state: TrainState, scalars: Scalars) -> Path:
    """Write the state and return the checkpoint's folder. Rank 0 only.

    Saving changes nothing in the training state. Raise `UserError` if the disk is full or cannot be written.
    """
    tensors = {
        f"optimizer.{name}.{key}": value
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    if state.ema is not None:
        tensors |= {f"model.{name}": value for name, value in state.model.state_dict().items()}
    final = checkpoint_dir(run_dir, state.steps_done)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {
            MODEL: _write_tensors(temporary / MODEL, state.eval_model.state_dict()),
            TRAINING: _write_tensors(temporary / TRAINING, tensors),
        }
        run_files = {name: _digest(run_dir / name) for name in RUN_FILES if (run_dir / name).is_file()}
        saved = Checkpoint(path=final, step=state.steps_done, files=files, run_files=run_files, scalars=scalars)
        # Through json, since every float must be read back as it was.
        write_atomic(temporary / STATE, json.dumps(saved.model_dump(), indent=1))
        fsync_path(temporary)
        temporary.rename(final)
        fsync_path(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint {final}: cannot be written ({error}); the last complete one is kept: "
            "free some space and --resume"
        ) from error
    return final


def restore(checkpoint: Checkpoint, state: TrainState, scaler: torch.amp.GradScaler | None = None) -> None:
    """Load model, averaged weights, optimizer, history, steps done, and the state of ``scaler``, if there is one.

    Raise `UserError` if the checkpoint is of another model.
    """
    path, scalars = checkpoint.path, checkpoint.scalars
    tensors = load_tensors(path / TRAINING)
    load_model(path, state.eval_model)
    if state.ema is not None:
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        load_model(path, state.model, weights)
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[id(parameter)]}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                if value.shape not in (parameter.shape, ()):
                    raise UserError(f"checkpoint {path}: {key} has the shape {tuple(value.shape)}: another model's")
                # A step is a scalar on the CPU, also of a parameter that is a scalar.
                if value.shape == parameter.shape and not key.endswith(".step"):
                    # In the parameter's memory format, as the optimizer created it: other strides are slower.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                optimizer_state.setdefault(index, {})[key.removeprefix(prefix)] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    if scaler is not None and scalars.scaler is not None:
        scaler.load_state_dict(scalars.scaler)
    # A copy: training changes it.
    state.history, state.steps_done = scalars.history.model_copy(deep=True), checkpoint.step
    best = state.history.best
    if best and not checkpoint_dir(path.parents[1], best.step).is_dir():
        # It was removed for a better one, which is torn or of a later step than this checkpoint.
        state.history.best = None


def prune(run_dir: Path, *, keep: int | Literal["all"], best_step: int | None) -> None:
    """Remove all checkpoints but the ``keep`` newest and the one of ``best_step``, and what killed runs left behind."""
    for path in checkpoint_dirs(run_dir)[: 0 if keep == "all" else -keep]:
        if best_step is None or path != checkpoint_dir(run_dir, best_step):
            # From the first moment on it no longer looks like a checkpoint.
            path.rename(path.with_name(f".{path.name}.{time.time_ns()}"))
    for removed in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(removed, ignore_errors=True)


def checkpoint_dirs(run_dir: Path, *, after: int = 0) -> list[Path]:
    """Return the folders of the checkpoints after a step, in order. A user's copy (``step-00000640-mine``) is none."""
    paths = sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8))
    return [path for path in paths if path > checkpoint_dir(run_dir, after)]


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def is_checkpoint_dir(path: Path) -> bool:
    """Return whether a path, by its name, is a checkpoint and not a run."""
    return path.name.startswith("step-") and path.parent.name == "checkpoints"


def complete(run_dir: Path, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints of a run, the latest first. ``warn`` is called for each torn one."""
    for path in reversed(checkpoint_dirs(run_dir)):
        try:
            yield open_checkpoint(path)
        except UserError as error:
            warn(f"{error}; skipped")


def latest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the latest complete checkpoint of a run, or None; ``warn`` as in `complete`."""
    return next(complete(run_dir, warn), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raise `UserError` if it is torn, changed, or of another format."""
    try:
        content = json.loads((path / STATE).read_bytes())
        if (found := content.get("format")) != 1:
            raise UserError(f"checkpoint {path}: format {found!r}, this version reads 1: use the version that wrote it")
        checkpoint = Checkpoint.model_validate({**content, "path": path})
        # An exported model has no training state.
        for name in {MODEL, *checkpoint.files}:
            if _digest(path / name) != checkpoint.files[name]:
                raise UserError(f"checkpoint {path}: {name} is torn or was changed; use another checkpoint of the run")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(os_error_reason(error).split())[:200]
        raise UserError(
            f"checkpoint {path}: torn, changed or removed ({reason}); use another checkpoint of the run"
        ) from error
    return checkpoint


def choose_checkpoint(run_dir: Path, which: str, *, has_test: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a checkpoint and the entry ``checkpoint`` of ``summary.json``.

    ``which`` is best, last, a path, or chosen: the best on val if there is a test split to give an unbiased result,
    else the last. Raise `UserError` if there is no such checkpoint.
    """
    if which in ("best", "last", "chosen") and (run_dir / MODEL).exists():
        # A folder of `export --to hub`: it has one.
        which = str(run_dir)
    if which not in ("best", "last", "chosen"):
        checkpoint, chosen = open_checkpoint(Path(which)), "named"
    else:
        torn: list[str] = []
        last = latest(run_dir, torn.append)
        if last is None:
            reason = "".join(f" ({line})" for line in torn[:1])
            raise UserError(
                f"{run_dir}: no complete checkpoint{reason}; train with --resume {shlex.quote(str(run_dir))}"
            )
        checkpoint, chosen, best = last, "last", last.scalars.history.best
        if best is not None and (which == "best" or (which == "chosen" and has_test)):
            checkpoint, chosen = open_checkpoint(checkpoint_dir(run_dir, best.step)), "best on val"
        elif which == "best":
            raise UserError(
                f"{run_dir}: val was never evaluated, so there is no best checkpoint; use --checkpoint last"
            )
    scalars = checkpoint.scalars
    about = {"averaged": scalars.averaged, "image_size": scalars.image_size}
    return checkpoint, {"step": checkpoint.step, "chosen": chosen, **about}


def find_weights(source: str) -> tuple[Path, str]:
    """Return the file with the weights of a run's result or of a checkpoint, or the file itself, and its sha256.

    Raise `UserError`.
    """
    path = Path(source)
    if is_checkpoint_dir(path):
        path = open_checkpoint(path).path / MODEL
    elif path.is_dir():
        require_run(path)
        path = choose_checkpoint(path, "chosen", has_test="test" in read_summary(path))[0].path / MODEL
    with explain_os_errors(
        f"init_from {path}", verb="read", advice=f"name a run or a .safetensors file{near_path(path)}"
    ):
        return path, _digest(path).sha256


def load_model(path: Path, model: nn.Module, weights: dict[str, Tensor] | None = None) -> None:
    """Load the weights of a checkpoint, by default those to evaluate, into ``model``.

    Raise `UserError` if they are another model's.
    """
    try:
        model.load_state_dict(load_tensors(path / MODEL) if weights is None else weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path}: holds the weights of another model ({detail})") from error


def load_tensors(path: Path, advice: str = "use another checkpoint (a live run removes old ones)") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raise `UserError`, with the advice, if it cannot be
    read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({os_error_reason(error)}); {advice}") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> Digest:
    # safetensors refuses channels_last tensors, and tensors that share memory; contiguous copies resume bit for bit.
    copies = {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, value in tensors.items()
    }
    save_file(copies, path)
    fsync_path(path)
    return _digest(path)


def _digest(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
