"""bf16 on a CPU, which these tests take for native wherever they run: a few steps of real training, and its results."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import output_of
from safetensors.torch import load_file

from mnistm_dist import load_model
from mnistm_dist.evaluate import main as evaluate
from mnistm_dist.export import main as export

FLAGS = (
    *("--batch-size", 16, "--micro-batch", 8, "--image-size", 28, "--epochs", 2, "--threads", 1, "--log-every", 1),
    *("--checkpoint-every", 2, "--keep-checkpoints", 9),
)


@pytest.fixture
def train(start, small_set):
    """Train to a step and return the folder of its checkpoint."""

    def run(name: str, steps: int, *flags: object, world_size: int = 1) -> Path:
        flags = ("--shards", small_set, "--run-dir", name, "--max-steps", steps, "--no-report", *FLAGS, *flags)
        started = start("train", *flags, world_size=world_size, before="injected:native_bf16")
        output_of(started.wait())
        return started.command.cwd / name / "checkpoints" / f"step-{steps:08d}"

    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained parameters and averages of them, without BatchNorm's statistics."""
    tensors = load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "training_state.safetensors")
    return {name: value for name, value in tensors.items() if not re.search("running|tracked", name)}


def differing(left: Path, right: Path) -> list[str]:
    """The names of the tensors that are not the same bits."""
    tensors, others = weights(left), weights(right)
    assert tensors.keys() == others.keys()
    return [name for name, value in tensors.items() if not torch.equal(value, others[name])]


def test_training_in_bf16_is_the_same_after_a_resume_and_on_two_processes(train):
    whole = train("whole", 4)
    assert yaml.safe_load((whole.parents[1] / "config.yaml").read_text())["machine"]["precision"] == "bf16"
    train("parts", 2)
    assert differing(whole, train("parts", 4, "--resume", "auto")) == []
    assert differing(whole, train("two", 4, world_size=2)) == []
    # It was not fp32 all along: neither the model's passes nor, with its own precision, Muon's iteration.
    assert differing(whole, train("fp32", 4, "--precision", "fp32"))


def test_evaluation_prediction_and_export_use_the_runs_precision_or_say_that_they_do_not(
    train, run_command, run_main, monkeypatch, val_images
):
    run = train("run", 4).parents[1]
    bytes_of = (run / "predictions_val.csv").read_bytes
    trained = bytes_of()
    for world_size in (1, 2):
        output_of(run_command("evaluate", run, world_size=world_size, before="injected:native_bf16"))
        assert bytes_of() == trained, world_size

    def probabilities() -> np.ndarray:
        return np.array([row.split(",")[3:] for row in bytes_of().decode().splitlines()[1:]], float)

    in_bf16, in_fp32 = probabilities(), load_model(run)
    assert in_fp32.autocast is None
    # Elsewhere, as in fp32 runs: exactly.
    done = run_main(evaluate, run)
    assert re.search("precision: bf16 is not native here; evaluating in fp32", done.stdout)
    assert np.abs(in_fp32.predict(val_images) - probabilities()).max() < 1e-5
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    model = load_model(run)
    assert model.autocast is torch.bfloat16
    assert 0 < np.abs(model.predict(val_images) - in_fp32.predict(val_images)).max() < 0.05
    assert np.abs(model.predict(val_images) - in_bf16).max() < 0.02
    # An exported file is always in float32, and is compared with the model in float32.
    done = run_main(export, run, "--to", "torch", "--out", "model.pt2")
    assert (done.returncode, Path("model.pt2").exists()) == (0, True), done.stderr
