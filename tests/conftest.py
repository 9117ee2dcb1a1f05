"""Small packed sets of real MNIST-M, and fixtures that run the package's commands."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from packed_sets import tiny_source
from processes import Command, Started

from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.sources.base import Sample, Source
from mnistm_dist.data.sources.catalog import open_source
from mnistm_dist.errors import run_cli

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
"""Waiting OpenMP threads sleep instead of spinning: tests run side by side."""

ROOT = Path(__file__).resolve().parents[1]
TRAIN, VAL, TEST = 320, 97, 53
"""Sizes of the small set: val and test are prime, so no batch and no world size divides them."""


LONGEST = ("test_train_script", "test_resume", "test_train", "test_killed", "test_distributed", "test_disk")
"""The longest files run first, so that no worker is left alone with one at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, unless the tests that need one are asked for: the others assert what holds on a CPU."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs more GPUs than there are: one, or as many as its marker says."""
    if marker := item.get_closest_marker("gpu"):
        import torch

        needed, found = max((1, *marker.args)), torch.cuda.device_count()
        if found < needed:
            pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)}, torch finds {found}")


@pytest.fixture(scope="session", autouse=True)
def no_native_bf16() -> Iterator[None]:
    """Train in fp32 on every CPU: the same bits on every machine. (So do the processes of processes.py.)"""
    with pytest.MonkeyPatch.context() as patch:
        for query in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            patch.setattr(f"torch.cpu.{query}", lambda: False)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


def part_of_the_sample(counts: dict[str, int]) -> Source:
    """The first images of the bundled sample, assigned to the splits in order."""

    def read() -> Iterator[Sample]:
        dealt = [(split, index) for split, count in counts.items() for index in range(count)]
        samples = (s for s in open_source("sample").samples() if s.split == "train")
        for (split, index), sample in zip(dealt, samples, strict=False):
            yield Sample(
                split=split,
                index=index,
                label=sample.label,
                pixels=sample.pixels,
                encoded=sample.encoded,
                origin=sample.origin,
            )

    return Source(layout="sample", description="part of the sample", counts=counts, read=read, lineage="regenerated")


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A packed set of 320 + 97 + 53 images."""
    out = tmp_path_factory.mktemp("shards") / "small"
    pack(part_of_the_sample({"train": TRAIN, "val": VAL, "test": TEST}), out, num_shards=8)
    return out


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """A packed set of 21 + 2 + 7 images of noise in 3 + 1 + 1 shards; read only."""
    out = tmp_path_factory.mktemp("tiny") / "set"
    pack(tiny_source(), out, num_shards=3)
    return out


@pytest.fixture
def tiny_copy(tiny_set, tmp_path) -> Path:
    """A copy of `tiny_set` that a test may change."""
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A cache folder for all tests of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache_dir) -> dict[str, str]:
    """The environment, without the variables of a launcher, Slurm or W&B."""
    dropped = ("SLURM_", "WANDB_", "ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "PET_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "MNISTM_DIST_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}


RunCommand = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., Started]


@pytest.fixture
def start(environment, tmp_path) -> Iterator[Start]:
    """Start ``python -m mnistm_dist.NAME ARGUMENTS`` in an empty folder, with ``world_size`` processes."""
    running: list[Started] = []

    def begin(name: str, *arguments: object, world_size: int = 1, before: str | None = None, **extra: str) -> Started:
        files = [tmp_path / f".{len(running)}.{stream}" for stream in ("stdout", "stderr")]
        command = Command(
            name, tuple(map(str, arguments)), world_size, tmp_path, {**environment, **extra}, *files, before=before
        )
        running.append(Started(command))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def run_command(start) -> RunCommand:
    """Run a command to its end."""

    def run(name: str, *arguments: object, timeout: float = 300, **extra: object) -> subprocess.CompletedProcess[str]:
        return start(name, *arguments, **extra).wait(timeout)

    return run


@pytest.fixture(scope="session")
def trained_run(small_set, cache_dir, tmp_path_factory) -> Path:
    """A run of two epochs at 32 px, with averaged weights and predictions for val and test."""
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
    """The probabilities that the run wrote for them, float64 (N, C)."""
    rows = (trained_run / "predictions_val.csv").read_text().splitlines()[1:]
    return np.array([[float(p) for p in row.split(",")[3:]] for row in rows])


RunMain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys) -> RunMain:
    """Run the ``main`` of a command in this process, in an empty folder: `run_main(main, *arguments)`."""
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


def launcher(world_size: int) -> list[str]:
    """Return the arguments of `accelerate launch` for several processes, also without GPUs; none for one."""
    if world_size == 1:
        return []
    several = ["--multi_gpu", "--num_processes", str(world_size), "--num_machines", "1", "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *several]


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a command that succeeded and showed no Python warning."""
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    message = done.stdout + done.stderr
    assert "Warning" not in message, message[-5000:]
    return done.stdout


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a user error."""
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
