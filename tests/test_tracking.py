"""Claims about `mnistm_dist.reporting.tracking`, with W&B itself, offline or against servers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from run_folders import CLASSES, synthetic_labels, synthetic_probabilities, write_run
from wandb_files import history, offline_records, server

from mnistm_dist.reporting import tracking, wandb_connection
from mnistm_dist.reporting.metrics import measure
from mnistm_dist.reporting.predictions import Mistake
from mnistm_dist.reporting.tracked_results import log_results, matrix_table, mistakes_table
from mnistm_dist.reporting.tracking import NullTracker, Tracker, open_tracker
from mnistm_dist.reporting.wandb_connection import choose_mode, has_key, one_line

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_wandb_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [
        name for name in os.environ if name.startswith("WANDB_") or name == "NETRC" or "proxy" in name.lower()
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate's trackers want its state; in a training it is there."""
    from accelerate import PartialState

    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def track_everything(run_dir: Path, exit_code: int, state: str) -> list[str]:
    """A whole tracked run, offline; gives what was said."""
    said: list[str] = []
    config = {"optim": {"learning_rate": 4e-3}, "run": {"recipe": "fast"}}
    tracker = open_tracker("wandb", run_dir=run_dir, config=config, name="name", group="job 7", say=said.append)
    for step in (1, 2, 2, 3):
        tracker.log({"train/loss": 1.0 / step, "train/learning_rate": 4e-3}, step)
    tracker.log({"val/accuracy": 0.97}, 3)
    Image.new("RGB", (8, 8)).save(run_dir / "matrix.png")
    tracker.log_images({"val/matrix": run_dir / "matrix.png"}, 3)
    labels = synthetic_labels(100, 1)
    metrics = measure(labels, synthetic_probabilities(labels, 0.8, 2), CLASSES)
    tracker.log_table("val/confusion_matrix", *matrix_table(metrics), 3)
    mistake = Mistake(id=4, key="k", true="4", predicted="9", probability=0.9, true_probability=0.1)
    tracker.log_table("val/mistakes", *mistakes_table([mistake]), 3)
    (run_dir / "step-3").mkdir()
    (run_dir / "step-3" / "model.safetensors").write_bytes(b"weights")
    tracker.log_checkpoint(run_dir / "step-3", ["best"])
    tracker.summary({"val": {"accuracy": 0.97}})
    tracker.finish(exit_code, state)
    return said


def test_the_offline_file_holds_everything_that_was_logged(tmp_path: Path, one_process: None) -> None:
    (said,) = track_everything(tmp_path, 75, "preempted")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert said.startswith("W&B is offline (no API key")
    assert said.endswith(f"to upload this run later: wandb sync {folder}")
    records = offline_records(tmp_path)
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group) == ("mnistm-dist", "name", "job 7")
    config = {
        item.key: json.loads(item.value_json) for r in records if r.HasField("config") for item in r.config.update
    }
    assert config["optim"] == {"learning_rate": 4e-3}
    rows = history(records)
    # A step that comes twice is kept twice: our own step is no step of W&B's.
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 2, 3]
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    logged = {name for row in rows for name in row}
    assert {"val/accuracy", "val/matrix", "val/confusion_matrix", "val/mistakes"} <= logged
    media = {path.suffix for path in folder.glob("files/media/**/*") if path.is_file()}
    assert media == {".png", ".json"}
    artifacts = {record.artifact.type for record in records if record.HasField("artifact")}
    artifacts |= {r.request.log_artifact.artifact.type for r in records if r.HasField("request")}
    assert "model" in artifacts
    assert any(record.HasField("preempting") for record in records)
    (ended,) = [record.exit for record in records if record.HasField("exit")]
    assert ended.exit_code == 75
    summary = {i.key: json.loads(i.value_json) for r in records if r.HasField("summary") for i in r.summary.update}
    assert summary["state"] == "preempted"


def test_the_results_of_a_run_folder_are_logged_as_images_and_tables(tmp_path: Path, one_process: None) -> None:
    run = write_run(tmp_path / "run", val_size=50, accuracy=0.5, epochs=1, steps_per_epoch=2)
    Image.new("RGB", (8, 8)).save(run / "learning_curve.png")
    tracker = open_tracker("wandb", run_dir=run, config={}, name="n", group=None, say=lambda text: None)
    log_results(tracker, run, 2)
    tracker.finish(0, "finished")
    logged = {name for row in history(offline_records(run)) for name in row}
    assert {f"{split}/{table}" for split in ("val", "test") for table in ("confusion_matrix", "mistakes")} <= logged
    assert "figures/learning_curve" in logged
    tables = {}
    for path in run.glob("wandb/offline-run-*/files/media/table/val/*.json"):
        tables[path.name.partition("_")[0]] = json.loads(path.read_text())
    assert sum(row[2] for row in tables["confusion"]["data"]) == 50
    assert tables["mistakes"]["columns"] == ["key", "true", "predicted", "probability", "true probability"]
    log_results(NullTracker(), tmp_path / "no such folder", 2)


@pytest.mark.parametrize(("exit_code", "state"), [(0, "finished"), (1, "failed")])
def test_how_a_run_ended_is_told_truthfully(tmp_path: Path, one_process: None, exit_code: int, state: str) -> None:
    tracker = open_tracker("wandb", run_dir=tmp_path, config={}, name="n", group=None, say=lambda text: None)
    tracker.finish(exit_code, state)
    records = offline_records(tmp_path)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [exit_code]
    assert not any(record.HasField("preempting") for record in records)


@pytest.mark.parametrize("behaviour", ["refuses", "stalls", "cuts", "unauthorized"])
def test_a_server_that_misbehaves_is_left_for_an_offline_run(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setattr(wandb_connection, "INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    with server(behaviour) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        began = time.monotonic()
        tracker = open_tracker("auto", run_dir=tmp_path, config={}, name="n", group=None, say=said.append)
        assert time.monotonic() - began < 1.0, "opening waits for the server"
        for step in range(10):
            tracker.log({"train/loss": 1.0}, step)
        assert time.monotonic() - began < 1.0, "logging waits for the server"
        tracker.finish(0, "finished")
    (line,) = said
    assert line.startswith("W&B is offline (")
    assert "wandb sync" in line
    assert [row["step"] for row in history(offline_records(tmp_path))] == list(range(10))


def test_a_server_that_dies_in_mid_run_cannot_hold_the_end(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_connection, "FINISH_SECONDS", 2.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said: list[str] = []
    with server("dies-later") as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        tracker = open_tracker("auto", run_dir=tmp_path, config={}, name="n", group=None, say=said.append)
        for step in range(10):
            tracker.log({"train/loss": 1.0}, step)
        while not said:
            time.sleep(0.05)
        began = time.monotonic()
        tracker.finish(0, "finished")
        assert time.monotonic() - began < 15.0
    assert said[0] == f"W&B: {address}/entity/project/runs/run"
    assert "wandb sync" in said[1]
    assert [row["step"] for row in history(offline_records(tmp_path))] == list(range(10))


def test_the_death_of_wandbs_own_process_does_not_touch_the_run(tmp_path: Path) -> None:
    script = """
import os, signal, subprocess, sys, time
from pathlib import Path
from accelerate import PartialState
from mnistm_dist.reporting.tracking import open_tracker
PartialState(cpu=True)
said = []
tracker = open_tracker("wandb", run_dir=Path(sys.argv[1]), config={}, name="n", group=None, say=said.append)
tracker.log({"a": 1}, 1)
while not said:
    time.sleep(0.05)
core = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True).stdout
os.kill(int(core.split()[0]), signal.SIGKILL)
time.sleep(0.2)
tracker.log({"a": 2}, 2)
tracker.finish(0, "finished")
print(*said, "trained to the end", sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "W&B's own process has died; the run goes on, and its folder holds everything",
        "trained to the end",
    ]
    assert "Traceback" not in done.stderr


def test_logging_costs_a_step_less_than_a_fiftieth_of_a_tenth_of_a_second(tmp_path: Path, one_process: None) -> None:
    tracker = open_tracker("wandb", run_dir=tmp_path, config={}, name="n", group=None, say=lambda text: None)
    costs = []
    for step in range(100):
        began = time.perf_counter()
        tracker.log({"train/loss": 1.0, "train/learning_rate": 1e-3, "train/images_per_second": 700.0}, step)
        costs.append(time.perf_counter() - began)
        time.sleep(0.005)
    tracker.finish(0, "finished")
    assert sorted(costs)[50] < 0.1 * 0.02
    assert len(history(offline_records(tmp_path))) == 100


def test_too_much_work_is_dropped_and_counted_instead_of_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LONGEST_QUEUE", 3)
    said: list[str] = []
    tracker = Tracker(lambda: (time.sleep(0.5), (None, "no reason"))[1], said.append)
    for step in range(10):
        tracker.log({"a": 1}, step)
    tracker.finish(0, "finished")
    assert said == [
        "W&B is off (no reason); the run folder holds everything",
        "W&B was too slow for 9 entries, which are only in log.jsonl",
    ]


@pytest.mark.parametrize(
    ("track", "environ", "mode"),
    [
        ("none", {"WANDB_API_KEY": KEY}, "none"),
        ("auto", {}, "none"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "none"),
        ("wandb", {}, "offline"),
        ("wandb", {"WANDB_API_KEY": KEY}, "online"),
        ("wandb", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("wandb", {"WANDB_MODE": "disabled"}, "none"),
    ],
)
def test_the_mode_follows_the_wish_and_what_is_at_hand(
    tmp_path: Path, track: str, environ: dict[str, str], mode: str
) -> None:
    assert choose_mode(track, {"HOME": str(tmp_path), **environ})[0] == mode  # type: ignore[arg-type]


def test_a_key_of_wandb_login_is_found_and_that_of_another_host_is_not(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    assert has_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example"})
    assert not has_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://other.example"})


def test_a_run_without_tracking_writes_nothing_and_imports_no_wandb(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mnistm_dist.reporting.tracking import open_tracker\n"
        "t = open_tracker('none', run_dir=Path(sys.argv[1]), config={}, name='n', group=None, say=print)\n"
        "t.log({'a': 1}, 1); t.log_images({}, 1); t.log_table('t', [], [], 1); t.summary({}); t.finish(0, 'finished')\n"
        "assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "run").exists()
    assert type(open_tracker("none", run_dir=tmp_path, config={}, name="n", group=None, say=print)) is NullTracker


def test_errors_are_told_in_one_short_line() -> None:
    assert one_line(OSError("refused\nby peer")) == "refused by peer"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 160


def test_a_wandb_that_cannot_be_imported_is_off_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    tracker = open_tracker("wandb", run_dir=tmp_path, config={}, name="name", group=None, say=said.append)
    while not said:
        time.sleep(0.01)
    for step in range(2 * tracking.LONGEST_QUEUE):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(0, "finished")
    (line,) = said
    assert line.startswith("W&B is off (it cannot be imported: import of wandb")
