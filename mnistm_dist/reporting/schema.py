"""What the fields of a run's files may hold: a report leaves out what is of another kind, and says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1e18
"""No number of a run is larger; a float holds it, and a page has room for it."""


def is_whole(value: object) -> bool:
    """Whether it is a whole number that a run can count to."""
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: object) -> bool:
    """Whether it is a number that can be drawn: finite."""
    return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]  # a number, by the first half


def is_text(value: object) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def _is_checkpoint(value: object) -> bool:
    return isinstance(value, str | Mapping)


def _is_data(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    counts, sums = value.get("counts") or {}, value.get("pixels_sha256") or {}
    return (
        isinstance(counts, Mapping)
        and all(map(is_whole, counts.values()))
        and isinstance(sums, Mapping)
        and all(map(is_text, [*sums.values(), value.get("identity") or ""]))
    )


Kinds = Mapping[str, Callable[[Any], bool]]
STATE: Kinds = {"state": is_text, "step": is_whole, "reason": is_text}
SUMMARY: Kinds = {
    "recipe": is_text,
    "steps": is_whole,
    "epochs": is_number,
    "train_seconds": is_number,
    "images_per_second": is_number,
    "parameters": is_whole,
    "world_size": is_whole,
    "checkpoint": _is_checkpoint,
    "data": _is_data,
    "val": lambda value: isinstance(value, Mapping),
    "test": lambda value: isinstance(value, Mapping),
}
ROW: Kinds = {
    "kind": is_text,
    "step": is_whole,
    "epoch": is_whole,
    "image_size": is_number,
    "val/accuracy": is_number,
    "val/loss": is_number,
    "train/image_size": is_number,
    # A loss that is no number is a part of the story: the curve leaves it out.
    "train/loss": lambda value: type(value) is float or is_number(value),
    "train/learning_rate": is_number,
}
LAYER: Kinds = {
    "name": is_text,
    "layer": is_text,
    "output_shape": lambda value: isinstance(value, list) and all(map(is_whole, value)),
    "parameters": is_whole,
}


def wrong_fields(found: Mapping[str, Any], kinds: Kinds) -> list[str]:
    """The names of the fields that hold something else than they may; None stands for nothing."""
    return [name for name, fits in kinds.items() if found.get(name) is not None and not fits(found[name])]
