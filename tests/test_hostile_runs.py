"""What fuzzing found: files of a run or a set that hold what they cannot end in one line, plainly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packed_sets import tiny_source
from run_folders import write_run

from mnistm_dist import __version__
from mnistm_dist.data.packing.writer import pack
from mnistm_dist.data.shards import ShardSet
from mnistm_dist.errors import EXIT_USER_ERROR, UserError, run_cli
from mnistm_dist.report import main as report
from mnistm_dist.reporting.predictions import read_predictions
from mnistm_dist.reporting.runs import read_run
from mnistm_dist.training.checkpoint import Checkpoint, check_state
from mnistm_dist.training.run_dir import read_log, read_state

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,0,0,1,0\xff", "not text in UTF-8"),
        ("a,0.5,0,1,0", "none of the 2 classes"),
        ("a,0,-1,1,0", "none of the 2 classes"),
        ("a,0,2,1,0", "none of the 2 classes"),
        ("a,nan,0,1,0", "none of the 2 classes"),
        ("a,0,0,nan,0", "not from 0 to 1"),
        ('"' + "x" * 200_000 + '",0,0,1,0', "no CSV"),
    ],
)
def test_predictions_that_are_none_are_refused(tmp_path: Path, rows: str, said: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_bytes(f"key,label,predicted,p0,p1\n{rows}\n".encode("latin-1"))
    with pytest.raises(UserError, match=said):
        read_predictions(path)


CHANGES = [
    ("state.json", "state", None, None),
    ("state.json", "step", "many", "step"),
    ("summary.json", "train_seconds", [1], "train_seconds"),
    ("summary.json", "images_per_second", 1e300, "images_per_second"),
    ("summary.json", "parameters", "few", "parameters"),
    ("summary.json", "data", {"counts": {"train": {}}}, "data"),
]


@pytest.mark.parametrize(("name", "field", "value", "told"), CHANGES)
def test_a_report_leaves_out_a_field_of_another_kind_and_says_so(
    tmp_path: Path, name: str, field: str, value: object, told: str | None
) -> None:
    run = write_run(tmp_path / "run", val_size=20, epochs=1, steps_per_epoch=2, resume_at=None)
    for unused in ("log.jsonl", "predictions_val.csv", "predictions_test.csv"):
        (run / unused).unlink()
    document = json.loads((run / name).read_text())
    document = {key: item for key, item in document.items() if key not in ("val", "test")} | {field: value}
    (run / name).write_text(json.dumps(document))
    assert report([str(run)]) == 0
    if told is not None:
        assert any(line.startswith(f"{name} does not hold what it should in {told}") for line in missing(run))


def missing(run: Path) -> tuple[str, ...]:
    return read_run(run, __version__).missing


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def change_summary(run: Path, **fields: object) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["val"].update(fields)
    (run / "summary.json").write_text(json.dumps(summary))


FOREIGN = {
    "half a character": lambda run: change_summary(run, classes=["\ud800", *"123456789"]),
    "a matrix of zeros": lambda run: change_summary(run, confusion_matrix=[[0] * 10] * 10),
    "a matrix of huge numbers": lambda run: change_summary(run, confusion_matrix=[[10**30] * 10] * 10),
    "a matrix below zero": lambda run: change_summary(run, confusion_matrix=[[-1] * 10] * 10),
    "a huge loss": lambda run: change_summary(run, log_loss=10**400),
    "a folder for a picture": lambda run: (run / "mistakes_val.png").mkdir(),
    "an evaluation of no epoch": lambda run: (
        (run / "log.jsonl")
        .open("a")
        .write('{"kind": "evaluation", "step": 3, "epoch": null, "split": "val", "val/accuracy": 0.5, "val/loss": 1}\n')
    ),
    "an environment without end": lambda run: (run / "environment.json").write_text(
        json.dumps({"command": nested(600), "host": "\ud800"})
    ),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_report_is_written_whatever_of_a_run_is_foreign(tmp_path: Path, change) -> None:
    run = write_run(tmp_path / "lr$x_$")
    for path in run.glob("predictions_val.csv"):
        path.unlink()
    (run / "mistakes_val.png").unlink(missing_ok=True)
    change(run)
    assert report([str(run)]) == 0
    other = write_run(tmp_path / "_other")
    assert report([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert "_other" in (tmp_path / "both.html").read_text()


def test_files_that_are_nested_without_end_are_read_as_damaged(tmp_path: Path) -> None:
    for name in ("state.json", "summary.json", "architecture.json", "log.jsonl", "config.yaml"):
        (tmp_path / name).write_text(DEEP + "\n")
    assert read_state(tmp_path) is None
    assert read_log(tmp_path / "log.jsonl") == []
    assert len(missing(tmp_path)) >= 5


def test_a_log_whose_steps_are_no_numbers_is_cut_without_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": "one"}\n{"step": 2}\n{}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 2}]


def test_a_checkpoint_without_a_field_of_its_own_is_refused_by_its_name() -> None:
    checkpoint = Checkpoint(path=Path("step-00000001"), step=1, state={"shards": "x", "micro_batch": True})
    with pytest.raises(UserError, match=r"step-00000001: state\.json .*micro_batch"):
        check_state(checkpoint)


def test_an_index_with_keys_that_are_no_text_is_refused(tmp_path: Path) -> None:
    pack(tiny_source(9, 3, size=(8, 8)), tmp_path / "set", num_shards=1)
    index = tmp_path / "set" / "train.index.npy"
    data = bytearray(index.read_bytes())
    data[data.index(b"00000000")] = 0xFF
    index.write_bytes(data)
    with pytest.raises(UserError, match=r"train\.index\.npy: it holds keys that are no ASCII"):
        ShardSet.open(tmp_path / "set").keys("train", range(8))


def test_a_path_that_cannot_be_looked_at_is_one_line_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(report, ["x" * 5000]) == EXIT_USER_ERROR
    assert run_cli(report, ["\x1b[2J"]) == EXIT_USER_ERROR
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: x")
    assert len(first) < 2_600
    assert second.startswith("error: \\x1b[2J: no such run folder")
