"""Claims about `mnistm_dist.reporting.tracking`, with W&B itself, offline or against servers that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folders import write_run
from wandb_files import history, offline_records, server

from mnistm_dist.reporting import tracking
from mnistm_dist.reporting.predictions import read_predictions
from mnistm_dist.reporting.run_logger import log_results
from mnistm_dist.reporting.tracking import (
    BackgroundTracker,
    Tracker,
    WandbTracker,
    choose_mode,
    has_api_key,
    one_line,
    open_tracker,
)

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_wandb_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [
        name for name in os.environ if name.startswith("WANDB_") or name == "NETRC" or "proxy" in name.lower()
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


def opened(run_dir: Path, say: Callable[[str], None] = lambda text: None) -> Tracker:
    return open_tracker("wandb", run_dir=run_dir, config={"seed": 1}, name="name", group="job 7", say=say)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run folder whose preempted run was tracked offline, and the lines that were shown."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "run", val_size=50, accuracy=0.5, epochs=1, steps_per_epoch=2)
    Image.new("RGB", (8, 8)).save(run_dir / "learning_curve.png")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("HOME", str(run_dir))
        tracker = opened(run_dir, lines.append)
        for step in (1, 2, 2, 3):
            tracker.log({"train/loss": 1.0 / step, "train/learning_rate": 4e-3}, step)
        tracker.log({"val/accuracy": 0.97}, 3)
        predictions = {split: read_predictions(run_dir / f"predictions_{split}.csv") for split in ("val", "test")}
        summary = {"val": {"accuracy": 0.97}}
        log_results(tracker, summary, [run_dir / "learning_curve.png"], predictions, 3)
        (checkpoint := run_dir / "step-3").mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        tracker.log_checkpoint(checkpoint, ["best"])
        tracker.finish(75, "preempted")
    return run_dir, lines


def test_a_run_without_a_key_is_offline_in_one_line(tracked: tuple[Path, list[str]]) -> None:
    run_dir, lines = tracked
    (folder,) = run_dir.glob("wandb/offline-run-*")
    (line,) = lines
    assert line.startswith("W&B is offline (no API key")
    assert line.endswith(f"to upload this run later: wandb sync {folder}")


def test_the_offline_file_holds_everything_that_was_logged(tracked: tuple[Path, list[str]]) -> None:
    records = offline_records(tracked[0])
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, run.run_group) == ("mnistm-dist", "name", "job 7")
    config = {
        item.key: json.loads(item.value_json)
        for items in (
            record.run.config.update if record.HasField("run") else record.config.update for record in records
        )
        for item in items
    }
    assert config["seed"] == 1
    rows = history(records)
    # A repeated step is kept: our own step is no step of W&B's.
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 2, 3]
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    logged = {name for row in rows for name in row}
    assert {"val/accuracy", "figures/learning_curve"} <= logged
    assert {f"{split}/{table}" for split in ("val", "test") for table in ("confusion_matrix", "mistakes")} <= logged
    artifacts = {record.artifact.type for record in records if record.HasField("artifact")}
    artifacts |= {r.request.log_artifact.artifact.type for r in records if r.HasField("request")}
    assert "model" in artifacts
    assert any(record.HasField("preempting") for record in records)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [75]
    summary = {i.key: json.loads(i.value_json) for r in records if r.HasField("summary") for i in r.summary.update}
    assert summary["state"] == "preempted"


def test_the_tables_hold_exact_counts(tracked: tuple[Path, list[str]]) -> None:
    tables = {}
    for path in tracked[0].glob("wandb/offline-run-*/files/media/table/val/*.json"):
        tables[path.name.partition("_")[0]] = json.loads(path.read_text())
    assert sum(row[2] for row in tables["confusion"]["data"]) == 50
    assert tables["mistakes"]["columns"] == ["key", "true", "predicted", "p(predicted)", "p(true)"]


@pytest.mark.parametrize(("exit_code", "state"), [(0, "finished"), (1, "failed")])
def test_wandb_gets_the_exit_code(tmp_path: Path, exit_code: int, state: str) -> None:
    tracker = opened(tmp_path)
    tracker.finish(exit_code, state)
    records = offline_records(tmp_path)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [exit_code]
    assert not any(record.HasField("preempting") for record in records)


@pytest.mark.parametrize("behaviour", ["refuses", "stalls", "cuts", "unauthorized"])
def test_a_run_is_offline_if_the_server_misbehaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.5)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lines: list[str] = []
    with server(behaviour) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        began = time.monotonic()
        tracker = open_tracker("auto", run_dir=tmp_path, config={}, name="n", group=None, say=lines.append)
        assert time.monotonic() - began < 1.0, "opening waits for the server"
        for step in range(10):
            tracker.log({"train/loss": 1.0}, step)
        assert time.monotonic() - began < 1.0, "logging waits for the server"
        tracker.finish(0, "finished")
    (line,) = lines
    assert line.startswith("W&B is offline (")
    assert "wandb sync" in line
    assert [row["step"] for row in history(offline_records(tmp_path))] == list(range(10))


def test_a_server_that_dies_during_the_run_does_not_delay_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    lines: list[str] = []
    with server("dies-later") as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        tracker = open_tracker("auto", run_dir=tmp_path, config={}, name="n", group=None, say=lines.append)
        for step in range(10):
            tracker.log({"train/loss": 1.0}, step)
        while not lines:
            time.sleep(0.05)
        began = time.monotonic()
        tracker.finish(0, "finished")
        assert time.monotonic() - began < 15.0
    assert lines[0] == f"W&B: {address}/entity/project/runs/run"
    assert "wandb sync" in lines[1]
    assert [row["step"] for row in history(offline_records(tmp_path))] == list(range(10))


def test_the_death_of_the_wandb_process_does_not_affect_the_run(tmp_path: Path) -> None:
    script = """
import os, signal, subprocess, sys, time
from pathlib import Path
from mnistm_dist.reporting.tracking import open_tracker
lines = []
tracker = open_tracker("wandb", run_dir=Path(sys.argv[1]), config={}, name="n", group=None, say=lines.append)
tracker.log({"a": 1}, 1)
while not lines:
    time.sleep(0.05)
core = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True).stdout
os.kill(int(core.split()[0]), signal.SIGKILL)
time.sleep(0.2)
for step in range(2, 100):
    tracker.log({"a": step}, step)
tracker.finish(0, "finished")
print(*lines, "trained to the end", sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    _, failure, end = done.stdout.splitlines()
    assert failure.startswith("the tracker failed (")
    assert "training continues; to upload this run later: wandb sync " in failure
    assert end == "trained to the end"
    assert "Traceback" not in done.stderr


def test_logging_costs_far_less_than_a_fiftieth_of_a_step(tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    costs = []
    for step in range(100):
        began = time.perf_counter()
        tracker.log({"train/loss": 1.0, "train/learning_rate": 1e-3, "train/images_per_second": 700.0}, step)
        costs.append(time.perf_counter() - began)
        time.sleep(0.005)
    tracker.finish(0, "finished")
    assert sorted(costs)[50] < 0.1 * 0.02
    assert len(history(offline_records(tmp_path))) == 100


class SlowTracker(BackgroundTracker):
    """A tracker that takes half a second to open, and then fails or works."""

    failures = (OSError,)

    def __init__(self, say: Callable[[str], None], error: Exception | None = None) -> None:
        self.error, self.logged = error, 0
        super().__init__(say)

    def open(self) -> None:
        time.sleep(0.5)
        if self.error:
            raise self.error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.submit(self._work)

    def _work(self, _: None) -> None:
        self.logged += 1
        if self.logged % 2:
            raise OSError("odd")


def test_entries_that_do_not_fit_the_queue_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "QUEUE_SIZE", 3)
    lines: list[str] = []
    tracker = SlowTracker(lines.append, OSError("no reason"))
    for step in range(10):
        tracker.log({"a": 1}, step)
    tracker.finish(0, "finished")
    assert lines == [
        "the tracker failed (no reason); training continues; the run folder is complete",
        "the tracker was too slow for 9 entries, which are only in log.jsonl",
    ]


def test_a_tracker_that_fails_again_and_again_is_reported_once() -> None:
    lines: list[str] = []
    tracker = SlowTracker(lines.append)
    for step in range(10):
        tracker.log({"a": 1}, step)
    tracker.finish(0, "finished")
    assert lines == ["the tracker failed (odd); training continues; the run folder is complete"]
    assert tracker.logged == 10


@pytest.mark.parametrize(
    ("tracker", "environ", "mode"),
    [
        ("none", {"WANDB_API_KEY": KEY}, "none"),
        ("auto", {}, "none"),
        ("auto", {"WANDB_API_KEY": KEY}, None),
        ("auto", {"WANDB_MODE": "offline"}, None),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "none"),
        ("wandb", {}, "offline"),
        ("wandb", {"WANDB_API_KEY": KEY}, None),
        ("wandb", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, None),
        ("wandb", {"WANDB_MODE": "disabled"}, "none"),
    ],
)
def test_the_mode_follows_the_flag_and_the_environment(
    tmp_path: Path, tracker: str, environ: dict[str, str], mode: str | None
) -> None:
    assert choose_mode(tracker, {"HOME": str(tmp_path), **environ}) == mode  # type: ignore[arg-type]


def test_a_key_that_wandb_login_stored_is_found_for_its_host(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    assert has_api_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example"})
    assert not has_api_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://other.example"})


def test_a_run_without_tracking_writes_nothing_and_imports_no_wandb(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mnistm_dist.reporting.tracking import open_tracker\n"
        "t = open_tracker('none', run_dir=Path(sys.argv[1]), config={}, name='n', group=None, say=print)\n"
        "t.log({'a': 1}, 1); t.log_results({}, {}, {}, 1); t.log_checkpoint(Path('c')); t.finish(0, 'finished')\n"
        "assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "run").exists()
    assert type(open_tracker("none", run_dir=tmp_path, config={}, name="n", group=None, say=print)) is Tracker


def test_errors_are_shown_in_one_short_line() -> None:
    assert one_line(OSError("refused\nby peer")) == "refused by peer"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x " * 1000))) <= 160


def test_wandb_that_cannot_be_imported_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    lines: list[str] = []
    tracker = opened(tmp_path, lines.append)
    assert isinstance(tracker, WandbTracker)
    tracker._thread.join()
    for step in range(2 * tracking.QUEUE_SIZE):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(0, "finished")
    (line,) = lines
    assert line.startswith("the tracker failed (import of wandb halted")


# By Accelerate


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run folder with a figure."""
    run_dir = write_run(tmp_path / "run", val_size=50, accuracy=0.5, epochs=1, steps_per_epoch=2)
    Image.new("RGB", (8, 8)).save(run_dir / "learning_curve.png")
    return run_dir


def track(name: Any, run_dir: Path, exit_code: int = 0, state: str = "finished") -> list[str]:
    """Log a short run; return the lines that were shown."""
    lines: list[str] = []
    config = {"steps": {"seed": 1, "image_size": (32, 48)}}
    tracker = open_tracker(name, run_dir=run_dir, config=config, name="first", group="job 7", say=lines.append)
    assert tracker.name == name
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0 / step}, step)
    log_results(tracker, {"val": {"accuracy": 0.97}}, [run_dir / "learning_curve.png"], {}, 3)
    tracker.finish(exit_code, state)
    return lines


def test_tensorboard_gets_scalars_configuration_and_figures(results: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install '.[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track("tensorboard", results) == []
    events = EventAccumulator(str(results / "tensorboard" / "first")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert events.Scalars("result/val_accuracy")[0].value == pytest.approx(0.97)
    assert "figures/learning_curve" in events.Tags()["images"]
    (hparams,) = results.glob("tensorboard/first/*/hparams.yml")
    assert "steps.seed: 1" in hparams.read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("exit_code", "state", "status"),
    [(0, "finished", "FINISHED"), (75, "preempted", "KILLED"), (1, "failed", "FAILED")],
)
def test_mlflow_gets_the_run_and_how_it_ended(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, state: str, status: str
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install '.[trackers]'")
    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert track("mlflow", results, exit_code, state) == []
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("mnistm-dist").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("first", status, "job 7")
    assert run.data.params["steps.image_size"] == "(32, 48)"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert run.data.metrics["result/val_accuracy"] == 0.97
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/learning_curve.png"]


def test_a_tracker_that_is_not_installed_is_one_line_and_the_run_goes_on(results: Path) -> None:
    (line,) = track("clearml", results)
    assert line.startswith("the tracker failed (No module named")
    assert line.endswith("; training continues; the run folder is complete")
