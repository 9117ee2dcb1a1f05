"""What only GPUs can show: ``python -m pytest -m gpu``. A test that needs more GPUs than there are is skipped.

The tests of one GPU take some minutes. Those of several name their number in the marker.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import output_of
from safetensors.torch import load_file

from mnistm_dist.config import AugmentConfig, OptimConfig
from mnistm_dist.data.transforms import Augment, Preprocess
from mnistm_dist.training.models import create_model, to_device
from mnistm_dist.training.optim import WeightAverage, create_optimizer

pytestmark = pytest.mark.gpu
EXACT = ("--precision", "fp32", "--deterministic", "--threads", 1)
EVERYTHING = AugmentConfig(
    **{"shift": 3, "rotate": 9, "scale": 0.1, "shear": 5, "elastic": 2, "invert": 0.5, "permute_channels": 0.5},
    **{"cutout": 6, "flip": 0.5, "crop": 0.3, "colour": 0.2},
)


@pytest.fixture
def train(start, small_set, tmp_path):
    """Train for some steps; return the run folder."""

    def run(name: str, steps: int, *flags: object, world_size: int = 1, **environment: str) -> Path:
        size = ("--batch-size", 32, "--micro-batch", 16, "--image-size", 32, "--epochs", 4)
        log = ("--log-every", 1, "--checkpoint-every", 5, "--keep-checkpoints", 99, "--no-report", "--resume", "auto")
        flags = ("--shards", small_set, "--run-dir", name, "--max-steps", steps, *size, *log, *flags)
        output_of(start("train", *flags, world_size=world_size, **environment).wait())
        return tmp_path / name

    return run


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if row["kind"] == "train"]


def parameters(run: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / "training_state.safetensors")
    return {name: value for name, value in tensors.items() if "running" not in name and "tracked" not in name}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# One GPU


def test_fast_learns_the_sample_in_bf16_without_a_warning(run_command, tmp_path):
    output_of(run_command("train", "--run-dir", "run", timeout=500))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["precision"]) == ("cuda", "bf16")
    assert summary["val"]["accuracy"] >= 0.97


def test_in_float32_the_first_losses_are_those_of_a_cpu(train):
    on_gpu = losses(train("gpu", 20, *EXACT, NVIDIA_TF32_OVERRIDE="0"))
    on_cpu = losses(train("cpu", 20, *EXACT, CUDA_VISIBLE_DEVICES=""))
    assert np.allclose(on_gpu, on_cpu, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
def test_a_step_does_not_wait_for_the_gpu(optimizer):
    model = to_device(create_model(10, 0), torch.device("cuda"), "channels_last").train()
    config = OptimConfig(optimizer=optimizer, ema_decay=0.9)
    optimizer, average = create_optimizer(model, config, "bf16"), WeightAverage(model, config.ema_decay)
    augment = Augment(EVERYTHING, Preprocess((0.5,) * 3, (0.2,) * 3, "cuda"), seed=0)
    images, labels = (
        torch.zeros(512, 28, 28, 3, dtype=torch.uint8, device="cuda"),
        torch.arange(512, device="cuda") % 10,
    )

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(augment(images, np.arange(512), 32))
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        average.update(model, number)

    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reader", ["resident", "streaming"])
def test_a_killed_run_ends_with_the_same_bits(train, start, small_set, reader):
    flags = (*EXACT, "--order", "windowed", "--shuffle-streams", 1, "--reader", reader)
    whole = train("whole", 40, *flags)
    run = whole.with_name("killed")
    size = ("--batch-size", 32, "--micro-batch", 16, "--image-size", 32, "--epochs", 4)
    often = ("--checkpoint-every", 5, "--keep-checkpoints", 99, "--max-steps", 40, "--no-report")
    process = start("train", "--shards", small_set, "--run-dir", "killed", *size, *often, *flags)
    while not (run / "checkpoints" / "step-00000010").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert same(parameters(train("killed", 40, *flags), 40), parameters(whole, 40))


def test_cuda_graphs_train_as_the_steps_do_and_resume_with_the_same_bits(train):
    flags = (*EXACT, "--micro-batch", 32, "--image-size", "28,32", "--max-grad-norm", 1)
    whole = train("whole", 40, *flags, "--cuda-graph")
    assert np.allclose(losses(whole), losses(train("steps", 40, *flags)), atol=1e-3)
    train("parts", 25, *flags, "--cuda-graph")
    assert same(parameters(train("parts", 40, *flags, "--cuda-graph"), 40), parameters(whole, 40))


@pytest.mark.parametrize("first", ["", "0"], ids=["from the CPU to a GPU", "from a GPU to the CPU"])
def test_a_run_is_resumed_on_another_device(train, first):
    train("run", 5, CUDA_VISIBLE_DEVICES=first)
    run = train("run", 10, CUDA_VISIBLE_DEVICES="" if first else "0")
    assert len(losses(run)) == 10


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp16"),
        ("--compile", "--image-size", "24,28,32,40"),
        ("--max-grad-norm", 0.1),
        ("--memory-format", "contiguous"),
        ("--profile-steps", 2),
        ("--reproducible",),
        ("--cuda-graph", "--micro-batch", 32),
        ("--cuda-graph", "--compile", "--micro-batch", 32, "--image-size", "28,32"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_variant_trains_without_a_warning(train, flags):
    assert np.isfinite(losses(train("run", 40, *flags))).all()


# Several GPUs


@pytest.mark.gpu(2)
def test_one_and_two_gpus_train_the_same_bits(train):
    assert same(parameters(train("one", 20, *EXACT), 20), parameters(train("two", 20, *EXACT, world_size=2), 20))


@pytest.mark.gpu(3)
def test_an_evaluation_is_the_same_on_one_and_three_gpus(train, run_command):
    run, files = train("run", 10), []
    for world_size in (1, 3):
        output_of(run_command("evaluate", run, world_size=world_size))
        files.append((run / "predictions_val.csv").read_bytes())
    assert files[0] == files[1]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_stops_ends_the_others_with_one_line(start, small_set, fault):
    injected = {"before": "injected:in_phase", "FAULT": fault, "FAULT_RANK": "1", "FAULT_PHASE": "training"}
    flags = (
        "--shards",
        small_set,
        "--run-dir",
        "run",
        "--collective-timeout",
        20,
        "--max-steps",
        100,
        "--log-every",
        1,
    )
    process = start("train", *flags, world_size=2, **injected)
    deadline = time.monotonic() + 100
    # The parent waits for a stopped rank.
    errors = process.command.stderr
    while time.monotonic() < deadline and not (errors.exists() and "error" in errors.read_text()):
        time.sleep(0.2)
    process.kill()
    (line,) = [line for line in errors.read_text().splitlines() if line.startswith("error:")]
    assert "rank 0 on " in line
    assert "another process of the run was killed, or silent for --collective-timeout 20 s" in line


@pytest.mark.gpu(2)
def test_a_signal_to_one_rank_saves_on_all(start, small_set, tmp_path):
    flags = ("--shards", small_set, "--run-dir", "run", "--epochs", 1000, "--no-report")
    process = start("train", *flags, world_size=2)
    while not (tmp_path / "run" / "log.jsonl").exists() or not losses(tmp_path / "run"):
        time.sleep(0.05)
    last_rank = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(last_rank), signal.SIGUSR1)
    process.wait(60)
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "flags", [("--sync-batchnorm",), ("--memory-format", "contiguous"), ("--compile",), ("--cuda-graph",)]
)
def test_a_variant_trains_on_two_gpus_without_a_warning(train, flags):
    assert np.isfinite(losses(train("run", 40, *flags, world_size=2))).all()
