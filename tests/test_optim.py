"""Learning rates as closed forms, optimizers, the average of the weights."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mnistm_dist.config import OptimConfig
from mnistm_dist.training.models import create_model
from mnistm_dist.training.optim import WeightAverage, create_optimizer, learning_rate, orthogonalize


def rates(config: OptimConfig, *, steps: int = 100, batch_size: int = 256, per_epoch: int = 10) -> list[float]:
    return [
        learning_rate(config, step=s, total_steps=steps, batch_size=batch_size, epoch=s // per_epoch)
        for s in range(steps)
    ]


def test_the_reports_schedule_falls_from_1e3_to_1e5_in_50_epochs():
    config = OptimConfig(lr_schedule="exponential", learning_rate=1e-3, decay=0.911)
    series = rates(config, steps=50, per_epoch=1)
    assert series[0] == 1e-3
    assert series[1] == pytest.approx(1e-3 * 0.911)
    assert 0.9e-5 < series[49] < 1.1e-5


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    series = rates(OptimConfig(lr_schedule="one-cycle", learning_rate=0.01, warmup=0.25))
    peak = max(range(100), key=series.__getitem__)
    assert 23 <= peak <= 25
    assert series[peak] == pytest.approx(0.01, rel=1e-2)
    assert all(a < b for a, b in pairwise(series[: peak + 1]))
    assert 0 < series[-1] < 1e-4


def test_one_cycle_without_warmup_starts_at_its_peak():
    assert rates(OptimConfig(lr_schedule="one-cycle", learning_rate=0.01, warmup=0))[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_the_rate_scales_with_the_batch(scaling, factor):
    config = OptimConfig(lr_schedule="constant", learning_rate=0.1, lr_scaling=scaling, base_batch_size=256)
    assert rates(config, batch_size=1024)[0] == pytest.approx(0.1 * factor)


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
    found = orthogonalize(matrices)
    in_their_own_bases = u.mT @ found @ vt.mT
    sizes = in_their_own_bases.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.3
    assert torch.allclose(in_their_own_bases, torch.diag_embed(sizes), atol=1e-4)


def test_a_gradient_of_zero_steps_nowhere():
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
