"""A small run, really trained, and its commands: what the tests of a trained model share."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import VAL

from mnistm_dist.errors import run_cli


@pytest.fixture(scope="session")
def trained_run(small_set, cache_dir, tmp_path_factory) -> Path:
    """Two epochs at another size than that of the stored images, with averaged weights; val and test are predicted."""
    from mnistm_dist.train import main

    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    flags = ["--batch-size", "32", "--image-size", "32", "--epochs", "2", "--ema-decay", "0.5", "--threads", "1"]
    places = ["--shards", str(small_set), "--run-dir", str(run_dir), "--cache-dir", str(cache_dir), "--tracker", "none"]
    assert main([*flags, *places]) == 0
    return run_dir


@pytest.fixture(scope="session")
def val_images(small_set) -> np.ndarray:
    """The images of val in manifest order, uint8 (N, H, W, 3)."""
    from mnistm_dist.data.image_io import decode_png
    from mnistm_dist.data.shards import ShardSet

    return np.stack([decode_png(png, "val") for png in ShardSet.open(small_set).read("val", range(VAL))])


@pytest.fixture(scope="session")
def val_probabilities(trained_run) -> np.ndarray:
    """What the run's own evaluation wrote for them, float64 (N, C)."""
    rows = (trained_run / "predictions_val.csv").read_text().splitlines()[1:]
    return np.array([[float(p) for p in row.split(",")[3:]] for row in rows])


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys) -> Here:
    """Runs a run_command's ``main`` in this process, in an empty folder: `here(main, *arguments)`."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[list[str]], int], *arguments: object) -> subprocess.CompletedProcess[str]:
        argv = list(map(str, arguments))
        try:
            code = run_cli(main, argv)
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(argv, code, captured.out, captured.err)

    return run
