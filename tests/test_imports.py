"""Imports run one way: commands -> training -> data -> floor, and commands -> reporting -> floor; --help is quick."""

import ast
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mnistm_dist
from mnistm_dist.__main__ import COMMANDS, main
from mnistm_dist.errors import run_cli

PACKAGE = Path(mnistm_dist.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOOR = {"errors", "config", "files", "run_lock", "__version__"}
ALLOWED = {
    "data": {"data"} | FLOOR,
    "training": {"training", "data", "cli"} | FLOOR,
    "reporting": {"reporting"} | FLOOR,
}
LOGGERS_PLOTS_FLAGS = {"argparse", "tyro", "logging", "rich", "matplotlib", "wandb"}


def imports_of(path: Path) -> set[str]:
    """Return all modules that a file imports."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import hides the module"
            result |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return result


def parts_of(path: Path) -> set[str]:
    """Return the parts of this package that a file imports."""
    names = [name.split(".") for name in imports_of(path) if name.startswith("mnistm_dist.")]
    return {parts[1] for parts in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room in ALLOWED:
        assert parts_of(path) <= ALLOWED[room]
    elif room.removesuffix(".py") in FLOOR:
        assert parts_of(path) <= FLOOR


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


def test_every_command_is_listed():
    with_main = {path.stem for path in PACKAGE.glob("*.py") if "run_cli(main)" in path.read_text(encoding="utf-8")}
    assert set(COMMANDS) == with_main


def run_python(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run Python in a new process; return the process and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_under_half_a_second_of_cpu_in_80_columns(command):
    # The best of three, since other processes share the cache of the CPU.
    runs = [run_python("-m", f"mnistm_dist.{command}", "--help") for _ in range(3)]
    assert min(seconds for _, seconds in runs) < 0.5
    done = runs[0][0]
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n\nusage: python -m mnistm_dist.{command} " in done.stdout
    assert f"    python -m mnistm_dist.{command} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_before_main_no_command_has_imported_torch_or_changed_the_environment():
    modules = ", ".join([*(f"mnistm_dist.{command}" for command in COMMANDS), "benchmarks.__main__"])
    code = f"import os, sys; was = dict(os.environ); import {modules}; print('torch' in sys.modules, was == os.environ)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["unset", "set", "policy"],
)
def test_a_command_bounds_the_spinning_of_idle_threads_unless_the_environment_does(monkeypatch, given, count):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # `setenv` first: what the command sets is then removed at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []
    assert run_cli(lambda _: seen.append(os.environ.get("GOMP_SPINCOUNT")) or 0, []) == 0
    assert seen == [count]


def test_a_command_runs_by_its_name():
    expected, _ = run_python("-m", "mnistm_dist.verify", "nowhere")
    done, _ = run_python("-m", "mnistm_dist", "verify", "nowhere")
    assert (done.returncode, done.stderr) == (expected.returncode, expected.stderr)
    assert expected.returncode == 2


def test_an_unknown_command_is_refused_with_the_list_and_the_nearest_name():
    done, _ = run_python("-m", "mnistm_dist", "evalaute")
    error, *listed = done.stderr.splitlines()
    assert error.startswith("error: evalaute: no such command (did you mean evaluate?)")
    assert done.returncode == 2
    assert [line.split()[0] for line in listed] == list(COMMANDS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("mnistm-dist e", "evaluate export"),
        ("mnistm-dist train --lea", "--learning-rate"),
        ("mnistm-dist train --optimizer m", "muon"),
        ("mnistm-dist predict runs/x --j", "--json"),
    ],
)
def test_bash_completes_commands_flags_and_values(line, completed):
    script, _ = run_python("-m", "mnistm_dist", "--completion", "bash")
    words = f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tyro_mnistm_dist"
    done = subprocess.run(
        ["bash", "-c", f'{script.stdout}\n{words} && echo "${{COMPREPLY[*]}}"'], capture_output=True, text=True
    )
    assert done.stdout.strip() == completed


def test_an_unknown_shell_is_refused():
    done, _ = run_python("-m", "mnistm_dist", "--completion", "csh")
    assert (done.returncode, done.stderr) == (2, "error: --completion: found 'csh'; should be one of bash, zsh, fish\n")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_the_package_prints_version_and_help(flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnistm-dist", flag])
    assert main() == 0
    lines = capsys.readouterr().out.partition("For the flags")[0].splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert (flag, lines[0], listed) in (
        ("--version", f"mnistm-dist {mnistm_dist.__version__}", []),
        ("--help", "usage: mnistm-dist COMMAND ...", list(COMMANDS)),
    )
