"""Imports run one way: commands -> training -> data -> config, and commands -> reporting -> config."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import mnistm_dist

PACKAGE = Path(mnistm_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BOTTOM = {"errors", "config", "cli", "files", "__version__"}
ALLOWED = {
    "data": {"data"} | BOTTOM,
    "training": {"training", "data"} | BOTTOM,
    "reporting": {"reporting"} | BOTTOM,
}
DOORS = ("pack", "verify", "plan", "train", "evaluate", "predict", "report", "export", "cache")
LOGGERS_PLOTS_FLAGS = {"argparse", "logging", "rich", "matplotlib", "wandb"}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    names = [name.split(".") for name in imports_of(path) if name.startswith("mnistm_dist.")]
    return {parts[1] for parts in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room in ALLOWED:
        assert rooms_of(path) <= ALLOWED[room]
    elif room.removesuffix(".py") in BOTTOM:
        assert rooms_of(path) <= BOTTOM


QUIET = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in ("data", "training")]


@pytest.mark.parametrize("path", QUIET, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_data_and_training_know_no_logger_plot_or_flag(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & LOGGERS_PLOTS_FLAGS


def test_the_model_knows_no_optimizer_or_rank():
    imported = imports_of(PACKAGE / "training" / "models.py")
    assert not any("optim" in name or "distributed" in name or "accelerate" in name for name in imported)


def test_collectives_stand_in_distributed_alone():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "distributed.py":
            assert "torch.distributed" not in imports_of(path), path


@pytest.mark.parametrize("door", DOORS)
def test_help_answers_in_under_half_a_second(door):
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", f"mnistm_dist.{door}", "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert f"mnistm_dist.{door}" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of the processor, and the best of three: what else runs on the machine is not the door's.
    assert min(seconds() for _ in range(3)) < 0.5
