"""Odd environments: a run ends as in any other, or with one line before it begins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import output_of

from mnistm_dist.data.cache import choose_cache_dir
from mnistm_dist.data.parallel import available_cores
from mnistm_dist.errors import UserError

QUICK = (
    *("--run-dir", "run", "--batch-size", "8", "--image-size", "16", "--max-steps", "2", "--threads", "1"),
    *("--no-report", "--tracker", "none"),
)
TRAIN = f"{sys.executable} -m mnistm_dist.train"


@pytest.fixture
def run_script(environment, tmp_path):
    """Run a line of bash in an empty folder."""

    def run(line: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", line]
        environ = {**environment, **extra}
        return subprocess.run(
            command, cwd=tmp_path, env=environ, input=stdin, capture_output=True, text=True, timeout=120
        )

    return run


def state(tmp_path: Path) -> str:
    return str(json.loads((tmp_path / "run" / "state.json").read_text())["state"])


@pytest.mark.parametrize(
    "line",
    [
        "{train} {flags} >&-",
        "{train} {flags} >&- 2>&- <&-",
        *(
            pytest.param(line, marks=pytest.mark.slow)
            for line in (
                "ulimit -n 64; {train} {flags} --report",
                "TMPDIR=/nowhere {train} {flags} --report",
                "env -u HOME {train} {flags} --report",
                f"{sys.executable} -O -m mnistm_dist.train {{flags}}",
                f"{sys.executable} -W error -m mnistm_dist.train {{flags}} --report",
            )
        ),
    ],
)
def test_a_run_finishes(run_script, tiny_set, tmp_path, line):
    done = run_script(line.format(train=TRAIN, flags=" ".join(("--shards", str(tiny_set), *QUICK))))
    assert done.returncode == 0, done.stderr
    assert state(tmp_path) == "finished"


@pytest.mark.parametrize("command", ["train --help", "plan --shards {set} --step 0"])
def test_a_command_whose_output_is_closed_succeeds(run_script, tiny_set, command):
    done = run_script(f"{sys.executable} -m mnistm_dist.{command.format(set=tiny_set)} >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_home_the_cache_is_in_the_folder_for_temporary_files(run_script):
    """The user has no passwd entry, as in many containers."""
    code = "import os; from mnistm_dist.data import cache; os.setuid(4321); print(cache.choose_cache_dir(None))"
    if os.geteuid() != 0:
        pytest.skip("only root may become a user without a passwd entry")
    done = run_script(f"env -u HOME -u MNISTM_DIST_CACHE {sys.executable} -c '{code}'", TMPDIR="/var/tmp")
    assert done.stdout == "/var/tmp/mnistm_dist-4321\n", done.stderr


def test_the_cache_is_not_a_folder_for_a_url(monkeypatch):
    monkeypatch.setenv("MNISTM_DIST_CACHE", "s3://bucket/cache")
    with pytest.raises(UserError, match="should be a local path"):
        choose_cache_dir(None)


def test_a_package_without_metadata_has_no_version(monkeypatch, small_set, run_main, tmp_path):
    from mnistm_dist.train import main
    from mnistm_dist.training import environment

    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    output_of(run_main(main, "--shards", small_set, *QUICK, "--max-steps", 1))
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["no-such-package"] is None
    assert found["torch"]


def test_compiling_without_a_compiler_is_refused_before_training(run_script, tiny_set, tmp_path):
    (tmp_path / "bin").mkdir()
    flags = f"--compile --shards {tiny_set} {' '.join(QUICK)}"
    done = run_script(f"PATH=/nowhere {TRAIN} {flags}", CXX="no-such-compiler")
    (line,) = done.stderr.splitlines()
    assert "--no-compile" in line
    assert "compiler" in line
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


# `main([...])` from Python

CALL = "from mnistm_dist.train import main\n{call}\n"
NO_GUARD = "from mnistm_dist import pack\npack.main(['sample', '--out', 'set'])\n"


def test_a_training_in_a_thread_finishes_and_records_the_flags_that_it_was_given(run_script, small_set, tmp_path):
    """As in a notebook, whose sys.argv is the kernel's."""
    call = "import threading\nthread = threading.Thread(target=main, args=({flags},))\nthread.start()\nthread.join()"
    flags = ["--shards", str(small_set), *QUICK]
    (tmp_path / "script.py").write_text(CALL.format(call=call.format(flags=flags)))
    done = run_script(f"{sys.executable} script.py -f kernel.json")
    assert state(tmp_path) == "finished", done.stderr
    command = json.loads((tmp_path / "run" / "environment.json").read_text())["command"]
    assert command == f"python -m mnistm_dist.train --shards {small_set} {' '.join(QUICK)}"


@pytest.mark.skipif(available_cores() == 1, reason="one core: pack works without workers")
@pytest.mark.parametrize("how", ["script.py", pytest.param("- < script.py", marks=pytest.mark.slow)])
def test_a_script_without_a_main_guard_packs(run_script, tmp_path, how):
    (tmp_path / "script.py").write_text(NO_GUARD)
    done = run_script(f"{sys.executable} {how}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "set" / "manifest.json").exists()
