"""Checkpoints: exact, complete or absent, pruned last."""

import json
import shutil

import pytest
import torch
from torch.nn import functional

from mnistm_dist.config import OptimConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Scalars
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import WeightAverage, create_optimizer
from mnistm_dist.training.train_state import TrainState


def new_state(name: str, average: bool = False, seed: int = 0) -> TrainState:
    model = create_model(10, seed).to(memory_format=torch.channels_last)
    ema = WeightAverage(model, 0.9) if average else None
    return TrainState(
        model=model, train_model=model, optimizer=create_optimizer(model, OptimConfig(optimizer=name)), ema=ema
    )


def train(state: TrainState) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(state.steps_done))
    state.optimizer.zero_grad()
    functional.cross_entropy(state.model(images.to(memory_format=torch.channels_last)), torch.arange(8)).backward()
    state.optimizer.step()
    if state.ema:
        state.ema.update(state.model, state.steps_done)
    state.steps_done += 1


def save(folder, state: TrainState, step: int | None = None):
    state.steps_done = state.steps_done if step is None else step
    values = {"shards": "set", "classes": ["0", "1"], "scaler": None, "image_size": 32}
    numbers = {"mean": [0.1 + 0.2, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    scalars = Scalars(history=state.history, averaged=state.ema is not None, **values, **numbers)
    return checkpoints.save(folder, state, scalars)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd"])
def test_a_run_that_was_saved_and_restored_continues_bit_for_bit(tmp_path, name, average):
    whole = new_state(name, average)
    whole.history.pending = [0.1 + 0.2]
    for _ in range(6):
        train(whole)
        if whole.steps_done == 3:
            save(tmp_path, whole)
    resumed = new_state(name, average, seed=1)
    checkpoint = checkpoints.latest(tmp_path, pytest.fail)
    assert (checkpoint.step, checkpoint.scalars.mean[0]) == (3, 0.1 + 0.2)
    checkpoints.restore(checkpoint, resumed)
    assert (resumed.steps_done, resumed.history) == (3, whole.history)
    for _ in range(3):
        train(resumed)
    for left, right in ((whole.model, resumed.model), (whole.eval_model, resumed.eval_model)):
        pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_restored_moments_have_the_parameters_memory_format(tmp_path):
    state = new_state("adam")
    train(state)
    path = save(tmp_path, state)
    restored = new_state("adam")
    checkpoints.restore(checkpoints.open_checkpoint(path), restored)
    weight = restored.model.layer1[0].conv1.weight
    assert restored.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def damaged(path, how: str) -> None:
    model = path / checkpoints.MODEL
    data = model.read_bytes()
    match how:
        case "cut":
            model.write_bytes(data[:-100])
        case "changed":
            model.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        case "no state":
            (path / checkpoints.STATE).unlink()
        case "half a state":
            (path / checkpoints.STATE).write_text((path / checkpoints.STATE).read_text()[:50])
        case "no file":
            (path / checkpoints.TRAINING).unlink()
        case "changed scalars":
            document = json.loads((path / checkpoints.STATE).read_text())
            document["scalars"]["image_size"] = "many"
            (path / checkpoints.STATE).write_text(json.dumps(document))
        case "another format":
            document = json.loads((path / checkpoints.STATE).read_text())
            (path / checkpoints.STATE).write_text(json.dumps({**document, "format": 99}))


@pytest.mark.parametrize(
    "how", ["cut", "changed", "no state", "half a state", "no file", "changed scalars", "another format"]
)
def test_a_torn_checkpoint_is_named_and_skipped(tmp_path, how):
    run = new_state("sgd")
    good = save(tmp_path, run, 1)
    damaged(save(tmp_path, run, 2), how)
    messages: list[str] = []
    assert checkpoints.latest(tmp_path, messages.append).path == good
    assert len(messages) == 1
    assert "step-00000002" in messages[0]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    run = new_state("sgd")
    save(tmp_path, run, 1)
    leftover = tmp_path / "checkpoints" / ".step-00000002.tmp"
    leftover.mkdir()
    (leftover / checkpoints.MODEL).write_bytes(b"half")
    assert checkpoints.latest(tmp_path, pytest.fail).step == 1
    checkpoints.prune(tmp_path, keep=2, best_step=None)
    assert not leftover.exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = new_state("sgd")
    for number in (1, 2, 3, 4):
        save(tmp_path, run, number)
        checkpoints.prune(tmp_path, keep=2, best_step=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_users_copy_of_a_checkpoint_is_neither_removed_nor_taken_for_the_latest(tmp_path):
    run = new_state("sgd")
    names = ["step-00000001-paper", "step-00000002", "step-00000002.bak"]
    shutil.copytree(save(tmp_path, run, 1), tmp_path / "checkpoints" / names[0])
    shutil.copytree(save(tmp_path, run, 2), tmp_path / "checkpoints" / names[2])
    (tmp_path / "checkpoints" / ".notes").mkdir()
    checkpoints.prune(tmp_path, keep=1, best_step=None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".notes", *names]
    assert checkpoints.latest(tmp_path, pytest.fail).path.name == names[1]


def test_the_weights_of_another_model_are_refused(tmp_path):
    path = save(tmp_path, new_state("sgd"), 1)
    with pytest.raises(UserError, match="another model"):
        checkpoints.load_model(path, create_model(7, 0))


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, new_state("sgd"), 1)
