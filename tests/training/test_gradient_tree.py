"""The sum of a step's gradients, and BatchNorm's statistics: the same bits however the micro-batches are shared."""

from __future__ import annotations

import hashlib
import random
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import error_of, output_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import wait_for_step
from torch import Tensor, nn

from mnistm_dist.config import MachineConfig
from mnistm_dist.errors import UserError
from mnistm_dist.training.distributed import World
from mnistm_dist.training.gradient_tree import GradientTree, TreeSum, roots
from mnistm_dist.training.hardware import check_reproducible
from mnistm_dist.training.run_dir import read_log


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def reference(leaves: list[float]) -> float:
    """Return the sum in the order of the tree, in pure Python: halves at the largest power of two, added in float32."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return float32(reference(leaves[:half]) + reference(leaves[half:]))


def left_to_right(leaves: list[float]) -> float:
    total = leaves[0]
    for leaf in leaves[1:]:
        total = float32(total + leaf)
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70), st.data())
def test_the_sum_of_the_roots_of_any_shares_is_that_of_the_tree(leaves, data):
    world = data.draw(st.integers(1, len(leaves)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(leaves) - 1), max_size=world - 1))) if len(leaves) > 1 else []
    whole = TreeSum()
    for start, stop in pairwise([0, *cuts, len(leaves)]):
        own = TreeSum()
        for leaf in range(start, stop):
            own.add((0, leaf), torch.tensor([leaves[leaf]]))
        assert [node for node, _ in own.nodes] == roots(range(start, stop))
        assert len(own.nodes) <= 2 * (stop - start).bit_length()
        for node, value in own.nodes:
            whole.add(node, value)
    total = float(whole.total())
    assert total == reference(leaves)
    assert total == pytest.approx(left_to_right(leaves), rel=1e-3, abs=100)


def test_the_tree_is_not_a_sum_from_left_to_right():
    leaves = [1.0, 2**-24, 2**-24, 2**-24]
    assert (reference(leaves), left_to_right(leaves)) == (1 + 2**-23, 1.0)


class OneProcess:
    """A world of one, which exchanges nothing."""

    size, rank, device = 1, 0, torch.device("cpu")
    gather_rows = World.gather_rows


def a_step(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Train one step and return the gradients, the parameters' own memory format kept."""
    tree = GradientTree(model, OneProcess(), [range(len(inputs))])
    tree.begin_step()
    for batch in inputs:
        tree.begin_micro_batch()
        model(batch).square().mean().backward()
        tree.end_micro_batch()
    tree.reduce()
    return [parameter.grad for parameter in model.parameters()]


def small_model(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *more, nn.Flatten(), nn.Linear(128, 2))
    return model.to(memory_format=torch.channels_last)


def test_gradients_and_statistics_are_those_of_plain_torch():
    inputs = list(torch.randn(6, 4, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    model, plain = small_model(), small_model()
    gradients = a_step(model, inputs)
    for batch in inputs:
        (plain(batch).square().mean() / len(inputs)).backward()
    for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
        assert gradient.stride() == parameter.stride()
        torch.testing.assert_close(gradient, parameter.grad)
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


def test_a_frozen_batchnorm_and_an_unused_parameter_are_left_as_they_are():
    model = small_model()
    model[1].eval()
    model.unused = nn.Parameter(torch.ones(3))
    before = [buffer.clone() for buffer in model.buffers()]
    a_step(model, list(torch.randn(3, 4, 3, 6, 6)))
    assert all(torch.equal(left, right) for left, right in zip(before, model.buffers(), strict=True))
    assert model.unused.grad.tolist() == [0, 0, 0]


class Counts(nn.Module):
    """A layer with state that no other rank would know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Counts, "its buffer 3.calls"),
        (lambda: nn.InstanceNorm2d(8, track_running_stats=True), "its buffer 3.running_mean"),
        (lambda: nn.BatchNorm2d(8, momentum=None), "3, a BatchNorm, has momentum None"),
    ],
)
def test_state_that_would_depend_on_the_processes_is_refused_by_name(layer, named):
    with pytest.raises(UserError, match=named):
        a_step(small_model(layer()), list(torch.randn(2, 4, 3, 6, 6)))


# Whole trainings

QUICK = (
    *("--batch-size", 48, "--micro-batch", 8, "--image-size", 16, "--max-steps", 5, "--log-every", 1, "--epochs", 4),
    *("--reproducible", "--tracker", "none", "--no-report"),
)


def model_of(run: Path) -> str:
    return hashlib.sha256((max((run / "checkpoints").glob("step-*")) / "model.safetensors").read_bytes()).hexdigest()


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_log(run / "log.jsonl") if row["kind"] == "train"]


@pytest.fixture
def trained(run_command, small_set, tmp_path):
    """Train with some flags on some processes; return the run folder."""

    def train(world_size: int, *flags: object, name: str = "w", **extra: object) -> Path:
        run = tmp_path / f"{name}{world_size}"
        flags = ("--shards", small_set, "--run-dir", run, *flags)
        output_of(run_command("train", *flags, world_size=world_size, timeout=900, **extra))
        resumed = [row for row in read_log(run / "log.jsonl") if row["kind"] in ("start", "resume")]
        assert resumed[-1]["world_size"] == world_size
        return run

    return train


@pytest.mark.parametrize(
    "flags",
    [
        ("--recipe", "fast", "--max-grad-norm", 0.5),
        pytest.param(("--recipe", "baseline", "--reader", "streaming", "--order", "windowed"), marks=pytest.mark.slow),
        pytest.param(("--recipe", "fast", "--memory-format", "contiguous"), marks=pytest.mark.slow),
    ],
)
def test_the_model_is_the_same_bytes_on_one_two_and_three_processes(trained, flags):
    runs = [trained(world_size, *flags, *QUICK) for world_size in (1, 2, 3)]
    assert len({model_of(run) for run in runs}) == 1
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    assert len({(run / "predictions_test.csv").read_bytes() for run in runs}) == 1


@pytest.mark.slow
def test_in_bf16_the_model_is_the_same_bytes_on_one_two_and_three_processes(trained):
    runs = [trained(w, *QUICK, "--precision", "bf16", before="injected:native_bf16") for w in (1, 2, 3)]
    assert len({model_of(run) for run in runs}) == 1


def test_a_model_with_dropout_is_the_same_bytes_on_any_processes_and_after_a_resume(trained):
    dropout = ("--model", "own_models:with_dropout")
    runs = [trained(world_size, *QUICK, *dropout) for world_size in (1, 3)]
    cut = trained(2, *QUICK, *dropout, "--max-steps", 2, name="cut")
    cut = trained(2, "--resume", cut / "checkpoints" / "step-00000002", "--max-steps", 5, name="cut")
    assert len({model_of(run) for run in (*runs, cut)}) == 1
    assert model_of(trained(1, *QUICK, name="without")) != model_of(runs[0])


def test_without_reproducible_uneven_shares_train_the_mean_of_all_micro_batches(trained):
    """Three processes share four micro-batches. Another order of the sum: the same to about float32's precision."""
    flags = ("--batch-size", 32, "--micro-batch", 8, "--image-size", 16, "--max-steps", 1, "--tracker", "none")
    one, three = (trained(w, *flags, "--threads", 1, "--no-report") for w in (1, 3))
    rows = [next(row for row in read_log(run / "log.jsonl") if row["kind"] == "train") for run in (one, three)]
    assert rows[0]["train/loss"] == rows[1]["train/loss"]
    assert rows[0]["train/gradient_norm"] == pytest.approx(rows[1]["train/gradient_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", 14], "1 image per forward"),
        (["--micro-batch", 100], "does not divide"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(run_main, small_set, flags, named):
    from mnistm_dist import train

    assert named in error_of(run_main(train.main, "--shards", small_set, "--reproducible", *flags))


def test_a_resume_of_a_reproducible_run_keeps_micro_batch_and_threads(trained, run_main):
    from mnistm_dist import train

    run = trained(1, *QUICK, "--max-steps", 2)
    for flag, named in (("--threads", "threads was 1, now 2"), ("--micro-batch", "micro_batch was 8, now 2")):
        assert named in error_of(run_main(train.main, "--resume", run, "--max-steps", 3, flag, 2))


def test_sync_batchnorm_and_fp16_are_refused_and_threads_do_not_follow_the_processes():
    assert check_reproducible(MachineConfig(), "fp32") == 1
    assert check_reproducible(MachineConfig(threads=3), "bf16") == 3
    with pytest.raises(UserError, match="--no-sync-batchnorm"):
        check_reproducible(MachineConfig(sync_batchnorm=True), "fp32")
    with pytest.raises(UserError, match="--precision bf16 or fp32"):
        check_reproducible(MachineConfig(), "fp16")


LONG = (
    *("--micro-batch", 16, "--image-size", 16, "--max-steps", 100, "--checkpoint-every", 7, "--log-every", 5),
    *("--epochs", 60, "--reproducible", "--tracker", "none", "--no-report", "--evaluate-every", 1000),
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "flags",
    [
        ("--recipe", "fast"),
        ("--recipe", "baseline"),
        ("--recipe", "fast", "--max-grad-norm", 0.5, "--reader", "streaming", "--order", "windowed"),
    ],
)
def test_a_hundred_steps_are_the_same_bytes_at_any_world_size_and_after_resumes_and_kills(
    trained, start, small_set, tmp_path, flags
):
    expected = model_of(trained(1, *flags, *LONG))
    for world_size in (2, 3, 4, 6, 8):
        assert model_of(trained(world_size, *flags, *LONG)) == expected, world_size
    generator, run = random.Random(0), tmp_path / "changing"
    resuming = ("--shards", small_set, "--run-dir", run, "--resume", "auto", *flags, *LONG)
    for kill, world_size in enumerate((8, 1, 3, 2, 4)):
        process = start("train", *resuming, world_size=world_size)
        wait_for_step(process, run, 15 * kill + generator.randrange(5, 15))
        process.kill()
    output_of(start("train", *resuming, world_size=6).wait(900))
    assert model_of(run) == expected
