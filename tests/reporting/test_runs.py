"""Claims about `mnistm_dist.reporting.runs`: files that are missing, cut off, damaged or of another version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_folders import write_run

from mnistm_dist import __version__
from mnistm_dist.errors import UserError
from mnistm_dist.reporting.predictions import read_predictions
from mnistm_dist.reporting.runs import RunRecord, read_run, read_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run", val_size=60, test_split=False, accuracy=0.8, epochs=3, steps_per_epoch=4, resume_at=6
    )


def read(run: Path) -> RunRecord:
    return read_run(run, __version__)


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_complete_run_has_nothing_missing(run: Path) -> None:
    assert read(run).missing == ()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.yaml", "config.yaml: not found."),
        ("environment.json", "environment.json: not found."),
        ("state.json", "state.json: not found."),
        ("log.jsonl", "log.jsonl: not found."),
        ("architecture.json", "architecture.json: not found."),
        ("summary.json", "summary.json: not found."),
        ("checkpoints", "checkpoints: none; the model itself is not in this folder."),
        ("predictions_val.csv", "predictions_val.csv: not available; calibration and comparisons on val are left out."),
    ],
)
def test_a_missing_file_is_named_and_the_rest_is_read(run: Path, name: str, sentence: str) -> None:
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    record = read(run)
    assert record.missing == (sentence,)
    assert record.metrics["val"].total == 60


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "state.json", "architecture.json", "summary.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00\xff: ["])
def test_a_damaged_file_is_named_and_the_rest_is_read(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content, encoding="latin-1")
    record = read(run)
    assert record.missing == (f"{name}: damaged, left out.",)
    assert record.metrics["val"].total == 60


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("state.json", {"step": "many"}),
        ("summary.json", {"train_seconds": [1], "parameters": -1}),
        ("summary.json", {"images_per_second": float("nan"), "checkpoint": 3}),
        ("summary.json", {"val": {"accuracy": 0.9}}),
        (
            "summary.json",
            {"val": {"classes": ["a"], "confusion_matrix": [[0, 1]], "log_loss": 0, "calibration_error": 0}},
        ),
        ("summary.json", {"data": {"counts": {"train": {}}}}),
    ],
)
def test_a_field_of_another_type_is_named_and_the_others_are_read(run: Path, name: str, fields: dict) -> None:
    change(run / name, **fields)
    record = read(run)
    assert record.missing == (f"{name}: invalid fields left out: {', '.join(sorted(fields))}.",)
    assert (record.state.state, record.summary.recipe) == ("finished", "fast")


def test_a_cut_log_is_read_as_far_as_it_goes(run: Path) -> None:
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log[: len(log) // 2])
    record = read(run)
    assert record.missing == ("log.jsonl: the last line is cut off (the run was killed while writing it).",)
    assert len(record.rows) == log[: len(log) // 2].count("\n")


def test_invalid_lines_of_a_log_are_counted(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('nonsense\n[1, 2]\n{"kind": "train"}\n{"kind": "train", "step": 1, "train/learning_rate": "high"}\n')
    (sentence,) = read(run).missing
    assert sentence.startswith("log.jsonl: 4 of ")
    assert sentence.endswith(" lines are invalid and were left out.")


def test_a_loss_that_is_not_finite_is_part_of_the_log(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "train/loss": NaN}\n')
    record = read(run)
    assert record.missing == ()
    assert record.rows[-1]["step"] == 99


def test_a_cut_predictions_file_is_named_and_the_summary_is_used(run: Path) -> None:
    text = (run / "predictions_val.csv").read_text()
    (run / "predictions_val.csv").write_text(text[:-20])
    record = read(run)
    assert (
        record.missing[0]
        == "predictions_val.csv: cut off, or a value is missing or out of range; evaluate the run again."
    )
    assert record.metrics["val"].total == 60


def test_predictions_of_another_checkpoint_than_the_summary_are_left_out(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    del summary["val"]
    (run / "summary.json").write_text(json.dumps(summary))
    record = read(run)
    assert "predictions_val.csv: of another checkpoint than summary.json, left out." in record.missing
    assert "val" not in record.metrics


def test_a_run_killed_before_any_evaluation_is_read(run: Path) -> None:
    for name in ("summary.json", "predictions_val.csv"):
        (run / name).unlink()
    change(run / "state.json", state="preempted", step=7, reason="SIGTERM")
    record = read(run)
    assert record.missing == ("summary.json: not found.", "predictions_val.csv, predictions_test.csv: not found.")
    assert (record.state.state, record.state.step, record.state.reason) == ("preempted", 7, "SIGTERM")


def test_a_run_of_another_version_is_named_as_such(run: Path) -> None:
    change(run / "environment.json", mnistm_dist="9.9")
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "future:\n  field: [1, {deep: true}]\n")
    record = read(run)
    assert record.missing == (f"written by version 9.9, read by version {__version__}.",)
    assert record.config["future.field"] == [1, {"deep": True}]


def test_predictions_that_were_read_already_are_not_read_again(run: Path) -> None:
    predictions = read_predictions(run / "predictions_val.csv")
    (run / "predictions_val.csv").write_text("damaged")
    record = read_run(run, __version__, {"val": predictions})
    assert record.predictions["val"] is predictions
    assert record.missing == ()


def test_runs_of_equal_names_are_named_by_their_paths_and_a_run_is_given_once(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other" / "run"))
    assert [record.name for record in read_runs([run, other], __version__)] == [str(run), str(other)]
    with pytest.raises(UserError, match="given twice"):
        read_runs([run, tmp_path / "." / "run"], __version__)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: not a run folder"):
        read_run(tmp_path / "nowhere", __version__)
    with pytest.raises(UserError, match=r"not a run folder.*; name one, which holds config"):
        read_run(tmp_path, __version__)
