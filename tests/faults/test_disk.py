"""Full and read-only disks: one line each time, no incomplete file that looks complete, and with free space the run
ends like an uninterrupted one."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import error_of, output_of
from run_folders import is_locked
from uninterrupted import FLAGS, STEPS, STREAMING, assert_ended_alike, error_lines

from mnistm_dist.training.checkpoint import open_checkpoint
from mnistm_dist.training.run_dir import read_state

pytest_plugins = ["uninterrupted"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A disk that fills up while a run is in a phase."""

    phase: str
    named: str
    """What the error names."""
    step: int
    world_size: int = 1
    fast: bool = False

    def __str__(self) -> str:
        return f"{self.phase}, {self.world_size}"


TABLE = (
    Row(phase="saving", named="checkpoint disk/run/checkpoints/step-00000006", step=6, fast=True),
    Row(phase="saving", named="checkpoint disk/run/checkpoints/step-00000006", step=6, world_size=2),
    Row(phase="training", named="checkpoint disk/run/checkpoints/step-00000009", step=9),
    Row(phase="predicting", named="run folder disk/run", step=STEPS),
    Row(phase="drawing", named="run folder disk/run", step=STEPS),
    Row(phase="summing up", named="run folder disk/run", step=STEPS),
    Row(phase="reporting", named="disk/run/report.html", step=STEPS),
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=() if row.fast else pytest.mark.slow) for row in TABLE]
)
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_with_room_it_ends_the_same(
    run_command, small_set, tmp_path, mounted, uninterrupted, row
):
    disk = mounted("disk", "size=64m")
    flags = ("--shards", small_set, "--run-dir", "disk/run", "--resume", "auto", *FLAGS)
    fault = {"FAULT": "full disk", "FAULT_PHASE": row.phase}
    done = run_command("train", *flags, world_size=row.world_size, before="injected:in_phase", timeout=100, **fault)
    line = error_of(done)
    assert row.named in line
    assert "No space left on device" in line
    run = disk / "run"
    state = read_state(run)
    assert (state["state"], state["step"]) == ("failed", row.step)
    assert not is_locked(run)
    for path in (run / "checkpoints").glob("step-*"):
        open_checkpoint(path)
    for path in run.glob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
    assert not list(run.glob(".*"))
    (disk / "filling").unlink()
    output_of(run_command("train", *flags, world_size=row.world_size, timeout=100))
    assert_ended_alike(run, uninterrupted(row.world_size))


def test_figures_and_reports_on_a_full_disk_are_refused_and_leave_nothing(run_main, trained_run, mounted, small_set):
    from mnistm_dist.plan import main as plan
    from mnistm_dist.report import main as report

    disk = mounted("disk", "size=16k")
    saved = ("--save", "disk/images.png")
    assert "disk/images.png" in error_of(run_main(plan, "--shards", small_set, "--step", 0, "--batch-size", 64, *saved))
    assert "disk/page.html" in error_of(run_main(report, trained_run, "--out", "disk/page.html"))
    assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_an_export_to_a_full_disk_is_refused_and_leaves_nothing(run_main, trained_run, mounted, target):
    from mnistm_dist.export import main as export

    disk = mounted("disk", "size=16k")
    assert "disk/model: cannot be written (No space left on device)" in error_of(
        run_main(export, trained_run, "--to", target, "--out", "disk/model")
    )
    assert list(disk.iterdir()) == []


FULL = "/dev/full"


def to_full_disk(environment, cwd, run_command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command whose output goes to a full disk."""
    with open(FULL, "w") as full:  # noqa: PTH123  # a device, not a path to work with
        return subprocess.run(
            [sys.executable, "-m", f"mnistm_dist.{run_command}", *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=200,
        )


def test_a_result_that_is_piped_to_a_full_disk_is_refused(environment, tmp_path, small_set):
    done = to_full_disk(environment, tmp_path, "plan", "--shards", small_set, "--step", 0, "--json")
    assert "standard output: cannot be written (No space left on device)" in error_of(done)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_predictions_that_are_piped_to_a_full_disk_are_refused(environment, tmp_path, trained_run, val_images, form):
    from PIL import Image

    Image.fromarray(val_images[0]).save(tmp_path / "digit.png")
    done = to_full_disk(environment, tmp_path, "predict", trained_run, "digit.png", form)
    assert "standard output: cannot be written (No space left on device)" in error_of(done)


@pytest.mark.slow
def test_a_run_whose_log_is_on_a_full_disk_finishes(environment, tmp_path, small_set, uninterrupted):
    """The output of a batch job may be on another disk than the run folder."""
    done = to_full_disk(environment, tmp_path, "train", "--shards", small_set, "--run-dir", "run", *FLAGS)
    assert error_lines(done.stderr) == []
    assert done.returncode == 0
    assert_ended_alike(tmp_path / "run", uninterrupted())


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), pytest.param(STREAMING, marks=pytest.mark.slow)], ids=["resident", "streaming"])
def test_read_only_shards_train_as_others_do(run_command, small_set, tmp_path, mounted, uninterrupted, extra):
    shards = mounted("shards", of=small_set)
    with pytest.raises(OSError):
        (shards / "probe").touch()
    output_of(run_command("train", "--shards", "shards", "--run-dir", "run", "--cache-dir", "cache", *FLAGS, *extra))
    assert_ended_alike(tmp_path / "run", uninterrupted(1, *extra))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == STEPS


def test_the_sample_is_not_packed_into_a_read_only_folder(run_command, tmp_path, mounted):
    (tmp_path / "empty").mkdir()
    mounted("shards", of=tmp_path / "empty")
    line = error_of(run_command("train", "--run-dir", "run", *FLAGS))
    assert "shards/sample: cannot be written (Read-only file system)" in line
    assert line.endswith("or use --shards with a packed set")
    assert not (tmp_path / "run").exists()
