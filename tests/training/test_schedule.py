"""Learning rates, epochs and image sizes as closed forms of the step."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mnistm_dist.config import Config, OptimConfig, RunConfig, StepsConfig
from mnistm_dist.training.schedule import Schedule


def schedule(
    optim: OptimConfig, *, batch_size: int = 256, epochs: int = 10, train_size: int = 2560, **steps
) -> Schedule:
    steps_config = StepsConfig(batch_size=batch_size, epochs=epochs, **steps)
    return Schedule(config=Config(steps=steps_config, optim=optim), train_size=train_size)


def rates(optim: OptimConfig, **kwargs) -> list[float]:
    made = schedule(optim, **kwargs)
    return [made.learning_rate(step) for step in range(made.total_steps)]


def test_the_reports_schedule_falls_from_1e3_to_1e5_in_50_epochs():
    optim = OptimConfig(lr_schedule="exponential", learning_rate=1e-3, decay=0.911)
    series = rates(optim, epochs=50, train_size=256)
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


@pytest.mark.parametrize("max_steps", [None, 30])
@pytest.mark.parametrize("evaluate_every", [1, 2])
def test_the_work_that_is_left_is_that_of_the_remaining_steps(max_steps, evaluate_every):
    steps = StepsConfig(batch_size=7, epochs=6, image_size=(32, 48, 64))
    made = Schedule(config=Config(steps=steps, run=RunConfig(max_steps=max_steps)), train_size=50)

    def evaluates(step: int) -> bool:
        due = made.ends_epoch(step) and made.epoch(step + 1) % evaluate_every == 0
        return due or step + 1 == made.last_step

    for steps_done in range(made.last_step + 1):
        remaining = range(steps_done, made.last_step)
        assert made.work_left(steps_done, evaluate_every) == (
            Counter(map(made.image_size, remaining)),
            Counter(made.image_size(step) for step in remaining if evaluates(step)),
        )


def test_image_sizes_take_equal_parts_of_the_epochs_and_max_steps_only_cuts():
    made = schedule(OptimConfig(), batch_size=10, epochs=6, train_size=20, image_size=(32, 48, 64))
    assert [made.image_size(step) for step in range(12)] == [32] * 4 + [48] * 4 + [64] * 4
    assert (made.total_steps, made.last_step) == (12, 12)
    cut = Schedule(config=replace(made.config, run=RunConfig(max_steps=5)), train_size=20)
    assert (cut.total_steps, cut.last_step) == (12, 5)
    assert [cut.learning_rate(step) for step in range(5)] == [made.learning_rate(step) for step in range(5)]


def test_an_epoch_ends_with_the_step_that_takes_its_last_image():
    made = schedule(OptimConfig(), batch_size=8, epochs=2, train_size=20)
    assert [step for step in range(made.total_steps) if made.ends_epoch(step)] == [2, 4]
    assert [made.epoch(step) for step in range(5)] == [0, 0, 0, 1, 1]
    assert [made.epoch(steps) for steps in range(6)] == [0, 0, 0, 1, 1, 2]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), batch=st.integers(1, 300), step=st.integers(0, 3000))
def test_an_epoch_ends_with_the_first_step_that_reaches_its_last_position(size, batch, step):
    made = schedule(OptimConfig(), batch_size=batch, train_size=size)
    ends = any(step * batch < (e + 1) * size <= (step + 1) * batch for e in range((step + 1) * batch // size + 1))
    assert made.ends_epoch(step) == ends
    assert made.epoch(step + 1) == (step + 1) * batch // size


@settings(max_examples=60, deadline=None)
@given(epochs=st.integers(1, 10), size=st.integers(1, 10**6), batch=st.integers(1, 5000))
@example(epochs=10, size=55_000, batch=256)
def test_a_run_of_whole_epochs_ends_with_its_last_epoch(epochs, size, batch):
    made = schedule(OptimConfig(), batch_size=batch, epochs=epochs, train_size=size)
    assert made.total_steps * batch >= epochs * size > (made.total_steps - 1) * batch
    assert made.ends_epoch(made.total_steps - 1)
