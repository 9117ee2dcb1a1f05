"""Claims about `mnistm_dist.reporting.run_logger`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from mnistm_dist.reporting import console as console_module
from mnistm_dist.reporting.console import Console
from mnistm_dist.reporting.run_logger import RunLogger
from mnistm_dist.reporting.tracking import Tracker


class Recorder(Tracker):
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: Any, step: int) -> None:
        self.logged.append((step, values))


def test_a_row_goes_to_the_log_the_tracker_and_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "FIRST_LINE_SECONDS", 0.0)
    stream, tracker, rows = io.StringIO(), Recorder(), []
    logger = RunLogger(Console(stream=stream), tracker, rows.append, ("a", "b"))
    train: dict[str, Any] = {
        "step": 5,
        "epoch": 1,
        "train/loss": 0.5,
        "train/learning_rate": 1e-3,
        "train/images_per_second": 1234.5,
        "train/gradient_norm": None,
        "train/image_size": 32,
    }
    evaluation = {"step": 5, "epoch": 1, "split": "val", "image_size": 32, "full_image_size": 64, "best": True}
    with logger.training(10, 0):
        logger.train_row(train)
        logger.evaluation_row({**evaluation, "train/loss": 0.5}, np.array([0, 1]), np.array([[1, 0], [0.5, 0.5]]))
    loss = -np.log(0.5) / 2
    assert rows[0] == {"kind": "train", **train}
    assert rows[1] == {
        **{"kind": "evaluation", "step": 5, "epoch": 1, "split": "val", "image_size": 32},
        **{"val/loss": pytest.approx(loss), "val/accuracy": 0.5},
    }
    assert tracker.logged == [
        (5, {name: value for name, value in train.items() if "/" in name and value is not None}),
        (5, {"val/loss": pytest.approx(loss), "val/accuracy": 0.5}),
    ]
    lines = [line[9:] for line in stream.getvalue().splitlines()]
    assert lines[0].startswith("train 50 %  5/10 steps  epoch 1  loss 0.5000  lr 1.00e-03  1,234 images/s  32 px")
    assert lines[1] == "epoch      step  train loss  val loss  val accuracy"
    assert lines[2] == "    1         5      0.5000    0.3466       50.00 %  best at 32 px"


def test_the_time_left_weighs_image_sizes_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "FIRST_LINE_SECONDS", 0.0)
    stream = io.StringIO()
    left = {5: ({32: 500, 64: 1000}, {64: 300})}
    logger = RunLogger(Console(stream=stream), Tracker(), lambda row: None, ("a", "b"), lambda step: left[step])
    row = {"step": 5, "epoch": 1, "train/loss": 0.5, "train/learning_rate": 1e-3, "train/image_size": 32}
    with logger.training(10, 0):
        logger.train_row({**row, "train/images_per_second": 100.0})
    # 500 images at 32 px, 1,000 at 64 px at 3.25 times the cost, and 300 in an evaluation at a third of that.
    assert " 41 s left" in stream.getvalue()
