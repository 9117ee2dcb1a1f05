"""The command ``pack``, and the official set."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, RunMain, error_of, output_of
from layouts import noise, write_mnist
from packed_sets import ARCHIVE, names_in, write_official

from mnistm_dist import pack
from mnistm_dist.data.packing.statistics import OFFICIAL_PIXELS
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.data.sources.catalog import KNOWN_LAYOUTS


def test_pack_writes_a_set_and_prints_a_summary(tmp_path: Path, run_main: RunMain) -> None:
    write_official(tmp_path / "in")
    printed = output_of(
        run_main(pack.main, "in", "--out", "shards/mine", "--num-shards", 4, "--split-size", 3, "--seed", 7)
    )
    manifest = ShardSet.open(tmp_path / "shards" / "mine").manifest
    assert [(split.count, len(split.shards)) for split in manifest.splits.values()] == [(20, 4), (3, 1), (7, 1)]
    assert (manifest.seed, manifest.lineage) == (7, "unknown")
    for expected in ("shards/mine", "20 images in 4 shards", manifest.pixels_sha256["test"], "unknown"):
        assert expected in printed
    assert names_in(tmp_path / "shards") == ["mine"]


def test_pack_prints_the_command_that_trains_on_the_set(tmp_path: Path, run_main: RunMain) -> None:
    command = "python -m mnistm_dist.train --recipe"
    write_official(tmp_path / "photos")
    write_mnist(tmp_path / "mnist", noise())
    printed = output_of(run_main(pack.main, "photos", "--out", "a b"))
    assert f"{command} images --shards 'a b'\n" in printed
    assert f"{command} fast --invert 0 --shards 'a b'\n" in printed
    printed = output_of(run_main(pack.main, "mnist", "--out", "digits"))
    assert f"{command} fast --invert 0 --shards digits\n" in printed
    assert "images --shards" not in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["here/none", "--out", "here/new"], "here/none"),
        (["here/in", "--out", "here/in"], "here/in: already exists"),
        (["here/in"], "--out"),
        (["--out", "here/new"], "SOURCE"),
        (["here/in", "--out", "here/new", "--num-shards", "many"], "many"),
        (["here/in", "--out", "here/new", "--num-shards", "0"], "--num-shards: found '0'; should be greater than 0"),
        (["here/in", "--out", "here/new", "--unknown"], "--unknown"),
        (["here/in", "--out", "here/new", "--layout", "some"], "some"),
    ],
)
def test_a_user_error_is_one_line_and_nothing_is_written(
    tmp_path: Path, run_main: RunMain, arguments: list[str], named: str
) -> None:
    write_official(tmp_path / "here" / "in")
    before = sorted((tmp_path / "here").rglob("*"))
    assert named in error_of(run_main(pack.main, *arguments))
    assert sorted((tmp_path / "here").rglob("*")) == before


def test_layouts_lists_every_layout_with_its_structure(run_main: RunMain) -> None:
    lines = output_of(run_main(pack.main, "--layouts")).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, text] for name, text in KNOWN_LAYOUTS.items()]


@pytest.mark.parametrize("name", ["pack", "verify"])
def test_the_command_imports_nothing_heavy_before_its_flags_are_read(name: str) -> None:
    heavy = ["numpy", "PIL", "rich", "torch", "matplotlib"]
    code = f"import sys, mnistm_dist.{name} as d\ntry: d.main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


MEASURED_PACK = """
import re, sys
from pathlib import Path
from mnistm_dist.pack import main

if __name__ == "__main__":
    main(sys.argv[1:])
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def cpu_seconds() -> float:
    """CPU time of the child processes; wall time would depend on other load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The official set, packed by the command."""

    shards: ShardSet
    seconds: float
    """CPU time."""
    peak_kilobytes: int
    """Peak memory of its main process."""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The official set, packed by the command, with the time and memory that it took."""
    if not ARCHIVE.exists():
        pytest.skip("the official archive is not here (../shared/data/mnist_m.tar.gz)")
    folder = tmp_path_factory.mktemp("official")
    (folder / "measured_pack.py").write_text(MEASURED_PACK)
    started = cpu_seconds()
    command = [sys.executable, folder / "measured_pack.py", ARCHIVE, "--out", folder / "set"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds = cpu_seconds() - started
    shards = ShardSet.open(folder / "set")
    return Packed(shards=shards, seconds=seconds, peak_kilobytes=int(done.stdout.split()[-1]))


def test_the_official_set_is_known_by_its_sums(official: Packed) -> None:
    manifest = official.shards.manifest
    assert (manifest.lineage, manifest.pixels_sha256) == ("official", OFFICIAL_PIXELS)
    train, val, test = manifest.splits.values()
    assert (train.count, val.count, test.count) == (55_000, 4_001, 9_001)
    assert [len(split.shards) for split in (train, val, test)] == [64, 5, 10]
    counts = [a + b for a, b in zip(train.class_counts, val.class_counts, strict=True)]
    assert counts == [5825, 6640, 5853, 6028, 5746, 5331, 5812, 6158, 5757, 5851]
    # Of train and val together, as MNIST-M's description gives them.
    mean = (np.multiply(train.mean, 55_000) + np.multiply(val.mean, 4_001)) / 59_001
    squares = [np.multiply(split.count, np.square(split.std) + np.square(split.mean)) for split in (train, val)]
    assert np.allclose(mean, [0.45791, 0.46209, 0.40824], rtol=0, atol=6e-6)
    assert np.allclose(np.sqrt(sum(squares) / 59_001 - mean**2), [0.25195, 0.23678, 0.25870], rtol=0, atol=6e-6)


def test_the_official_set_is_packed_in_two_minutes_of_a_core_and_500_mb(official: Packed) -> None:
    assert official.peak_kilobytes < 500 * 1024
    assert official.seconds < 120


def test_stock_webdataset_reads_the_official_pixels_and_labels(official: Packed) -> None:
    import webdataset as wds

    shards = official.shards
    urls = [str(shards.root / shard.name) for shard in shards.split("test").shards]
    samples = {
        key: (image.tobytes(), label)
        for key, image, label in wds.WebDataset(urls, shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "png", "cls")
    }
    digest = hashlib.sha256(b"".join(samples[key][0] for key in sorted(samples)))
    assert digest.hexdigest() == OFFICIAL_PIXELS["test"]
    with tarfile.open(ARCHIVE) as tar:
        text = next(tar.extractfile(member) for member in tar if member.name.endswith("mnist_m_test_labels.txt"))
        assert text is not None
        lines = io.TextIOWrapper(text).read().splitlines()
    assert [samples[key][1] for key in sorted(samples)] == [int(line.split()[1]) for line in lines]
