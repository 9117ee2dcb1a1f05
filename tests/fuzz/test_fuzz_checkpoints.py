"""Checkpoints from elsewhere, damaged and forged, as `evaluate`, `predict` and ``train --resume`` open them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Fuzz, changed, damaged
from hypothesis import strategies as st
from torch.nn import functional

from mnistm_dist import config
from mnistm_dist.config import OptimConfig
from mnistm_dist.inference import load_model
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import choose_checkpoint
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import create_optimizer
from mnistm_dist.training.train_state import BestEvaluation, TrainingHistory, TrainState

pytest_plugins = ["fuzzing"]
SCALARS = checkpoints.Scalars(
    history=TrainingHistory(
        train_seconds=1.5, best=BestEvaluation(step=1, accuracy=0.5, image_size=32), pending=[1.0, 2.0]
    ),
    shards="ab" * 32,
    classes=[str(digit) for digit in range(10)],
    learning={"micro_batch": 8, "image_size": [32]},
    scaler=None,
    averaged=False,
    image_size=32,
    mean=[0.5, 0.5, 0.5],
    std=[0.2, 0.2, 0.2],
)
STEP_1 = Path("run/checkpoints/step-00000001")


def new_state() -> TrainState:
    model = create_model(10, 0)
    optimizer = create_optimizer(model, OptimConfig(optimizer="sgd"))
    return TrainState(model=model, train_model=model, optimizer=optimizer, ema=None)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with its checkpoint."""
    folder = tmp_path_factory.mktemp("valid") / "run"
    state = new_state()
    functional.cross_entropy(state.model(torch.zeros(2, 3, 32, 32)), torch.arange(2)).backward()
    state.optimizer.step()
    state.steps_done = 1
    checkpoints.save(folder, state, SCALARS)
    (folder / "config.yaml").write_text(config.dump(config.Config()))
    return folder


def open_as(command: str) -> None:
    """Open the checkpoint as a resume or a prediction does."""
    if command == "resume":
        checkpoints.restore(checkpoints.open_checkpoint(STEP_1), new_state())
        return
    for which in ("chosen", "best", str(STEP_1)):
        choose_checkpoint(Path("run"), which, has_test=True)
    model = load_model(Path("run"), STEP_1, device="cpu")
    model.predict(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


COMMANDS = st.sampled_from(["resume", "predict"])


def test_a_forged_state_of_a_checkpoint_is_loaded_or_refused_in_a_line(fuzz: Fuzz, valid: Path) -> None:
    shutil.copytree(valid, "run")
    content = (STEP_1 / checkpoints.STATE).read_bytes()
    document = json.loads(content)

    def attempt(drawn: tuple[bytes, str]) -> None:
        (STEP_1 / checkpoints.STATE).write_bytes(drawn[0])
        open_as(drawn[1])

    scalars = changed(document["scalars"]).map(lambda value: {**document, "scalars": value})
    forged = (scalars | changed(document)).map(lambda value: json.dumps(value).encode())
    fuzz(st.tuples(forged | damaged(content), COMMANDS), attempt)


@pytest.mark.parametrize("name", [checkpoints.MODEL, checkpoints.TRAINING])
def test_forged_tensors_of_a_checkpoint_are_loaded_or_refused_in_a_line(fuzz: Fuzz, valid: Path, name: str) -> None:
    """The header of a safetensors file is JSON after its length; the forged file gets its own checksum."""
    shutil.copytree(valid, "run")
    content = (STEP_1 / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads((STEP_1 / checkpoints.STATE).read_text())

    def with_length(header: Any) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text

    def attempt(drawn: tuple[bytes, str]) -> None:
        data = drawn[0] + content[8 + length :]
        (STEP_1 / name).write_bytes(data)
        document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (STEP_1 / checkpoints.STATE).write_text(json.dumps(document))
        open_as(drawn[1])

    headers = changed(json.loads(content[8 : 8 + length])).map(with_length) | damaged(content[: 8 + length])
    fuzz(st.tuples(headers, COMMANDS), attempt)
