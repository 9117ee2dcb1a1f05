"""The wheel: with nothing but its own files, in a folder without a clone, it does the main job."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_wheel_trains_on_the_bundled_sample_without_the_clone(environment, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mnistm_dist", source / "mnistm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True, env={**os.environ, "PIP_NO_INDEX": "1"}, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)

    # There is no clone that the package could be imported from instead.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environ = {**environment, "PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import mnistm_dist; print(mnistm_dist.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=environ, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(installed)
    command = [sys.executable, "-m", "mnistm_dist.train", "--recipe", "debug", "--run-dir", "run"]
    done = subprocess.run(command, cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "run" / "report.html").is_file()
