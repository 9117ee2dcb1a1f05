"""The source report's model, printed and counted."""

import pytest
import torch
from torch import nn

from mnistm_dist.training.initial_state import architecture
from mnistm_dist.training.models import create_model


def test_the_model_has_692106_parameters():
    assert sum(p.numel() for p in create_model(10, 0).parameters()) == 692_106


def test_the_weights_depend_on_the_seed_and_no_random_state_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    before = torch.random.get_rng_state()
    first, second, again = create_model(10, 0), create_model(10, 1), create_model(10, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_the_architecture_is_that_of_the_source_report():
    text = " ".join(repr(create_model(10, 0)).split())
    for part in (
        "(conv1): Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)",
        "(maxpool): MaxPool2d(kernel_size=3, stride=2, padding=1",
        "(downsample): Sequential( (0): Conv2d(64, 128, kernel_size=(1, 1), stride=(2, 2), bias=False) "
        "(1): BatchNorm2d(128",
        "(avgpool): AdaptiveAvgPool2d(output_size=1)",
        "(fc): Sequential( (0): Linear(in_features=128, out_features=64, bias=True) (1): BatchNorm1d(64",
        "(2): GELU(approximate='none') (3): Linear(in_features=64, out_features=10, bias=True) )",
    ):
        assert part in text
    assert "layer3" not in text
    assert "layer4" not in text


def test_the_layers_are_torchvisions_resnet18():
    """With equal weights the trunk equals ResNet18's up to layer2."""
    from torchvision.models import resnet18

    left, right = create_model(10, 0).eval(), resnet18(weights=None).eval()
    trunk = {name: value for name, value in left.state_dict().items() if not name.startswith("fc")}
    right.load_state_dict(trunk, strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = right.maxpool(right.relu(right.bn1(right.conv1(images))))
        pooled = torch.flatten(right.avgpool(right.layer2(right.layer1(x))), 1)
        assert torch.equal(left(images), left.fc(pooled))


@pytest.mark.parametrize("size", [16, 28, 32, 64, 65])
def test_the_model_accepts_images_of_any_size(size):
    assert create_model(7, 0)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = create_model(10, 3).state_dict()
    state = torch.get_rng_state()
    again, other = create_model(10, 3).state_dict(), create_model(10, 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_architecture_table_counts_every_parameter_once():
    rows = architecture(create_model(10, 0), 64)
    assert sum(row["parameters"] for row in rows) == 692_106
    assert rows[0]["output_shape"] == [64, 32, 32]
    assert rows[-1] == {
        "name": "fc.3",
        "layer": repr(nn.Linear(64, 10)),
        "output_shape": [10],
        "parameters": 650,
        "flops": 1280,
    }
