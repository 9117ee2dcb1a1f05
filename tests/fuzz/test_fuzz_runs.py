"""Run folders from anywhere, as `report`, `evaluate`, `predict` and ``train --resume`` read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bounds import at_door
from inputs import changed, damaged
from run_folders import write_run
from search import Fuzz

from mnistm_dist import __version__, config, report
from mnistm_dist.cli import parse_train_flags
from mnistm_dist.reporting.curves import series
from mnistm_dist.reporting.predictions import mistakes, read_predictions
from mnistm_dist.reporting.runs import read_run
from mnistm_dist.training.run_dir import read_log, read_state
from mnistm_dist.training.setup import choose_start

pytest_plugins = ["counting"]
DOCUMENTS = ("state.json", "summary.json", "environment.json", "architecture.json", "config.yaml")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    return write_run(tmp_path_factory.mktemp("valid") / "run", val_size=30, epochs=2, steps_per_epoch=3, resume_at=2)


def fresh(valid: Path, *left_out: str) -> Path:
    """The run in the working folder, without some of its files."""
    shutil.rmtree("run", ignore_errors=True)
    run = Path(shutil.copytree(valid, "run"))
    for name in left_out:
        (run / name).unlink()
    return run


def spread(document: Any, *, as_yaml: bool) -> bytes:
    text = yaml.safe_dump(document, allow_unicode=True) if as_yaml else json.dumps(document)
    return text.encode("utf-8", "surrogatepass")


PREDICTED = ("log.jsonl", "predictions_val.csv", "predictions_test.csv")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_report_of_a_run_with_other_values_is_written(fuzz: Fuzz, valid: Path, name: str) -> None:
    """Without its figures, which take long; `report` says of each file what it could not read."""
    run = fresh(valid, *PREDICTED)
    document = yaml.safe_load((valid / name).read_text())
    if name == "summary.json":
        document = {key: value for key, value in document.items() if key not in ("val", "test")}
        (run / name).write_text(json.dumps(document))
    else:
        (run / "summary.json").unlink()

    def attempt(data: bytes) -> None:
        (run / name).write_bytes(data)
        at_door(report.main, run)

    values = changed(document).map(lambda value: spread(value, as_yaml=name.endswith("yaml")))
    fuzz.search(f"report, {name}", 0.0106, values | damaged((valid / name).read_bytes()), attempt)


@pytest.mark.parametrize("name", ["log.jsonl", "summary.json", "predictions_val.csv"])
def test_the_figures_of_a_run_with_other_values_are_drawn(fuzz: Fuzz, valid: Path, name: str) -> None:
    left = {"predictions_val.csv"} if name == "summary.json" else {"summary.json", "predictions_val.csv", "log.jsonl"}
    run = fresh(valid, "predictions_test.csv", *sorted(left - {name}))
    whole = (valid / name).read_bytes()
    inputs = damaged(whole)
    if name == "summary.json":
        document = {key: value for key, value in json.loads(whole).items() if key != "test"}
        inputs = changed(document["val"]).map(lambda value: json.dumps({**document, "val": value}).encode()) | inputs
    if name == "log.jsonl":
        rows = [json.loads(line) for line in whole.splitlines()]
        inputs = changed(rows).map(log) | inputs

    def attempt(data: bytes) -> None:
        (run / name).write_bytes(data)
        at_door(report.main, run)

    fuzz.search(f"report with figures, {name}", 0.0025, inputs, attempt)


def log(rows: Any) -> bytes:
    """Rows as a log, whatever they are."""
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode()


def test_a_damaged_log_is_read_as_far_as_it_goes(fuzz: Fuzz, valid: Path) -> None:
    run = fresh(valid, *DOCUMENTS)
    whole = (valid / "log.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]

    def attempt(data: bytes) -> None:
        (run / "log.jsonl").write_bytes(data)
        read_log(run / "log.jsonl")
        found = read_run(run, __version__).rows
        for kind, key in (("train", "train/loss"), ("evaluation", "val/accuracy")):
            assert np.isfinite(series(found, kind, key)[1]).all()

    fuzz.search("log.jsonl", 0.0198, changed(rows).map(log) | damaged(whole), attempt)


def test_a_damaged_predictions_file_is_measured_or_refused_in_a_line(fuzz: Fuzz, valid: Path) -> None:
    def attempt(data: bytes) -> None:
        Path("predictions.csv").write_bytes(data)
        found = read_predictions(Path("predictions.csv"))
        found.measure()
        mistakes(found)

    fuzz.search("predictions", 0.033, damaged((valid / "predictions_val.csv").read_bytes()), attempt)


RESUMED: dict[str, Callable[[Path], Any]] = {
    "config.yaml": lambda path: yaml.safe_load(path.read_text()),
    "state.json": lambda path: json.loads(path.read_text()),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_of_a_damaged_run_starts_or_is_refused_in_a_line(fuzz: Fuzz, valid: Path, name: str) -> None:
    run = fresh(valid)
    (run / "state.json").write_text('{"state": "preempted", "step": 3, "reason": "SIGTERM"}')
    document = RESUMED[name](run / name)

    def attempt(data: bytes) -> None:
        (run / name).write_bytes(data)
        read_state(run)
        for flags in (["--resume", "run"], ["--resume", "auto", "--run-dir", "run"]):
            chosen, _ = choose_start(parse_train_flags(flags))
            if chosen is not None:
                config.dump(chosen)

    values = changed(document).map(lambda value: spread(value, as_yaml=name.endswith("yaml")))
    fuzz.search(f"resume, {name}", 0.0099, values | damaged((run / name).read_bytes()), attempt)
