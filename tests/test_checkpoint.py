"""Checkpoints: exact, whole or not at all, pruned last."""

import json

import pytest
import torch
from torch.nn import functional

from mnistm_dist.config import OptimConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import WeightAverage, create_optimizer


def started(name: str, average: bool = False, seed: int = 0):
    model = create_model(10, seed).to(memory_format=torch.channels_last)
    return model, create_optimizer(model, OptimConfig(optimizer=name)), WeightAverage(model, 0.9) if average else None


def step(model, optimizer, average, number: int) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    functional.cross_entropy(model(images.to(memory_format=torch.channels_last)), torch.arange(8)).backward()
    optimizer.step()
    if average:
        average.update(model, number)


def save(folder, run, number: int):
    model, optimizer, average = run
    return checkpoints.save(
        folder, step=number, model=model, averaged=average and average.model, optimizer=optimizer, scalars={"n": number}
    )


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_run_that_was_saved_and_restored_goes_on_bit_for_bit(tmp_path, name, average):
    whole = started(name, average)
    for number in range(6):
        step(*whole, number)
        if number == 2:
            save(tmp_path, whole, 3)
    resumed = started(name, average, seed=1)
    model, optimizer, weights = resumed
    found = checkpoints.latest(tmp_path, pytest.fail)
    assert (found.step, found.state) == (3, {"n": 3})
    checkpoints.restore(found, model=model, averaged=weights and weights.model, optimizer=optimizer)
    for number in range(3, 6):
        step(*resumed, number)
    for one, other in ((whole[0], model), (whole[2], weights)):
        if one is not None:
            one, other = getattr(one, "model", one), getattr(other, "model", other)
            assert all(
                torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
            )


def test_restored_moments_have_the_parameters_memory_format(tmp_path):
    run = started("adam")
    step(*run, 0)
    path = save(tmp_path, run, 1)
    model, optimizer, _ = started("adam")
    checkpoints.restore(checkpoints.open_checkpoint(path), model=model, averaged=None, optimizer=optimizer)
    weight = model.layer1[0].conv1.weight
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


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
        case "another format":
            document = json.loads((path / checkpoints.STATE).read_text())
            (path / checkpoints.STATE).write_text(json.dumps({**document, "format": 99}))


@pytest.mark.parametrize("how", ["cut", "changed", "no state", "half a state", "no file", "another format"])
def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path, how):
    run = started("sgd")
    good = save(tmp_path, run, 1)
    damaged(save(tmp_path, run, 2), how)
    told: list[str] = []
    assert checkpoints.latest(tmp_path, told.append).path == good
    assert len(told) == 1
    assert "step-00000002" in told[0]


def test_what_a_kill_left_half_written_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    run = started("sgd")
    save(tmp_path, run, 1)
    leftover = tmp_path / "checkpoints" / ".step-00000002.123"
    leftover.mkdir()
    (leftover / checkpoints.MODEL).write_bytes(b"half")
    assert checkpoints.latest(tmp_path, pytest.fail).step == 1
    checkpoints.prune(tmp_path, keep=2, best=None)
    assert not leftover.exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = started("sgd")
    for number in (1, 2, 3, 4):
        save(tmp_path, run, number)
        checkpoints.prune(tmp_path, keep=2, best="step-00000001")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000003", "step-00000004"]


def test_going_back_to_a_step_removes_what_came_after_it(tmp_path):
    run = started("sgd")
    for number in (1, 2, 30):
        save(tmp_path, run, number)
    checkpoints.discard_after(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_the_weights_of_another_model_are_refused(tmp_path):
    path = save(tmp_path, started("sgd"), 1)
    with pytest.raises(UserError, match="another model"):
        checkpoints.load_model(path, create_model(7, 0))


def test_saving_where_nothing_can_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, started("sgd"), 1)
