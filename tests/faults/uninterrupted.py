"""The uninterrupted run, which every interrupted and resumed run must equal; small and read-only disks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Command, Started

from mnistm_dist.training.run_dir import read_state

STEPS = 20
FLAGS = (
    *("--recipe", "fast", "--batch-size", "32", "--micro-batch", "16", "--image-size", "28", "--epochs", "2"),
    *("--checkpoint-every", "3", "--log-every", "4", "--threads", "1", "--tracker", "none"),
    # Some tests start the command by themselves, and this is a matter of bits.
    *("--precision", "fp32"),
)
STREAMING = ("--reader", "streaming", "--order", "windowed", "--shuffle-window", "16", "--workers", "1")
Uninterrupted = Callable[..., Path]


@pytest.fixture(scope="session")
def uninterrupted(small_set, environment, tmp_path_factory) -> Uninterrupted:
    """``uninterrupted(world_size, *flags)``: the folder of a finished run, trained once a session."""
    runs: dict[tuple[object, ...], Path] = {}

    def run(world_size: int = 1, *flags: str) -> Path:
        if (world_size, *flags) not in runs:
            cwd = tmp_path_factory.mktemp("uninterrupted")
            arguments = ("--shards", str(small_set), "--run-dir", "run", *FLAGS, *flags)
            command = Command("train", arguments, world_size, cwd, environment, cwd / "stdout", cwd / "stderr")
            done = Started(command).wait(120)
            assert done.returncode == 0, done.stderr
            runs[(world_size, *flags)] = cwd / "run"
        return runs[(world_size, *flags)]

    return run


def assert_ended_alike(run: Path, whole: Path) -> None:
    """Check that a run is finished, with the weights and predictions of the uninterrupted one, byte for byte."""
    assert read_state(run) == {"state": "finished", "step": STEPS, "reason": None}
    for name in (f"checkpoints/step-{STEPS:08d}/model.safetensors", "predictions_val.csv", "predictions_test.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def error_lines(stderr: str) -> list[str]:
    """Return the lines of stderr, each of which must be an error: no traceback, no warning."""
    lines = stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), stderr
    return lines


Mounted = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path) -> Iterator[Mounted]:
    """``mounted(NAME, "size=64m")``: a small disk; ``mounted(NAME, of=FOLDER)``: FOLDER, read-only."""
    places: list[Path] = []

    def mount(name: str, options: str = "", of: Path | None = None) -> Path:
        place = tmp_path / name
        place.mkdir()
        how = ["-t", "tmpfs", "-o", options, "none"] if of is None else ["--bind", "-o", "ro", str(of)]
        if os.geteuid() != 0 or subprocess.run(["mount", *how, place], capture_output=True).returncode:
            pytest.skip("only root may mount a disk")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", place], check=True)
