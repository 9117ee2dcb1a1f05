"""Schemas of the files of a run folder that a report reads; fields that it does not show are not listed.

Every field is optional, so that a run that is not finished, or of another version, is reported as far as possible.
"""

from __future__ import annotations

from typing import Required

from pydantic import BaseModel, FiniteFloat, NonNegativeInt
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from mnistm_dist.reporting.metrics import Metrics


class State(BaseModel):
    """``state.json``."""

    state: str = "unknown"
    step: NonNegativeInt | None = None
    reason: str | None = None


class Data(BaseModel):
    """``data`` in ``summary.json``: the packed set."""

    path: str | None = None
    lineage: str | None = None
    identity: str | None = None
    counts: dict[str, NonNegativeInt] = {}
    """Images of each split."""
    pixels_sha256: dict[str, str] = {}


class EvaluatedCheckpoint(BaseModel):
    """``checkpoint`` in ``summary.json``: the checkpoint that was evaluated."""

    step: NonNegativeInt
    chosen: str | None = None
    averaged: bool = False
    image_size: NonNegativeInt | None = None


class Summary(BaseModel):
    """``summary.json``."""

    recipe: str | None = None
    world_size: NonNegativeInt | None = None
    steps: NonNegativeInt | None = None
    epochs: FiniteFloat | None = None
    train_seconds: FiniteFloat | None = None
    images_per_second: FiniteFloat | None = None
    parameters: NonNegativeInt | None = None
    checkpoint: EvaluatedCheckpoint | None = None
    data: Data | None = None
    val: Metrics | None = None
    test: Metrics | None = None


class Layer(BaseModel):
    """A row of ``architecture.json``."""

    name: str
    layer: str
    output_shape: list[NonNegativeInt]
    """Of one image: channels, height, width."""
    parameters: NonNegativeInt


Row = TypedDict(
    "Row",
    {
        "kind": Required[str],
        "step": Required[NonNegativeInt],
        "epoch": NonNegativeInt,
        "image_size": NonNegativeInt | None,
        "val/loss": FiniteFloat | None,
        "val/accuracy": FiniteFloat | None,
        # NaN is valid: the row of the step at which a run failed has it.
        "train/loss": float | None,
        "train/learning_rate": FiniteFloat | None,
        "train/image_size": NonNegativeInt | None,
    },
    total=False,
)
"""A line of ``log.jsonl``."""
