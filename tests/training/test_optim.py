"""Optimizers, and the moving average of the weights."""

import math
from dataclasses import replace

import pytest
import torch

from mnistm_dist.config import OptimConfig
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import WeightAverage, create_optimizer, orthogonalize


def test_adam_decays_every_parameter_and_the_others_none_of_one_dimension():
    model = create_model(10, 0)
    assert [g["weight_decay"] for g in create_optimizer(model, OptimConfig(optimizer="adam")).param_groups] == [0.05]
    for name in ("adamw", "sgd"):
        decayed, free = create_optimizer(model, OptimConfig(optimizer=name)).param_groups
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
        assert all(p.ndim >= 2 for p in decayed["params"])
        assert all(p.ndim == 1 for p in free["params"])
        assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == 692_106


@pytest.mark.parametrize("shape", [(2, 16, 40), (1, 64, 147), (3, 40, 16)])
def test_orthogonal_steps_keep_the_directions_and_level_the_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    in_their_own_bases = u.mT @ result @ vt.mT
    sizes = in_their_own_bases.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.3
    assert torch.allclose(in_their_own_bases, torch.diag_embed(sizes), atol=1e-4)


def test_a_zero_gradient_does_not_change_the_weights():
    assert torch.equal(orthogonalize(torch.zeros(1, 8, 9)), torch.zeros(1, 8, 9))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_convolutions_as_far_as_adamw_would_and_all_else_by_adamw(layout):
    config = OptimConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    models = [create_model(10, 0).to(memory_format=layout) for _ in range(2)]
    optimizers = [create_optimizer(models[0], config), create_optimizer(models[1], replace(config, optimizer="adamw"))]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for model, optimizer in zip(models, optimizers, strict=True):
        model(images).logsumexp(1).sum().backward()
        optimizer.step()
    began = create_model(10, 0)
    for before, muon, adamw in zip(*(model.parameters() for model in (began, *models)), strict=True):
        if before.ndim == 4:
            step = (muon - before).flatten(1)
            assert 0.1 < step.square().mean().sqrt() / 0.01 < 0.3
        else:
            assert torch.equal(muon, adamw)


def test_muon_does_not_depend_on_the_memory_format():
    gradient, weights = torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(2)), []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = create_model(10, 0).to(memory_format=layout)
        optimizer = create_optimizer(model, OptimConfig(optimizer="muon"))
        for _ in range(3):
            model.conv1.weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        weights.append(model.conv1.weight.detach().contiguous())
    assert torch.allclose(*weights, atol=1e-6)


def test_adam_has_the_reports_momentum():
    group = create_optimizer(create_model(10, 0), OptimConfig(optimizer="adam", momentum=0.95)).param_groups[0]
    assert group["betas"] == (0.95, 0.999)


def test_the_average_follows_its_formula_and_copies_counters():
    model = create_model(10, 0)
    average = WeightAverage(model, 0.9)
    expected = model.fc[3].weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.fc[3].weight.add_(1)
            model.bn1.num_batches_tracked.add_(1)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.fc[3].weight.detach()
    assert torch.allclose(average.model.fc[3].weight, expected, atol=1e-6)
    assert int(average.model.bn1.num_batches_tracked) == 5
    assert not math.isclose(float(expected[0, 0]), float(model.fc[3].weight.detach()[0, 0]))
