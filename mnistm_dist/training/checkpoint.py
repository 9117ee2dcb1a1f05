"""Checkpoints: written beside, hashed, fsynced, renamed, and only then are old ones pruned.

``RUN/checkpoints/step-00000640/`` is the state after 640 steps::

    model.safetensors           the weights to evaluate and to use (the averaged ones where the recipe averages)
    training_state.safetensors  the optimizer's tensors by parameter name; the trained weights where the model's are
                                averaged
    state.json                  step, scalars, and size and sha256 of the two files

A folder is whole when state.json is there and both files have their hashes. Nothing random is saved: the order and
every augmentation are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnistm_dist.config import LARGEST_IMAGE_SIZE
from mnistm_dist.errors import UserError, os_error_reason
from mnistm_dist.files import fsync_path

FORMAT = 1
MODEL, TRAINING, STATE = "model.safetensors", "training_state.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    """Steps done."""
    state: dict[str, Any]
    """What `save` was given as ``scalars``."""


def save(
    run_dir: Path,
    *,
    step: int,
    model: nn.Module,
    averaged: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scalars: dict[str, Any],
) -> Path:
    """Writes the state after ``step`` steps and returns its folder. Rank 0 alone.

    ``scalars`` is what JSON can hold. Training goes on bit for bit as if nothing had been saved. Raises `UserError`
    where the disk is full or cannot be written.
    """
    tensors = optimizer_tensors(model, optimizer)
    if averaged is not None:
        tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
    final = checkpoint_dir(run_dir, step)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {
            MODEL: _write_tensors(temporary / MODEL, (averaged or model).state_dict()),
            TRAINING: _write_tensors(temporary / TRAINING, tensors),
        }
        document = {"format": FORMAT, "step": step, "files": files, "scalars": scalars}
        write_durably(temporary / STATE, json.dumps(document, indent=1).encode())
        fsync_path(temporary)
        if final.exists():
            # A checkpoint of this step that a resume found torn or passed over.
            _discard(final)
        temporary.rename(final)
        fsync_path(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint {final}: cannot be written ({error}); the last good one stands; free the disk and --resume"
        ) from error
    return final


def prune(run_dir: Path, *, keep: int, best: str | None) -> None:
    """Removes all but the ``keep`` newest checkpoints and the one named ``best``, and what dead runs left
    half-written."""
    folder = run_dir / "checkpoints"
    whole = sorted(path for path in folder.iterdir() if path.name.startswith("step-"))
    for path in whole[: max(0, len(whole) - keep)]:
        if path.name != best:
            _discard(path)
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def discard_after(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of later steps: torn ones, and those of a run that goes on from an earlier one."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if path.name > checkpoint_dir(run_dir, step).name:
            _discard(path)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies, if there is one."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def is_checkpoint_dir(path: Path) -> bool:
    """Whether a path is, by its name, a checkpoint of a run, not a run."""
    return path.name.startswith("step-") and path.parent.name == "checkpoints"


def latest(run_dir: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None. A torn one is told by ``tell`` and passed over."""
    folder = run_dir / "checkpoints"
    candidates = sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True) if folder.is_dir() else []
    for path in candidates:
        try:
            return open_checkpoint(path)
        except UserError as error:
            tell(f"{error}; passed over")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files have the hashes that its state names. Raises `UserError` where it is torn or of another
    format."""
    try:
        document = json.loads((path / STATE).read_bytes())
        step, files, scalars = int(document["step"]), dict(document["files"]), dict(document["scalars"])
        if document["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path}: format {document['format']!r}, this version reads {FORMAT}: "
                "use the version of mnistm_dist that wrote it"
            )
        for name in (MODEL, TRAINING):
            if _digest(path / name) != dict(files[name]):
                raise UserError(
                    f"checkpoint {path}: {name} is not what was written (torn or changed); take another one"
                )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        told = os_error_reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"checkpoint {path}: not whole ({told}); take another one of the run") from error
    return Checkpoint(path=path, step=step, state=scalars)


def load_model(path: Path, model: nn.Module) -> None:
    """The weights of a checkpoint into ``model``. Raises `UserError` where they are another model's."""
    _load_weights(model, load_tensors(path / MODEL), path)


def restore(
    checkpoint: Checkpoint, *, model: nn.Module, averaged: nn.Module | None, optimizer: torch.optim.Optimizer
) -> None:
    """Model, averaged model and optimizer as they were at the checkpoint. Raises `UserError` where it is another
    model's."""
    path = checkpoint.path
    tensors = load_tensors(path / TRAINING)
    if averaged is None:
        load_model(path, model)
    else:
        load_model(path, averaged)
        _load_weights(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[id(parameter)]}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                if value.shape not in (parameter.shape, ()):
                    raise UserError(f"checkpoint {path}: {key} has the shape {tuple(value.shape)}: another model's")
                if value.shape == parameter.shape:
                    # In the parameter's memory format, as the optimizer made it: other strides are slower.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                state.setdefault(index, {})[key.removeprefix(prefix)] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as ``optimizer.PARAMETER.KEY``."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path}: holds the weights of another model ({detail})") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU. Raises `UserError` where it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # safetensors refuses channels_last tensors; contiguous copies resume bit for bit.
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    fsync_path(path)
    return _digest(path)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _discard(path: Path) -> None:
    """Removes a folder that from the first moment on no longer looks like a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there whole or not at all: beside, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@dataclass
class TrainingHistory:
    """What of a run's past stands in a checkpoint, beside the weights."""

    train_seconds: float = 0.0
    """In training steps, over all launches: without evaluation, saving and starting."""
    evaluate_seconds: float = 0.0
    """In evaluations on val, over all launches."""
    save_seconds: float = 0.0
    """In writing checkpoints and pruning them, over all launches, up to the one before this checkpoint."""
    best: dict[str, Any] | None = None
    """The best evaluation on val so far: step, accuracy, image_size."""
    pending: list[float] = field(default_factory=list)
    """Losses of the steps since the last row of the log."""


def check_state(checkpoint: Checkpoint) -> None:
    """Raises `UserError` where a field of a run's checkpoint is missing or holds what it cannot: the file was changed,
    since a run writes it whole."""
    state = checkpoint.state
    past = state.get("past")
    past = past if isinstance(past, dict) else {}
    best, pending = past.get("best"), past.get("pending")
    known = {f.name for f in fields(TrainingHistory)}
    wrong = {
        "shards": not isinstance(state.get("shards"), str),
        "micro_batch": not _whole(state.get("micro_batch")),
        "threads": not _whole(state.get("threads")),
        "scaler": not isinstance(state.get("scaler"), dict | None),
        "averaged": not isinstance(state.get("averaged"), bool),
        "image_size": not _is_side(state.get("image_size")),
        "mean": not _three_numbers(state.get("mean"), above=-math.inf),
        "std": not _three_numbers(state.get("std"), above=0),
        "past": not {"best", "pending"} <= past.keys() <= known,
        "past.seconds": not all(_is_number(past[key]) for key in past if key.endswith("_seconds")),
        "past.best": best is not None and not _is_best(best),
        # A loss that is no number is told by the next step.
        "past.pending": not (isinstance(pending, list) and all(type(loss) is float for loss in pending)),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(
                f"checkpoint {checkpoint.path}: {STATE} does not hold what a run writes (scalars: {name}), so it was "
                "changed; take another checkpoint of the run"
            )


def _is_best(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"step", "accuracy", "image_size"}
        and _whole(value["step"])
        and _is_number(value["accuracy"])
        and _is_side(value["image_size"])
    )


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_side(value: Any) -> bool:
    return _whole(value) and value <= LARGEST_IMAGE_SIZE


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _three_numbers(value: Any, *, above: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(x) and x > above for x in value)
