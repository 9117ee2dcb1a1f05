"""Checkpoints from anywhere, damaged and forged, as `evaluate`, `predict` and ``train --resume`` take them up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from inputs import changed, damaged
from search import Fuzz
from torch.nn import functional

from mnistm_dist import config
from mnistm_dist.config import OptimConfig
from mnistm_dist.inference import load_model
from mnistm_dist.results import choose_checkpoint
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import create_optimizer

pytest_plugins = ["counting"]
SCALARS = {
    "past": {"train_seconds": 1.5, "best": {"step": 1, "accuracy": 0.5, "image_size": 32}, "pending": [1.0, 2.0]},
    "shards": "ab" * 32,
    "micro_batch": 8,
    "threads": 1,
    "scaler": None,
    "averaged": False,
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


def started() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = create_model(10, 0)
    return model, create_optimizer(model, OptimConfig(optimizer="sgd"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with its checkpoint."""
    folder = tmp_path_factory.mktemp("valid") / "run"
    model, optimizer = started()
    functional.cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.arange(2)).backward()
    optimizer.step()
    checkpoints.save(folder, step=1, model=model, averaged=None, optimizer=optimizer, scalars=SCALARS)
    (folder / "config.yaml").write_text(config.dump(config.Config()))
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of it in the working folder; gives its checkpoint."""
    target = tmp_path / "run" / "checkpoints" / "step-00000001"
    target.mkdir(parents=True)
    for name in (checkpoints.MODEL, checkpoints.TRAINING, checkpoints.STATE):
        (target / name).write_bytes((run / "checkpoints" / target.name / name).read_bytes())
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    return target


def take_up(path: Path) -> None:
    """What a resume and a prediction do with it."""
    found = checkpoints.open_checkpoint(path)
    model, optimizer = started()
    checkpoints.restore(found, model=model, averaged=None, optimizer=optimizer)


def use(path: Path) -> None:
    """What a prediction does with it."""
    for which in ("chosen", "best", str(path)):
        choose_checkpoint(path.parents[1], which, has_test=True)
    model = load_model(path.parents[1], path, device="cpu")
    model.predict(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


def test_a_forged_state_of_a_checkpoint_is_taken_up_or_refused_in_a_line(fuzz: Fuzz, copied: Path) -> None:
    whole = (copied / checkpoints.STATE).read_bytes()

    def attempt(drawn: tuple[bytes, bool]) -> None:
        (copied / checkpoints.STATE).write_bytes(drawn[0])
        (use if drawn[1] else take_up)(copied)

    document = json.loads(whole)
    scalars = changed(document["scalars"]).map(lambda value: {**document, "scalars": value})
    values = (scalars | changed(document)).map(lambda value: json.dumps(value).encode())
    fuzz.search("checkpoint, state.json", 0.0396, st.tuples(values | damaged(whole), st.booleans()), attempt)


@pytest.mark.parametrize("name", [checkpoints.MODEL, checkpoints.TRAINING])
def test_forged_tensors_of_a_checkpoint_are_taken_up_or_refused_in_a_line(fuzz: Fuzz, copied: Path, name: str) -> None:
    """The header of safetensors is JSON after its length: what is changed there is signed anew, as a forger would."""
    whole = (copied / name).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    document = json.loads((copied / checkpoints.STATE).read_text())

    def attempt(drawn: tuple[Any, bytes, bool, bool]) -> None:
        values, head, of_values, for_use = drawn
        if of_values:
            text = json.dumps(values).encode()
            head = len(text).to_bytes(8, "little") + text
        data = head + whole[8 + length :]
        (copied / name).write_bytes(data)
        document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (copied / checkpoints.STATE).write_text(json.dumps(document))
        (use if for_use else take_up)(copied)

    inputs = st.tuples(changed(header), damaged(whole[: 8 + length]), st.booleans(), st.booleans())
    fuzz.search(f"checkpoint, {name}", 0.0198, inputs, attempt)
