"""The model before the first step: what can be trained, its initial weights, and what is refused in one line."""

import shutil

import pytest
import torch
from conftest import error_of
from own_models import Odd, small
from safetensors.torch import load_file, save_file
from torch import nn

from mnistm_dist.config import OptimConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training import checkpoint as checkpoints
from mnistm_dist.training.checkpoint import Scalars
from mnistm_dist.training.initial_state import architecture, check_model, load_initial_weights
from mnistm_dist.training.models import create_model, name_of
from mnistm_dist.training.optim import WeightAverage, create_optimizer
from mnistm_dist.training.train_state import TrainState


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:squeezenet1_1", "own_models:Odd", "own_models:small"]
)
def test_any_model_has_weights_of_the_seed_alone_and_all_its_parameters_in_the_table(name):
    first, again, other = create_model(3, 0, name), create_model(3, 0, name), create_model(3, 1, name)
    left, right = first.state_dict(), again.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert any(not torch.equal(left[key], value) for key, value in other.state_dict().items())
    rows = check_model(first, name, 3, (32,))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert all(torch.equal(value, right[key]) for key, value in first.state_dict().items()), "the model was changed"
    assert first.training


def test_flops_are_two_per_multiplication_and_belong_to_the_layer_that_computes_them():
    rows = {row["name"]: row for row in architecture(small(3), 32)}
    # 15 x 15 outputs of 8 channels from 3 x 3 x 3 values; 7 x 7 of 16 from 8 x 3 x 3.
    assert rows["0"]["flops"] == 2 * 15 * 15 * 8 * 27
    assert rows["3"]["flops"] == 2 * 7 * 7 * 16 * 72
    assert sum(row["flops"] for row in rows.values()) == 2 * (15 * 15 * 8 * 27 + 7 * 7 * 16 * 72 + 16 * 3)
    attention = {row["name"]: row for row in architecture(Odd(3), 32)}["attention"]
    assert (attention["layer"], attention["output_shape"]) == ("MultiheadAttention", [4, 8])
    # Four positions of 8: three projections, two products of the attention, one projection.
    assert attention["flops"] == 2 * (4 * 8 * 24 + 2 * 4 * 4 * 8 + 4 * 8 * 8)


def test_a_layer_that_is_called_twice_is_one_row():
    shared = nn.Linear(8, 8)
    rows = architecture(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 8), shared, nn.ReLU(), shared), 32)
    assert [row["name"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["flops"] for row in rows][2:] == [2 * 192 * 8, 2 * 2 * 64, 0]


REFUSED = {
    "resnet18": "model resnet18: unknown (did you mean torchvision:resnet18?); use pruned-resnet18, torchvision:NAME",
    "torchvision:resnet81": "unknown (did you mean torchvision:resnet18?)",
    "torchvision:fasterrcnn_resnet50_fpn": "unknown",
    "torchvision:": "model torchvision:: unknown; use pruned-resnet18, torchvision:NAME or module:function",
    "own_models:": "model own_models:: unknown; use pruned-resnet18, torchvision:NAME or module:function",
    "own_modles:small": "error: model own_modles:small: no module own_modles in ",
    "own_models:CONSTANT": "own_models has no function CONSTANT; name one of its",
    "own_models:smal": "own_models has no function smal (did you mean small?)",
    "own_models:no_module": "the function returned int; it should be a torch.nn.Module",
    "own_models:raises": "cannot be created: KeyError: 'layers' (own_models.py, line",
    "own_models:no_parameters": "no parameter to train",
    "own_models:lazy": "no parameter to train, or a lazy one",
    "own_models:Misspelt": "fails on images of 28 px; choose another --image-size or --model: AttributeError: "
    "'Misspelt' object has no attribute 'boddy' (own_models.py, line",
    "own_models:too_wide": "gives torch.float32 (1, 11) for images (1, 3, 28, 28) in evaluation; should be logits",
    "own_models:for_32_pixels": "fails on images of 28 px; choose another --image-size or --model: RuntimeError",
    "own_models:Returns": "gives dict () for images",
    "own_models:Classes": "gives torch.int64 (1, 10)",
    "own_models:Squeezed": "gives torch.float32 (10,) for images (1, 3, 28, 28) in evaluation",
    "own_models:Unused": "no gradient for extra.weight, extra.bias at 28 px; remove them, or freeze",
    "own_models:Detached": "element 0 of tensors does not require grad",
    "torchvision:densenet121": "fails on images of 28 px; choose another --image-size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line_before_a_run_folder_is_made(run_main, small_set, tmp_path, name):
    from mnistm_dist.train import main

    flags = ("--batch-size", 32, "--threads", 1, "--tracker", "none", "--no-report")
    done = run_main(main, "--shards", small_set, "--run-dir", "run", "--model", name, "--image-size", "28,32", *flags)
    assert REFUSED[name] in error_of(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("torchvision:googlenet", 64, r"gives GoogLeNetOutputs \(\) for images \(2, 3, 64, 64\) in training"),
        ("torchvision:squeezenet1_1", 16, "fails on images of 16 px"),
        pytest.param(
            *("torchvision:vit_b_16", 64, "Wrong image height! Expected 224 but got 64!"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_size_or_an_output_that_does_not_fit_is_named(name, size, message):
    with pytest.raises(UserError, match=message):
        check_model(create_model(3, 0, name), name, 3, (size,))


def test_a_function_is_recorded_by_a_name_that_finds_it_again():
    assert name_of(small) == "own_models:small"
    assert name_of(Odd) == "own_models:Odd"
    message = r"define it at the top level of a module of its own, such as my_models\.py"
    for function in (lambda classes: small(classes), nn.Linear(2, 2).forward, pytest.mark.slow, small(3)):
        with pytest.raises(UserError, match=message) as refused:
            name_of(function)
        assert "\n" not in str(refused.value)


def odd_state(name: str) -> TrainState:
    model = create_model(3, 0, "own_models:Odd")
    optimizer = create_optimizer(model, OptimConfig(optimizer=name))
    return TrainState(model=model, train_model=model, optimizer=optimizer, ema=WeightAverage(model, 0.9))


def step(state: TrainState) -> None:
    state.optimizer.zero_grad()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(state.steps_done))
    nn.functional.cross_entropy(state.model(images), torch.tensor([0, 1, 2, 0])).backward()
    state.optimizer.step()
    state.ema.update(state.model, state.steps_done)
    state.steps_done += 1


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd"])
def test_every_optimizer_and_the_average_take_any_parameter_and_resume_bit_for_bit(tmp_path, name):
    whole, resumed = odd_state(name), odd_state(name)
    numbers = {"mean": [0.5] * 3, "std": [0.25] * 3}
    for _ in range(4):
        step(whole)
        if whole.steps_done == 2:
            scalars = {"shards": "set", "classes": ["a", "b", "c"], "scaler": None, "image_size": 32, "averaged": True}
            path = checkpoints.save(tmp_path, whole, Scalars(history=whole.history, **scalars, **numbers))
    checkpoints.restore(checkpoints.open_checkpoint(path), resumed)
    assert resumed.model.second.weight is resumed.model.first.weight
    step(resumed)
    step(resumed)
    for left, right in ((whole.model, resumed.model), (whole.ema.model, resumed.ema.model)):
        pairs = zip(left.state_dict().items(), right.state_dict().values(), strict=True)
        assert all(torch.equal(value, other) for (_, value), other in pairs)
    assert torch.equal(whole.ema.model.mask, Odd(3).mask)
    assert torch.equal(whole.model.frozen, torch.ones(8))
    assert not torch.equal(whole.model.first.weight, odd_state(name).model.first.weight)


def test_weights_of_other_classes_leave_the_last_layer_as_it_was(tmp_path):
    source, model = create_model(10, 1), create_model(3, 0)
    head = model.fc[3].weight.clone()
    save_file(source.state_dict(), tmp_path / "ten.safetensors")
    assert load_initial_weights(model, tmp_path / "ten.safetensors", 3) == ["fc.3.bias", "fc.3.weight"]
    assert torch.equal(model.fc[3].weight, head)
    assert torch.equal(model.fc[0].weight, source.fc[0].weight)
    same = create_model(10, 0)
    assert load_initial_weights(same, tmp_path / "ten.safetensors", 10) == []
    assert torch.equal(same.fc[3].weight, source.fc[3].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bn1.weight"), "missing: bn1.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda w: w.update({"conv1.weight": torch.ones(64, 1, 7, 7)}), "of another shape: conv1.weight"),
        # Neither is the last layer alone.
        (lambda w: w.update({"fc.3.bias": torch.ones(5)}), r"of another shape: fc\.3\.bias, fc\.3\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    weights = dict(create_model(10, 0).state_dict())
    change(weights)
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=f"file.safetensors: the weights of another model; {message}; "):
        load_initial_weights(create_model(3, 0), tmp_path / "file.safetensors", 3)


def test_a_run_starts_from_the_result_of_another_and_records_the_file(run_main, trained_run, small_set, tmp_path):
    from mnistm_dist.config import load
    from mnistm_dist.train import main

    flags = ("--batch-size", 32, "--image-size", 32, "--threads", 1, "--tracker", "none", "--no-report")
    shards = ("--shards", small_set, "--run-dir", "run", "--learning-rate", 0, "--ema-decay", 0, "--max-steps", 1)
    done = run_main(main, *shards, *flags, "--init-from", trained_run, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"initial weights  {trained_run}\n" in done.stdout
    chosen, _ = checkpoints.choose_checkpoint(trained_run, "chosen", has_test=True)
    source = load_file(chosen.path / "model.safetensors")
    result = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert torch.equal(source["conv1.weight"], result["conv1.weight"])
    network = load(tmp_path / "run" / "config.yaml").network
    assert (network.init_from, len(network.init_sha256)) == (str(trained_run), 64)
    # A resume does not read it, and refuses another.
    assert run_main(main, "--resume", "run", "--max-steps", 2).returncode == 0
    assert "init_from was" in error_of(run_main(main, "--resume", "run", "--max-steps", 3, "--init-from", "other"))
    # Without a checkpoint it starts again, from the same file only.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "state.json").unlink()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(network.init_sha256, "f" * 64))
    assert "its sha256 is" in error_of(run_main(main, "--resume", "run"))


def test_initial_weights_may_be_those_of_a_named_checkpoint(trained_run, tmp_path):
    for folder in (trained_run / "checkpoints").iterdir():
        assert checkpoints.find_weights(str(folder))[0] == folder / "model.safetensors"
    torn = shutil.copytree(folder, tmp_path / "checkpoints" / folder.name)
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="torn"):
        checkpoints.find_weights(str(torn))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "cannot be read (No such file"),
        (".", "not a run folder"),
        ("text", "name a run, or a .safetensors file: safetensors.torch.save_file(state_dict, PATH) writes one"),
    ],
)
def test_initial_weights_that_cannot_be_read_are_one_line(run_main, small_set, tmp_path, name, message):
    from mnistm_dist.train import main

    (tmp_path / "text").write_text("no weights")
    done = run_main(main, "--shards", small_set, "--run-dir", "run", "--batch-size", 32, "--init-from", name)
    assert message in error_of(done)
    assert not (tmp_path / "run").exists()
