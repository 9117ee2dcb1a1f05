"""What a run keeps in a checkpoint beside its tensors: checked before anything is made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from mnistm_dist.config import LARGEST_IMAGE_SIZE
from mnistm_dist.errors import UserError
from mnistm_dist.training.checkpoint import STATE, Checkpoint


@dataclass
class Past:
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
    known = {f.name for f in fields(Past)}
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
