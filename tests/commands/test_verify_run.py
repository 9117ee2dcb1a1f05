"""``verify RUN`` finds what was changed in a run folder, and proves steps by training them again."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import error_of, launcher, output_of
from packed_sets import flip_byte
from safetensors.torch import load_file, save_file

from mnistm_dist import verify
from mnistm_dist.errors import UserError
from mnistm_dist.training.run_dir import read_log
from mnistm_dist.verify_run import choose_stretch

FLAGS = (
    *("--recipe", "fast", "--batch-size", 16, "--micro-batch", 8, "--image-size", 16, "--epochs", 2, "--max-steps", 8),
    *("--checkpoint-every", 2, "--keep-checkpoints", "all", "--log-every", 3, "--threads", 1, "--tracker", "none"),
    *("--precision", "fp32", "--no-report"),
)
STEPS = 8
LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def whole(small_set, cache_dir, tmp_path_factory) -> Path:
    """A run of 8 steps, with checkpoints at 2, 4, 6 and 8, and rows of the log at 3, 6 and 8; read only."""
    from mnistm_dist.train import main

    run = tmp_path_factory.mktemp("runs") / "whole"
    places = ("--shards", small_set, "--run-dir", run, "--cache-dir", cache_dir)
    assert main(list(map(str, (*places, *FLAGS)))) == 0
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def findings_of(done: Any) -> list[str]:
    """The lines of the findings, without the time; there is at least one."""
    assert done.returncode == 1, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line[9:].startswith("finding: ")]
    assert found, done.stdout
    return found


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "steps 6 to 8 and the results agree to the last bit"),
        (("--replay", "0:8"), "steps 0 to 8 and"),
        (("--replay", "4"), "steps 2 to 4 and"),
        (("--replay", "2:6"), "steps 2 to 6 and"),
        (("--replay", "none"), "4 checkpoints, log, configuration and results agree"),
    ],
)
def test_an_untouched_run_verifies_and_nothing_is_written_to_it(run_main, run, flags, told):
    before = contents(run)
    text = output_of(run_main(verify.main, run, *flags))
    assert told in text
    assert contents(run) == before
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_random_stretch_is_told_with_its_seed_and_drawn_again_by_it(run_main, run):
    told = [
        next(line for line in output_of(run_main(verify.main, run, *flags)).splitlines() if "drawn with" in line)[9:]
        for flags in [("--replay", "random")]
    ]
    seed = told[0].rpartition(" ")[2].rstrip(")")
    again = output_of(run_main(verify.main, run, "--replay", "random", "--seed", seed))
    assert told[0] in again


@pytest.mark.parametrize("stretch", ["3", "8:6", "0:7", "0"])
def test_steps_without_a_checkpoint_are_refused_with_those_that_have_one(run_main, run, stretch):
    assert "two of the steps 0, 2, 4, 6, 8" in error_of(run_main(verify.main, run, "--replay", stretch))


def test_an_error_names_a_few_of_many_steps():
    with pytest.raises(UserError, match=r"steps 0, 1, 2, 3, 4, \.\.\., 95, 96, 97, 98, 99, which have a checkpoint"):
        choose_stretch(list(range(100)), "3:2", 0)


def edit_json(name: str, *path: str | int, value: object) -> Callable[[Path], None]:
    """Return a function that sets a value in a JSON file of a run; a function of the old value if it is callable."""

    def edit(run: Path) -> None:
        document = inner = json.loads((run / name).read_text())
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
        (run / name).write_text(json.dumps(document))

    return edit


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a function that replaces the first of a text in a file of a run."""

    def edit(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return edit


def edit_row(kind: str, step: int, name: str, value: Any, *, signed: bool = False) -> Callable[[Path], None]:
    """Return a function that sets a value in a row of the log; with ``signed``, the checkpoints' hashes fit again."""

    def edit(run: Path) -> None:
        rows = read_log(run / "log.jsonl")
        (row,) = (row for row in rows if (row["kind"], row["step"]) == (kind, step))
        row[name] = value(row[name]) if callable(value) else value
        write_rows(run, rows, signed=signed)

    return edit


def write_rows(run: Path, rows: list[dict[str, Any]], *, signed: bool = False) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    (run / "log.jsonl").write_text("".join(lines))
    for path in run.glob("checkpoints/*/state.json") if signed else ():
        document, step = json.loads(path.read_text()), int(path.parent.name[5:])
        content = "".join(line for line, row in zip(lines, rows, strict=True) if row["step"] <= step).encode()
        document["run_files"]["log.jsonl"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(document))


def drop_row(kind: str, step: int) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        rows = read_log(run / "log.jsonl")
        write_rows(run, [row for row in rows if (row["kind"], row["step"]) != (kind, step)])

    return edit


def swap_rows(run: Path) -> None:
    first, *others = read_log(run / "log.jsonl")
    write_rows(run, [first, others[1], others[0], *others[2:]])


def change_weight(folder: str, file: str = "model.safetensors", name: str = "conv1.weight") -> Callable[[Path], None]:
    """Return a function that changes a number of a checkpoint, and its hash with it, as an attacker would."""

    def edit(run: Path) -> None:
        path = run / folder / file
        tensors = load_file(path)
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, path)
        content = path.read_bytes()
        digest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_json(f"{folder}/state.json", "files", file, value=digest)(run)

    return edit


def edit_cell(split: str, row: int, column: int, value: Callable[[str], str] | str) -> Callable[[Path], None]:
    """Return a function that sets a cell of the predictions."""

    def edit(run: Path) -> None:
        path = run / f"predictions_{split}.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()]
        rows[row][column] = value(rows[row][column]) if callable(value) else value
        path.write_text("".join(",".join(cells) + "\n" for cells in rows))

    return edit


def swap_lines(run: Path) -> None:
    path = run / "predictions_val.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))


def other_digit(cell: str) -> str:
    return str((int(cell) + 1) % 10)


def change_an_unlikely_class(run: Path) -> None:
    """Add a millionth to a probability that is neither the true nor the predicted class's."""
    label, predicted = (run / "predictions_val.csv").read_text().splitlines()[1].split(",")[1:3]
    other = next(i for i in range(10) if str(i) not in (label, predicted))
    edit_cell("val", 1, 3 + other, lambda cell: f"{float(cell) + 1e-6:.6f}")(run)


CHECKPOINTS = {
    "a byte of the model": (lambda run: flip_byte(run / LAST / "model.safetensors", 9000), "torn or was changed"),
    "a byte of the optimizer": (lambda run: flip_byte(run / LAST / "training_state.safetensors", 9000), "torn or"),
    "a byte of an earlier one": (lambda run: flip_byte(run / f"{LAST[:-1]}4/model.safetensors", 9000), "torn or"),
    "a file removed": (lambda run: (run / LAST / "training_state.safetensors").unlink(), "removed"),
    "its state cut": (lambda run: (run / LAST / "state.json").write_text("{"), "torn, changed"),
    "a weight and its hash": (change_weight(LAST), "model.safetensors has other bytes"),
    "a statistic and its hash": (change_weight(LAST, name="bn1.running_mean"), "model.safetensors has other bytes"),
    "a trained weight and its hash": (
        change_weight(LAST, "training_state.safetensors", "model.conv1.weight"),
        "training_state.safetensors has other bytes",
    ),
    "the weights before and their hash": (
        change_weight(f"{LAST[:-1]}6", "training_state.safetensors", "model.conv1.weight"),
        "loss of step 6",
    ),
    "the mean of the set": (edit_json(f"{LAST}/state.json", "scalars", "mean", 0, value=0.5), "mean is"),
    "the set": (edit_json(f"{LAST}/state.json", "scalars", "shards", value="0" * 64), "identity is"),
    "the step": (edit_json(f"{LAST}/state.json", "step", value=7), "step-00000008: step is 7"),
    "a loss": (edit_json(f"{LAST[:-1]}4/state.json", "scalars", "history", "pending", 0, value=2.0), "step 3 is 2.0"),
    "the best accuracy": (
        edit_json(f"{LAST}/state.json", "scalars", "history", "best", "accuracy", value=0.9),
        "val/accuracy at step 8 is 0.9",
    ),
}
LOG = {
    "a loss": (edit_row("train", 3, "train/loss", 2.0), "log.jsonl: sha256"),
    "the loss of a step": (edit_row("train", 6, "losses", lambda losses: [*losses[:-1], 2.0]), "log.jsonl: sha256"),
    "a loss and the hashes": (
        edit_row("train", 8, "losses", lambda losses: [*losses[:-1], 2.0], signed=True),
        "loss of step 7 is 2.0",
    ),
    "a norm and the hashes": (edit_row("train", 8, "train/gradient_norm", 9.0, signed=True), "gradient_norm at step 8"),
    "an accuracy": (edit_row("evaluation", 8, "val/accuracy", 0.99), "val/accuracy at step 8 is 0.99"),
    "an accuracy and the hashes": (
        edit_row("evaluation", 8, "val/accuracy", 0.99, signed=True),
        "val: accuracy",
    ),
    "a time": (edit_row("train", 3, "time", 1.0), "log.jsonl: sha256"),
    "a world size": (edit_row("start", 0, "world_size", 64), "log.jsonl: sha256"),
    "a row removed": (drop_row("train", 6), "log.jsonl: sha256"),
    "the last row removed": (drop_row("evaluation", 8), "log.jsonl: sha256"),
    "two rows swapped": (swap_rows, "log.jsonl: sha256"),
    "removed": (lambda run: (run / "log.jsonl").unlink(), "log.jsonl: sha256"),
}
CONFIGURATION = {
    "the seed": (edit_text("config.yaml", "seed: 0", "seed: 1"), "seed is 1; by step-00000008 it is 0"),
    "the learning rate": (
        edit_text("config.yaml", "learning_rate: 0.01", "learning_rate: 0.02"),
        "learning_rate is 0.02",
    ),
    "the batch size": (
        edit_text("config.yaml", " batch_size: 16", " batch_size: 32"),
        "config.yaml: batch_size is 32; by step-00000008 it is 16",
    ),
    "the optimizer": (edit_text("config.yaml", "optimizer: muon", "optimizer: sgd"), "optimizer is 'sgd'"),
    "the epochs": (
        edit_text("config.yaml", "epochs: 2", "epochs: 200"),
        "config.yaml: epochs is 200; by step-00000008 it is 2",
    ),
    "an augmentation": (
        edit_text("config.yaml", "shift: 4.0", "shift: 0.0"),
        "config.yaml: shift is 0.0; by step-00000008 it is 4.0",
    ),
    "the precision": (edit_text("config.yaml", "precision: fp32", "precision: bf16"), "precision is 'bf16'"),
    "the threads": (edit_text("config.yaml", "threads: 1", "threads: 2"), "threads is 2; by step-00000008 it is 1"),
    "the steps": (edit_text("config.yaml", "max_steps: 8", "max_steps: 6"), "state.json: step is 8"),
    "the recipe": (edit_text("config.yaml", "recipe: fast", "recipe: best"), "recipe is 'fast'; by"),
    "what changes no weight": (edit_text("config.yaml", "log_every: 3", "log_every: 4"), "config.yaml: sha256"),
    "the environment": (edit_text("environment.json", '"torch": "', '"torch": "9'), "environment.json: sha256"),
    "the architecture": (lambda run: (run / "architecture.json").write_text("[]"), "architecture.json: sha256"),
}
PREDICTIONS = {
    "a probability": (edit_cell("val", 1, 3, "0.500000"), "predictions_val.csv"),
    "one that no metric shows": (change_an_unlikely_class, "predictions_val.csv: has other bytes"),
    "a predicted class": (edit_cell("val", 1, 2, other_digit), "confusion_matrix is"),
    "a label": (edit_cell("val", 1, 1, other_digit), "labels is"),
    "a key": (edit_cell("val", 1, 0, "99999999"), "keys is"),
    "a probability of test": (edit_cell("test", 5, 4, "0.500000"), "predictions_test.csv"),
    "two rows swapped": (swap_lines, "keys is"),
    "a row removed": (
        lambda run: (run / "predictions_val.csv").write_text(
            "".join((run / "predictions_val.csv").read_text().splitlines(keepends=True)[:-1])
        ),
        "total is 97; by predictions_val.csv it is 96",
    ),
    "cut": (
        lambda run: (run / "predictions_val.csv").write_text("key,label"),
        "predictions_val.csv: found the columns",
    ),
    "removed": (lambda run: (run / "predictions_test.csv").unlink(), "predictions_test.csv: cannot be read"),
}
SUMMARY = {
    "the accuracy": (edit_json("summary.json", "val", "accuracy", value=0.99), "val: accuracy is 0.99"),
    "the correct ones": (edit_json("summary.json", "test", "correct", value=53), "test: correct is 53"),
    "the matrix": (edit_json("summary.json", "val", "confusion_matrix", 0, 0, value=90), "confusion_matrix"),
    "the log loss": (edit_json("summary.json", "val", "log_loss", value=0.1), "log_loss is 0.1"),
    "the interval": (edit_json("summary.json", "val", "interval95", 0, value=0.9), "interval95"),
    "the checkpoint": (edit_json("summary.json", "checkpoint", "step", value=6), "checkpoint: step is 6"),
    "the steps": (edit_json("summary.json", "steps", value=9000), "steps is 9000"),
    "the seconds": (edit_json("summary.json", "train_seconds", value=0.5), "train_seconds is 0.5"),
    "the parameters": (edit_json("summary.json", "parameters", value=7), "parameters is 7"),
    "the set": (edit_json("summary.json", "data", "identity", value="0" * 64), "data: identity"),
    "the seed": (edit_json("summary.json", "seed", value=3), "seed is 3"),
    "removed": (lambda run: (run / "summary.json").unlink(), "summary.json: recipe is None"),
}
KINDS = {
    "checkpoint": CHECKPOINTS,
    "log": LOG,
    "configuration": CONFIGURATION,
    "predictions": PREDICTIONS,
    "summary": SUMMARY,
}
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.mark.parametrize(("tamper", "told"), CASES.values(), ids=CASES)
def test_what_was_changed_is_found(run_main, run, tamper, told):
    tamper(run)
    before = contents(run)
    found = findings_of(run_main(verify.main, run))
    assert any(told in line for line in found), "\n".join(found)
    assert contents(run) == before


def test_each_kind_is_changed_in_ten_ways():
    assert all(len(cases) >= 10 for cases in KINDS.values())


def test_a_row_that_is_written_after_the_end_is_found(run_main, run):
    rows = read_log(run / "log.jsonl")
    write_rows(run, [*rows, {**rows[-1], "step": 9, "val/accuracy": 1.0}])
    assert any("log.jsonl" in line for line in findings_of(run_main(verify.main, run, "--replay", "none")))


def test_a_path_that_is_neither_a_set_nor_a_run_is_an_error_of_one_line(run_main, run):
    message = f"neither a packed set (manifest.json) nor a run (config.yaml) (did you mean {run}?); name one"
    assert message in error_of(run_main(verify.main, f"{run}x"))
    assert "neither a packed set" in error_of(run_main(verify.main, run.parent))


def test_without_a_complete_checkpoint_there_is_nothing_to_train_from(run_main, run):
    shutil.rmtree(run / "checkpoints")
    assert "no complete checkpoint" in error_of(run_main(verify.main, run))


def test_a_configuration_that_cannot_be_read_is_an_error_of_one_line(run_main, run):
    (run / "config.yaml").write_text("steps: {seed: many}")
    assert "config.yaml: steps.seed" in error_of(run_main(verify.main, run))


def test_another_set_is_found_and_a_copy_of_the_set_is_accepted(run_main, run, small_set, tiny_set, tmp_path):
    copy = shutil.copytree(small_set, tmp_path / "copy")
    output_of(run_main(verify.main, run, "--shards", copy, "--replay", "none"))
    found = findings_of(run_main(verify.main, run, "--shards", tiny_set, "--replay", "none"))
    assert any("identity is" in line for line in found)


def test_on_another_machine_losses_agree_within_a_bound_that_is_told(run_main, run):
    rows = read_log(run / "log.jsonl")
    rows[0]["device"] = "Another CPU"
    write_rows(run, rows, signed=True)
    text = output_of(run_main(verify.main, run, "--replay", "0:8"))
    assert "agree within 5%, not in all bits:" in text
    assert "  device was Another CPU, here " in text
    for row in rows:
        row["losses"] = [1.2 * loss for loss in row.get("losses", [])]
    write_rows(run, rows, signed=True)
    assert any("mean loss" in line for line in findings_of(run_main(verify.main, run, "--replay", "0:8")))


@pytest.mark.parametrize(
    ("flags", "worlds"), [((), (2, 2)), (("--reproducible",), (2, 1))], ids=["DDP", "reproducible"]
)
def test_a_run_of_two_processes_verifies_to_the_last_bit(run_command, small_set, tmp_path, flags, worlds):
    trained, verified = worlds
    places = ("--shards", small_set, "--run-dir", tmp_path / "two")
    output_of(run_command("train", *places, *FLAGS, *flags, world_size=trained))
    text = output_of(run_command("verify", tmp_path / "two", "--replay", "0:8", world_size=verified))
    assert "steps 0 to 8 and the results agree to the last bit" in text


def test_a_run_of_two_processes_agrees_within_the_bound_on_one(run_command, small_set, tmp_path):
    output_of(run_command("train", "--shards", small_set, "--run-dir", tmp_path / "two", *FLAGS, world_size=2))
    assert "  world_size was 2, here 1" in output_of(run_command("verify", tmp_path / "two"))


def test_a_run_that_was_killed_and_resumed_verifies(start, run_command, small_set, tmp_path):
    killed = tmp_path / "killed"
    flags = ("--shards", small_set, "--run-dir", killed, "--resume", "auto", *FLAGS)
    process = start("train", *flags)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints/step-00000004").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    output_of(run_command("train", *flags))
    assert [row["kind"] for row in read_log(killed / "log.jsonl")].count("resume") == 1
    for stretch in ("0:8", "last"):
        assert "to the last bit" in output_of(run_command("verify", killed, "--replay", stretch))


@pytest.mark.slow
def test_every_rank_of_a_launcher_ends_with_the_same_code(whole, environment, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    edit_json("summary.json", "steps", value=9)(run)
    for argument, code in ((whole, 0), (run, 1)):
        command = [sys.executable, *launcher(2), "-m", "mnistm_dist.verify", str(argument), "--replay", "none"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout.count("finding: ") == code
