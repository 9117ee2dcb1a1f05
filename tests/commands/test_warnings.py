"""If nothing is wrong, no command prints a warning, of this package or of a library."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, output_of

SHORT = ("--batch-size", 32, "--image-size", 16, "--epochs", 1, "--max-steps", 3, "--threads", 1)
COMMANDS = {
    "verify": ("verify", "SET"),
    "plan": ("plan", "RUN", "--step", 3, "--save", "batch.png"),
    "evaluate": ("evaluate", "RUN"),
    "predict": ("predict", "RUN", ROOT / "docs" / "report.png"),
    "export to torch": ("export", "RUN", "--to", "torch", "--out", "model.pt2"),
    "report": ("report", "RUN"),
}


def without_a_warning(done: subprocess.CompletedProcess[str]) -> None:
    """Check that a command succeeded without a warning on either stream."""
    message = output_of(done) + done.stderr
    assert "warning" not in message.lower(), message


def test_no_import_warns_of_a_deprecation():
    """In a new interpreter, where every module is imported for the first time."""
    files = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mnistm_dist").rglob("*.py"))
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    code = f"import importlib, wandb\nfor name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_prints_no_warning(run_command, small_set, world_size):
    """With a report and W&B offline."""
    places = ("--shards", small_set, "--run-dir", "run")
    without_a_warning(run_command("train", *places, *SHORT, world_size=world_size, WANDB_MODE="offline"))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_other_command_prints_a_warning(run_command, small_set, trained_run, tmp_path, name):
    run = shutil.copytree(trained_run, tmp_path / "run")
    first, *arguments = COMMANDS[name]
    places = {"SET": small_set, "RUN": run}
    without_a_warning(run_command(first, *(places.get(argument, argument) for argument in arguments)))
